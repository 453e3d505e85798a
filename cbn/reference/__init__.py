"""The norms as formulas, in NumPy float64: the specification of :mod:`cbn.functional`.

Nothing here is fast and nothing is clever. Every function computes in float64 whatever it is
given (in long double if it is given that), returns what it computed in, and reads as the equations
of its paper. Batch norm: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network
Training by Reducing Internal Covariate Shift" (2015), algorithm 1 for the forward pass, section 3
for the gradients. The others, whose papers are named in :mod:`cbn.functional`, are one formula over
other axes. The tests hold the kernels to it.
"""

from cbn.reference._batch_norm import batch_norm, batch_norm_backward, batch_norm_stats
from cbn.reference._groups import (
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
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
