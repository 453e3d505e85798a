"""The one answer to "how many threads"."""

from __future__ import annotations

import os
import re
from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import Any

from cbn import _processors
from cbn._dispatch import kernels
from cbn._docstrings import documented_by
from cbn._scalars import positive_integer

# OpenMP ends the process when it cannot start a thread; no machine has more cores than this.
MOST_THREADS = 4096


def _thread_count(value: Any) -> int:
    count = positive_integer("num_threads", value)
    if count > MOST_THREADS:
        raise ValueError(f"num_threads: expected at most {MOST_THREADS} threads, got {value!r}")
    return count


def _thread_variable(name: str, text: str) -> int:
    # Python converts no more than some thousand digits.
    count = int(text) if text.isascii() and text.isdigit() and len(text) < 100 else 0
    if not 0 < count <= MOST_THREADS:
        raise ValueError(
            f"environment variable {name}: expected a positive integer up to {MOST_THREADS}, "
            f"got {text!r}; correct it or unset it"
        )
    return count


def _default() -> tuple[int, str]:
    """As many as this process may run at once, unless the environment says otherwise."""
    own = os.environ.get("CBN_NUM_THREADS")
    if own is not None:
        return _thread_variable("CBN_NUM_THREADS", own), f"CBN_NUM_THREADS={own}"
    by_openmp = int(kernels.max_threads())
    most = min(by_openmp, int(kernels.thread_limit()))
    general = os.environ.get("OMP_NUM_THREADS", "")
    # A number for each level of nesting. Anything else is ignored by OpenMP, and so here; of a
    # number that is too large it makes another, or takes it and could not start the threads.
    levels = re.fullmatch(r"\s*0*([1-9]\d*)\s*(,\s*0*[1-9]\d*\s*)*", general)
    if levels and levels[1] == str(by_openmp) and by_openmp <= MOST_THREADS:
        return most, f"OMP_NUM_THREADS={general}"
    cpus, why = _processors.available()
    return (cpus, why) if cpus <= most else (most, "OpenMP's maximum")


# Values below which a call keeps to one thread; training counts them twice, backward three times,
# and a pass with one tile to reduce half of them.
# The kernels take it once, at the end of this file.
# It lies between the numbers of two machines: a team of two paid on one from 49,152 to 65,536
# values on in inference, on the other from 131,072 to 196,608 (benchmarks/team_threshold.py).
SERIAL_BELOW = 98_304

_process_wide, _origin = _default()
# The numbers of the ``with`` blocks that this thread or task is in, the innermost last.
_here: ContextVar[tuple[int, ...]] = ContextVar("cbn_num_threads", default=())


def get_num_threads() -> int:
    """Return the number of threads that a call made here may use.

    Returns
    -------
    int
        The innermost ``with num_threads(n)`` of this thread, else the last
        :func:`set_num_threads`, else ``CBN_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the
        CPUs of this process: by affinity, by the quota of its control group (rounded up), and by
        OpenMP's maximum. A call uses fewer where it is small or others are in flight.

    Examples
    --------
    >>> import cbn
    >>> with cbn.num_threads(2):
    ...     cbn.get_num_threads()
    2
    """
    return (_process_wide, *_here.get())[-1]


def process_wide() -> tuple[int, str]:
    """The number of threads outside any ``with`` block, and where it came from."""
    return _process_wide, _origin


class num_threads(ContextDecorator):
    """Use this number of threads within a ``with`` block, in this thread (or task) only.

    An object may be kept and used again, also within its own block and by several threads at once;
    as a decorator it is for every call of a function.

    Parameters
    ----------
    num_threads : int
        At least 1.

    Raises
    ------
    TypeError, ValueError
        If it is not an integer of at least 1.

    Examples
    --------
    >>> import cbn
    >>> with cbn.num_threads(1):
    ...     mean, var, count = cbn.functional.batch_norm_stats([[1.0], [3.0]])
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = _thread_count(num_threads)

    def __enter__(self) -> None:
        # What changes lies in the context, not in the object, which may be in use elsewhere.
        _here.set((*_here.get(), self._num_threads))

    def __exit__(self, *exception: object) -> None:
        _here.set(_here.get()[:-1])


@documented_by(num_threads)
def set_num_threads(num_threads: int) -> int:
    """Set the number of threads of the whole process and return the old one.

    Results do not depend on it: they are the same bit for bit.

    Returns
    -------
    int
        The number set before.

    Examples
    --------
    >>> import cbn
    >>> old = cbn.set_num_threads(1)
    >>> cbn.set_num_threads(old)
    1
    """
    global _process_wide, _origin
    new = _thread_count(num_threads)
    old, _process_wide, _origin = _process_wide, new, "set_num_threads"
    return old


kernels.take_threads_from(get_num_threads, SERIAL_BELOW)
