"""The norms as functions, which keep no state."""

from cbn.functional._batch_norm import batch_norm, batch_norm_backward, batch_norm_stats
from cbn.functional._group_norm import group_norm, group_norm_backward
from cbn.functional._instance_norm import instance_norm, instance_norm_backward
from cbn.functional._layer_norm import (
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_stats",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
]
