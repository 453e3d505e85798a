"""cbn: fast, accurate, reproducible batch normalisation of NumPy arrays on the CPU."""

from cbn import functional
from cbn._checks import StateFileError
from cbn._threads import get_num_threads, num_threads, set_num_threads
from cbn.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "StateFileError",
    "functional",
    "get_num_threads",
    "num_threads",
    "set_num_threads",
]
