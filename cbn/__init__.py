"""cbn: fast, accurate, reproducible normalisation of NumPy arrays on the CPU."""

from typing import TYPE_CHECKING

from cbn import functional
from cbn._show_config import show_config
from cbn._threads import get_num_threads, num_threads, set_num_threads
from cbn._version import __version__ as __version__
from cbn.calibration import recalibrate, reinitialize_norm_stats
from cbn.exceptions import SmallBatchWarning, StateFileError
from cbn.folding import fold_conv, fold_linear
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
from cbn.model import (
    freeze,
    load,
    load_state_dict,
    named_norm_layers,
    reset_norm_stats,
    save,
    state_dict,
    unfreeze,
)

if TYPE_CHECKING:
    from cbn import reference
else:  # a type checker would take this for a promise of any name

    def __getattr__(name: str) -> object:
        # Only those who compare need the formulas, which take a tenth of the time that the rest of
        # cbn takes to import.
        if name == "reference":
            from importlib import import_module

            return import_module("cbn.reference")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), "reference"})


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
    "fold_conv",
    "fold_linear",
    "freeze",
    "functional",
    "get_num_threads",
    "load",
    "load_state_dict",
    "named_norm_layers",
    "num_threads",
    "recalibrate",
    "reference",
    "reinitialize_norm_stats",
    "reset_norm_stats",
    "save",
    "set_num_threads",
    "show_config",
    "state_dict",
    "unfreeze",
]
