"""The warning of a momentum with which running statistics leave the range of the data."""

import copy
import re

import pytest

import cbn

LAYERS = pytest.mark.parametrize(
    "layer", [cbn.BatchNorm1d, cbn.BatchNorm2d, cbn.InstanceNorm1d, cbn.InstanceNorm3d]
)


def text(momentum):
    return (
        f"momentum: expected a number from 0 to 1, the weight of the new batch, got {momentum:g}; "
        "momentum=0.1 is what Keras and ONNX call 0.9"
    )


@LAYERS
@pytest.mark.parametrize("momentum", [-0.5, 1.5])
def test_a_layer_warns_when_it_is_made_and_takes_it(layer, momentum, tmp_path):
    with pytest.warns(UserWarning, match=f"^{re.escape(text(momentum))}$") as caught:
        norm = layer(2, momentum=momentum)
    assert [warning.filename for warning in caught] == [__file__]
    assert copy.copy(norm).momentum == momentum
    norm.save(tmp_path / "layer")  # pytest makes warnings errors
    cbn.save([norm], tmp_path / "model")
    cbn.load([norm], tmp_path / "model")
    with pytest.warns(UserWarning, match="^momentum: expected") as caught:
        assert layer.load(tmp_path / "layer").momentum == momentum
    assert len(caught) == 1


@LAYERS
@pytest.mark.parametrize("momentum", [0, 0.5, 1, None])
def test_others_do_not_warn(layer, momentum):
    assert layer(2, momentum=momentum).momentum == momentum
