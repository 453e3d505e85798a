"""How many threads by default: CPUs, quotas and the environment."""

import os

import pytest
from processes import run_python

from cbn import _processors

V2 = "31 23 0:28 / {mount} rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "32 31 0:29 {root} {mount} rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
OTHER = "22 1 0:20 / /proc rw,relatime - proc proc rw\n33 1 0:3 / / rw - ext4 /dev/vda rw\n"


@pytest.fixture
def host(tmp_path):
    """A function that makes what a process sees of its control group, and returns its /proc."""

    def host(cgroup, mountinfo, **files):
        mount, proc = tmp_path / "mount", tmp_path / "proc"
        proc.mkdir()
        (proc / "cgroup").write_text(cgroup)
        (proc / "mountinfo").write_text(OTHER + mountinfo.format(mount=mount, root="/docker/a"))
        for name, text in files.items():
            file = mount / name.replace("__", "/").replace("_DOT_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return proc

    return host


@pytest.mark.parametrize(
    ("text", "quota"),
    [
        ("150000 100000\n", 1.5),
        ("max 100000\n", None),
        ("50000 100000\n", 0.5),
        ("nonsense\n", None),
        ("", None),
        ("1 0\n", None),
    ],
)
def test_version_2(host, text, quota):
    assert _processors.quota(host("0::/\n", V2, cpu_DOT_max=text)) == quota


def test_the_least_of_a_group_and_those_it_is_in(host):
    proc = host(
        "0::/a/b\n", V2, a__b__cpu_DOT_max="400000 100000", a__cpu_DOT_max="250000 100000",
        cpu_DOT_max="max 100000",
    )  # fmt: skip
    assert _processors.quota(proc) == 2.5


@pytest.mark.parametrize("group", ["/docker/a", "/docker/a/b", "/elsewhere"])
def test_version_1_in_a_container(host, group):
    files = {"cpu.cfs_quota_us": "300000\n", "cpu.cfs_period_us": "200000\n"}
    files = {name.replace(".", "_DOT_"): text for name, text in files.items()}
    assert (
        _processors.quota(host(f"5:memory:/x\n4:cpu,cpuacct:{group}\n0::/\n", V1, **files)) == 1.5
    )


def test_another_group_that_is_mounted_sets_no_limit(host):
    """Of a container, seen from outside: only its own processes are bound by its quota."""
    other = "40 31 0:28 /docker/a {mount}/other rw - cgroup2 cgroup2 rw\n"
    proc = host("0::/me\n", V2 + other, other__cpu_DOT_max="50000 100000\n")
    assert _processors.quota(proc) is None


STRANGE_MOUNTS = {
    "not UTF-8": b"/mnt/M\xfcller",
    "a tab of another kind": b"/mnt/a\x0bb",
    "a line of another kind": "/mnt/a\u2028b".encode(),
    "a space": rb"/mnt/a\040b",
    "nothing after it": b"/mnt/a rw\n",
    "nothing": b"",
}


@pytest.mark.parametrize("name", STRANGE_MOUNTS.values(), ids=STRANGE_MOUNTS)
def test_names_of_mounts_harm_nobody(host, name):
    proc = host("0::/\n", V2, cpu_DOT_max="150000 100000\n")
    mountinfo = proc / "mountinfo"
    line = b"22 1 0:20 / %s rw - vfat /dev/sdb1 rw\n" % name
    mountinfo.write_bytes(line + mountinfo.read_bytes() + line)
    assert _processors.quota(proc) == 1.5


@pytest.mark.parametrize("name", [b"a b", b"a\tb", b"a\\b", b"a#b", b"a\xfcb"], ids=repr)
def test_groups_mounted_under_any_name(host, tmp_path, name):
    proc = host("0::/\n", "")
    mount = os.path.join(os.fsencode(tmp_path), name)
    os.mkdir(mount)
    with open(os.path.join(mount, b"cpu.max"), "wb") as file:
        file.write(b"150000 100000\n")
    for escaped in b"\\ \t#":  # as the kernel does it, the backslash first
        mount = mount.replace(bytes([escaped]), b"\\%03o" % escaped)
    (proc / "mountinfo").write_bytes(b"31 23 0:28 / %s rw - cgroup2 cgroup2 rw\n" % mount)
    assert _processors.quota(proc) == 1.5


@pytest.mark.parametrize("line", ["0:/", "", "nonsense"])
def test_a_group_that_is_not_understood_sets_no_limit(host, line):
    assert _processors.quota(host(f"{line}\n", V2, cpu_DOT_max="150000 100000\n")) is None


def test_version_1_without_a_limit(host):
    files = {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}
    files = {name.replace(".", "_DOT_"): text for name, text in files.items()}
    assert _processors.quota(host("4:cpu,cpuacct:/docker/a\n", V1, **files)) is None


def test_no_control_groups(tmp_path):
    assert _processors.quota(tmp_path) is None


def test_a_quota_is_rounded_up(monkeypatch):
    monkeypatch.setattr(_processors, "affinity", lambda: 8)
    monkeypatch.setattr(_processors, "quota", lambda: 1.5)
    assert _processors.available() == (2, "quota of 1.5 CPUs")
    monkeypatch.setattr(_processors, "quota", lambda: 7.5)
    assert _processors.available() == (8, "CPU affinity")


def threads_of(variables, cpus=None):
    """The number of threads, and why, in a process with these variables on so many CPUs."""
    code = "import cbn; c = cbn.show_config('dicts')['threads']; print(c['number'], c['because'])"
    if cpus is not None:
        some = set(sorted(os.sched_getaffinity(0))[:cpus])
        code = f"import os; os.sched_setaffinity(0, {some}); {code}"
    run = run_python("-c", code, without=["OMP_*", "GOMP_*", "CBN_NUM_THREADS"], **variables)
    return run.stdout.strip() or run.stderr


def test_the_environment():
    assert threads_of({"OMP_NUM_THREADS": "5"}) == "5 OMP_NUM_THREADS=5"
    assert threads_of({"OMP_NUM_THREADS": "5,2"}) == "5 OMP_NUM_THREADS=5,2"
    assert threads_of({"OMP_NUM_THREADS": "5", "CBN_NUM_THREADS": "6"}) == "6 CBN_NUM_THREADS=6"
    assert threads_of({"OMP_THREAD_LIMIT": "1"}, 2).startswith("1 ")
    assert threads_of({"OMP_NUM_THREADS": "5", "OMP_THREAD_LIMIT": "3"}) == "3 OMP_NUM_THREADS=5"


@pytest.mark.parametrize("value", ["many", "9" * 5000, "0" * 5000 + "2"], ids=lambda v: v[:4])
def test_a_number_that_is_refused(value):
    error = threads_of({"CBN_NUM_THREADS": value})
    assert "variable CBN_NUM_THREADS: expected a positive integer up to 4096, got" in error


# What OpenMP ignores (and says so), cuts, or would need a machine that nobody has.
@pytest.mark.parametrize(
    "value", ["many", "0", "5,0", "5,", "5 6", "9" * 11, "9" * 30, "9" * 5000, str(2**31 - 1)]
)
def test_a_number_that_openmp_does_not_take(value):
    assert threads_of({"OMP_NUM_THREADS": value}).splitlines()[-1] == threads_of({})


@pytest.mark.parametrize(
    "variable", ["OMP_PROC_BIND=true", "OMP_PLACES=threads", "GOMP_CPU_AFFINITY=0-4095"]
)
def test_a_thread_that_openmp_binds_does_not_bind_the_process(variable):
    name, value = variable.split("=")
    assert threads_of({name: value}) == threads_of({})


def test_places_bind_the_process():
    first = min(os.sched_getaffinity(0))
    assert threads_of({"OMP_PLACES": f"{{{first}}}"}) == "1 CPU affinity"
    both = ",".join(f"{{{cpu}}}" for cpu in [*os.sched_getaffinity(0)] * 2)  # every one twice
    assert threads_of({"OMP_PLACES": both}) == threads_of({})


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_the_affinity():
    assert threads_of({}, cpus=1) == "1 CPU affinity"
