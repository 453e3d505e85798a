"""The limit: the same arrays read and written once, with nothing but a multiplication between.

scale_copy.c is compiled when a benchmark starts, for the instruction set that cbn uses.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from shapes import Array, Case, Data

SOURCE = Path(__file__).with_name("scale_copy.c")
FLAGS = {
    "x86_64_v4": ["-march=x86-64-v4"],
    "x86_64_v3": ["-march=x86-64-v3"],
    "baseline": [],
}
STREAMING, ORDINARY = "limit, streaming stores", "limit, ordinary stores"


class Limit:
    """Scale-copies of the arrays of a case.

    Parameters
    ----------
    isa : str
        The instruction set, in cbn's words.

    Raises
    ------
    FileNotFoundError
        If there is no gcc.
    subprocess.CalledProcessError
        If it cannot compile.
    """

    def __init__(self, isa: str) -> None:
        compiler = shutil.which("gcc")
        if compiler is None:
            raise FileNotFoundError("gcc")
        self.flags = ["-O3", *FLAGS[isa], "-fopenmp"]
        with tempfile.TemporaryDirectory() as folder:
            library = str(Path(folder, "scale_copy.so"))
            command = [compiler, *self.flags, "-shared", "-fPIC", str(SOURCE), "-o", library]
            subprocess.run(command, check=True, capture_output=True, text=True)
            self._scale_copy = ctypes.CDLL(library).scale_copy
        integer = ctypes.c_int
        self._scale_copy.argtypes = (
            *(ctypes.c_void_p for _ in ("out", "x", "other")),
            ctypes.c_size_t,
            ctypes.c_float,
            integer,
            integer,
        )
        self._scale_copy.restype = None

    def calls(self, case: Case, data: Data, threads: int) -> dict[str, Callable[[], object]]:
        """Return a copy with streaming stores and one with ordinary ones: the faster is the limit.

        A backward pass, and one with a residual, is held to a copy that adds two inputs; to a pass
        that writes two arrays there is none. A thread gets 64 KiB at least: for
        less its start takes longer than its work.
        """
        if case.has_residual and case.pass_ == "backward":
            return {}
        threads = min(threads, max(1, case.values >> 14))
        inputs = (data.x, data.residual if case.has_residual else data.grad_output)
        x, second = (as_float32(array) for array in inputs)
        out = np.empty_like(x)
        other = second if case.has_residual or case.pass_ == "backward" else None
        expected = (x if other is None else x + other) * np.float32(0.5)

        def call(stream: bool) -> Callable[[], object]:
            arguments = (*map(pointer, (out, x, other)), x.size, 0.5, stream, threads)

            def run() -> None:
                self._scale_copy(*arguments)

            run()
            assert np.array_equal(out, expected), "scale_copy.c is wrong"
            return run

        return {STREAMING: call(True), ORDINARY: call(False)}


def as_float32(array: Array) -> Array:
    """An array of as many bytes: of half types, half as many values, and other ones."""
    if array.dtype == np.float32:
        return array
    return np.resize(array.astype(np.float32), (array.size + 1) // 2)


def pointer(array: Array | None) -> ctypes.c_void_p | None:
    """The address of an array, which this kind of pointer keeps alive; None stays."""
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)
