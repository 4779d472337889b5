"""How much memory the system leaves to this process: the host, its control groups, its limits."""

import re
import resource
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_NAMES = {  # Of limit, use, and the part of its use that the kernel takes back, in a control group.
    "cgroup2": ("memory.max", "memory.current", ("active_file", "inactive_file")),
    "cgroup": (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
}


def of_host(proc: Path = _PROC) -> dict[str, int]:
    """Free bytes that this process shares with others, by what limits them.

    Args:
        proc: the file system of processes.

    Returns:
        Of the host, and of every control group (version 1 or 2) that this process is in and that
        has a limit; empty where the system does not tell.
    """
    free = {}
    available = _fields(proc / "meminfo").get("MemAvailable")
    if available is not None:
        free["the host"] = 1024 * available
    for kind, group in _groups(proc):
        limit_name, use_name, cached_names = _NAMES[kind]
        limit, use = _number(group / limit_name), _number(group / use_name)
        if limit is not None and use is not None:
            cached = _fields(group / "memory.stat")
            use -= sum(cached.get(name, 0) for name in cached_names)
            free[f"the control group {group}"] = max(limit - use, 0)
    return free


def of_process(proc: Path = _PROC) -> dict[str, int]:
    """Free bytes of this process alone, by its limit.

    Args:
        proc: the file system of processes.

    Returns:
        Of RLIMIT_AS and RLIMIT_DATA, where they are set.
    """
    used = _fields(proc / "self" / "status")
    free = {}
    for name, field in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
        limit, _ = resource.getrlimit(getattr(resource, name))
        if limit != resource.RLIM_INFINITY and field in used:
            free[name] = max(limit - 1024 * used[field], 0)
    return free


def _groups(proc: Path) -> Iterator[tuple[str, Path]]:
    """The control groups that count this process's memory, inner ones first, and their kind."""
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
        # In a container the mounted part may begin at the container's own group.
        below = paths[kind].removeprefix(root.rstrip("/")).strip("/")
        here = Path(mount) / below if ".." not in Path(below).parts else Path(mount)
        for group in (here, *here.parents):
            yield kind, group
            if group == Path(mount):
                break


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _number(file: Path) -> int | None:
    """The number in a file; None if it holds another word, such as `max`, or is not there."""
    word = "".join(_lines(file))
    return int(word) if word.isdecimal() else None


def _fields(file: Path) -> dict[str, int]:
    """The numbers in a file of lines of a name and a number, perhaps with a unit."""
    words = (line.replace(":", " ").split() for line in _lines(file))
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}


def _lines(file: Path) -> list[str]:
    """The lines of a file; none where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
