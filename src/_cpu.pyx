"""The CPU probe: built for the baseline, so that any processor can import it."""

cdef extern from "cpu.h":
    int x86_64_level_of_cpu "x86_64_level"()


def x86_64_level():
    """The x86-64 level of this processor under this operating system: 1, 3 or 4; 0 elsewhere."""
    return x86_64_level_of_cpu()
