"""Python in a process of its own, for tests of imports, environments, forks and threads."""

import os
import subprocess
import sys
from fnmatch import fnmatch

# What a script begins with that asks for teams of threads: it gets them, however busy the machine.
TEAMS = """
import os
import cbn

cbn._dispatch.kernels.calls().judges = False


def count_threads():
    return len(os.listdir("/proc/self/task"))


"""


def run_python(*arguments, without=(), cwd=None, timeout=None, **variables):
    """Run Python with such variables in its environment, and without those of these patterns."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not any(fnmatch(name, pattern) for pattern in without)
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=inherited | variables,
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )


def printed_by(code, *arguments, **options):
    """What a script prints, which must end well; the folder that it runs in lends no modules."""
    done = run_python("-P", "-c", code, *arguments, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
