"""The layers: parameters, statistics, modes and state. No arithmetic on data."""

from cbn._state_dict import IncompatibleKeys
from cbn.layers._base import NormLayer
from cbn.layers._batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from cbn.layers._channel_norm import ChannelNorm
from cbn.layers._group_norm import GroupNorm
from cbn.layers._instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from cbn.layers._layer_norm import LayerNorm, RMSNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ChannelNorm",
    "GroupNorm",
    "IncompatibleKeys",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "NormLayer",
    "RMSNorm",
]
