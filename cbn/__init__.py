"""cbn: fast, accurate, reproducible normalisation of NumPy arrays on the CPU."""

from cbn import functional
from cbn._checks import SmallBatchWarning, StateFileError
from cbn._config import show_config
from cbn._threads import get_num_threads, num_threads, set_num_threads
from cbn._version import __version__ as __version__
from cbn.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
)

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "SmallBatchWarning",
    "StateFileError",
    "functional",
    "get_num_threads",
    "num_threads",
    "set_num_threads",
    "show_config",
]
