"""Tests of free_memory with files in the format of Linux."""

import resource

import pytest

from dml_jax._utils import free_memory

GB = 10**9


@pytest.fixture
def proc(tmp_path):
    """A proc file system of a host with 8 GiB of available memory."""
    folder = tmp_path / "proc"
    (folder / "self").mkdir(parents=True)
    meminfo = "MemTotal:  16777216 kB\nMemFree:  1024 kB\nMemAvailable:  8388608 kB\n"
    (folder / "meminfo").write_text(meminfo + "HugePages_Total:       0\n")
    return folder


def group(folder, **numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in numbers.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def mount(proc, *lines):
    (proc / "self" / "mountinfo").write_text("\n".join(lines) + "\n")


def test_a_host_without_control_groups(proc):
    assert free_memory.of_host(proc) == {"the host": 2**33}


def test_a_system_without_proc_files_has_no_limits(tmp_path):
    assert free_memory.of_host(tmp_path) == {}
    assert free_memory.of_process(tmp_path) == {}


def test_version_2_includes_parent_groups_and_excludes_the_page_cache(proc, tmp_path):
    root = tmp_path / "a b"
    stat = "anon 5\nactive_file 1000000000\ninactive_file 200000000\nshmem 7"
    inner, outer = root / "user" / "job", root / "user"
    group(inner, memory__max=6 * GB, memory__current=3 * GB, memory__stat=stat)
    group(outer, memory__max=4 * GB, memory__current=3 * GB + 10**8, memory__stat="anon 1")
    group(root, memory__current=9 * GB)  # The root has no limit.
    (proc / "self" / "cgroup").write_text("0::/user/job\n")
    escaped = str(root).replace(" ", "\\040")
    mount(proc, f"30 22 0:26 / {escaped} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate")
    assert free_memory.of_host(proc) == {
        "the host": 2**33,
        f"the control group {inner}": 6 * GB - 3 * GB + 1_200_000_000,
        f"the control group {outer}": 9 * 10**8,
    }
    group(outer, memory__max="max")
    group(inner, memory__max=2 * GB, memory__stat="anon 5")  # Below the memory in use.
    assert free_memory.of_host(proc) == {"the host": 2**33, f"the control group {inner}": 0}


def test_version_1_in_a_container_that_sees_only_its_own_group(proc, tmp_path):
    root = tmp_path / "memory"
    stat = "cache 9\nactive_file 9\ntotal_active_file 100\ntotal_inactive_file 20"
    numbers = {"limit_in_bytes": 6 * GB, "usage_in_bytes": 2 * GB, "stat": stat}
    group(root, **{f"memory__{name}": number for name, number in numbers.items()})
    (proc / "self" / "cgroup").write_text("5:cpu,cpuacct:/x\n4:memory:/docker/1f\n0::/\n")
    mount(
        proc,
        f"31 23 0:29 /docker/1f {tmp_path / 'cpu'} rw - cgroup cgroup rw,cpu,cpuacct",
        f"35 31 0:32 /docker/1f {root} rw - cgroup cgroup rw,memory",
        f"41 31 0:38 / {tmp_path / 'unified'} rw - cgroup2 cgroup2 rw",
    )
    assert free_memory.of_host(proc) == {
        "the host": 2**33,
        f"the control group {root}": 4 * GB + 120,
    }


def test_a_group_outside_of_the_mount_uses_the_mounted_group(proc, tmp_path):
    group(tmp_path / "cgroup", memory__max=GB, memory__current=0)
    (proc / "self" / "cgroup").write_text("0::/../elsewhere\n")
    mount(proc, f"30 22 0:26 / {tmp_path / 'cgroup'} rw - cgroup2 cgroup2 rw")
    assert free_memory.of_host(proc)[f"the control group {tmp_path / 'cgroup'}"] == GB


@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_the_limits_of_a_process(proc, name):
    (proc / "self" / "status").write_text("Name:\tpython\nVmSize:\t 1000 kB\nVmData:\t 500 kB\n")
    assert free_memory.of_process(proc) == {}
    kind = getattr(resource, name)
    before, limit = resource.getrlimit(kind), 1 << 44  # More than a process uses.
    used = {"RLIMIT_AS": 1000, "RLIMIT_DATA": 500}[name]
    resource.setrlimit(kind, (limit, before[1]))
    try:
        assert free_memory.of_process(proc) == {name: limit - 1024 * used}
        assert 0 < free_memory.of_process()[name] < limit
    finally:
        resource.setrlimit(kind, before)


def test_the_real_host_has_free_memory():
    assert free_memory.of_host()["the host"] > 0
