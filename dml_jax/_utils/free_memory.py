"""Free memory of the host, of the control groups and within the limits of this process."""

import re
import resource
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_GROUP_FILES = {  # Files with the limit and the use of a control group, and its page cache's size.
    "cgroup2": ("memory.max", "memory.current", ("active_file", "inactive_file")),
    "cgroup": (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
}


def of_host(proc: Path = _PROC) -> dict[str, int]:
    """Returns the free bytes that this process shares with others.

    Args:
        proc: the proc file system.

    Returns:
        The free bytes of the host, and of each control group (version 1 or 2) of this process that
        has a limit, by description. Empty if the system does not provide them.
    """
    free = {}
    available = _fields(proc / "meminfo").get("MemAvailable")
    if available is not None:
        free["the host"] = 1024 * available
    for kind, group in _groups(proc):
        limit_name, use_name, cached_names = _GROUP_FILES[kind]
        limit, use = _number(group / limit_name), _number(group / use_name)
        if limit is not None and use is not None:
            cached = _fields(group / "memory.stat")
            use -= sum(cached.get(name, 0) for name in cached_names)
            free[f"the control group {group}"] = max(limit - use, 0)
    return free


def of_process(proc: Path = _PROC) -> dict[str, int]:
    """Returns the free bytes within this process's own limits.

    Args:
        proc: the proc file system.

    Returns:
        The free bytes under RLIMIT_AS and RLIMIT_DATA, if they are set.
    """
    used = _fields(proc / "self" / "status")
    free = {}
    for name, field in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
        limit, _ = resource.getrlimit(getattr(resource, name))
        if limit != resource.RLIM_INFINITY and field in used:
            free[name] = max(limit - 1024 * used[field], 0)
    return free


def _groups(proc: Path) -> Iterator[tuple[str, Path]]:
    """Yields the kind and folder of this process's memory control groups, innermost first."""
    paths = {}
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    for line in _lines(proc / "self" / "mountinfo"):
        mounted, _, system = line.partition(" - ")
        kind, _, options = system.split(" ", 2)
        if kind not in paths or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        root, mount = (_unescaped(x) for x in mounted.split(" ")[3:5])
        # In a container, the root of the mount may be the container's own group.
        relative = paths[kind].removeprefix(root.rstrip("/")).strip("/")
        own = Path(mount) / relative if ".." not in Path(relative).parts else Path(mount)
        for group in (own, *own.parents):
            yield kind, group
            if group == Path(mount):
                break


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _number(file: Path) -> int | None:
    """Returns the number in a file; None if there is none, as for `max`, or no file."""
    word = "".join(_lines(file))
    return int(word) if word.isdecimal() else None


def _fields(file: Path) -> dict[str, int]:
    """Returns the numbers of a file whose lines are a name, a number and perhaps a unit."""
    words = (line.replace(":", " ").split() for line in _lines(file))
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}


def _lines(file: Path) -> list[str]:
    """Returns the lines of a file; none if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
