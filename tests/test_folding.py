"""Folding: a convolution or linear layer that does what it and its BatchNorm did."""

import numpy as np
import pytest
from refusals import refused

import cbn

DTYPE = pytest.mark.parametrize("dtype", ["float32", "float64"])
BIAS = pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"bias": False}, {"eps": 0.5}], ids=str
)
BATCH_NORMS = {1: cbn.BatchNorm1d, 2: cbn.BatchNorm2d, 3: cbn.BatchNorm3d}


def batch_norm(rng, C, axes=2, dtype="float32", **options):
    """A layer in eval mode with random parameters and statistics."""
    bn = BATCH_NORMS[axes](
        C,
        running_mean=rng.normal(0, 2, C),
        running_var=rng.uniform(0.1, 3, C),
        dtype=dtype,
        **options,
    )
    for parameter in (bn.weight, bn.bias):
        if parameter is not None:
            parameter[:] = rng.normal(0, 2, C)
    return bn.eval()


def constants(bn):
    """Scale and shift of each channel, in float64."""
    mean, var = bn.running_mean.astype(float), bn.running_var.astype(float)
    scale = (1 if bn.weight is None else bn.weight.astype(float)) / np.sqrt(var + bn.eps)
    return scale, (0 if bn.bias is None else bn.bias) - mean * scale


def parameters(rng, shape, C, with_bias, dtype):
    weight = rng.normal(size=shape).astype(dtype)
    return weight, rng.normal(size=C).astype(dtype) if with_bias else None


# The result is rounded once: half a unit in the last place of float32. In float64, where the
# formula itself is computed, a few units of what the bias is summed from.
CLOSE = {"float32": {"rtol": 6e-8, "atol": 1e-15}, "float64": {"rtol": 1e-14, "atol": 1e-14}}


@DTYPE
@BIAS
@OPTIONS
def test_linear(with_bias, options, dtype, rng):
    bn = batch_norm(rng, 4, axes=1, dtype=dtype, **options)
    weight, bias = parameters(rng, (4, 6), 4, with_bias, dtype)
    new_weight, new_bias = cbn.fold_linear(weight, bias, bn)
    scale, shift = constants(bn)
    assert (new_weight.dtype, new_bias.dtype) == (dtype, dtype)
    np.testing.assert_allclose(new_weight, weight * scale[:, None], **CLOSE[dtype])
    old = 0 if bias is None else bias.astype(float)
    np.testing.assert_allclose(new_bias, old * scale + shift, **CLOSE[dtype])


@BIAS
@OPTIONS
def test_linear_does_the_same(with_bias, options, rng, assert_close):
    bn = batch_norm(rng, 4, axes=1, dtype="float64", **options)
    weight, bias = parameters(rng, (4, 6), 4, with_bias, "float64")
    x = rng.normal(size=(9, 6))
    expected = bn(x @ weight.T + (0 if bias is None else bias))
    new_weight, new_bias = cbn.fold_linear(weight, bias, bn)
    assert_close("y", x @ new_weight.T + new_bias, expected, "float64")


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@BIAS
def test_convolution_does_the_same(torch, axes, transposed, groups, with_bias, rng, assert_close):
    inputs, outputs = 8, 12
    name = f"conv{'_transpose' if transposed else ''}{axes}d"
    first = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
    weight, bias = parameters(rng, first + (3, 2, 3)[:axes], outputs, with_bias, "float64")
    bn = batch_norm(rng, outputs, axes, "float64")
    x = torch.tensor(rng.normal(size=(2, inputs, *(5, 4, 6)[:axes])))

    def convolve(weight, bias):
        tensors = [None if array is None else torch.tensor(array) for array in (weight, bias)]
        return getattr(torch.nn.functional, name)(x, *tensors, stride=2, groups=groups).numpy()

    expected = bn(convolve(weight, bias))
    actual = convolve(*cbn.fold_conv(weight, bias, bn, transposed))
    assert_close("y", actual, expected, "float64")


@DTYPE
@BIAS
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_as_torch_fuses_convolutions(torch, transposed, with_bias, dtype, rng):
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    bn = batch_norm(rng, 4, dtype=dtype)
    weight, bias = parameters(
        rng, (6, 4, 3, 3) if transposed else (4, 6, 3, 3), 4, with_bias, dtype
    )
    tensor = torch.tensor
    expected = fuse_conv_bn_weights(
        tensor(weight).double(),
        None if bias is None else tensor(bias).double(),
        tensor(bn.running_mean).double(),
        tensor(bn.running_var).double(),
        bn.eps,
        tensor(bn.weight).double(),
        tensor(bn.bias).double(),
        transpose=transposed,
    )
    for ours, theirs in zip(cbn.fold_conv(weight, bias, bn, transposed), expected, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), **CLOSE[dtype])


@BIAS
def test_as_torch_fuses_linear_layers(torch, with_bias, rng):
    from torch.nn.utils.fusion import fuse_linear_bn_weights

    bn = batch_norm(rng, 4, axes=1, dtype="float64")
    weight, bias = parameters(rng, (4, 6), 4, with_bias, "float64")
    expected = fuse_linear_bn_weights(
        torch.tensor(weight),
        None if bias is None else torch.tensor(bias),
        torch.tensor(bn.running_mean),
        torch.tensor(bn.running_var),
        bn.eps,
        torch.tensor(bn.weight),
        torch.tensor(bn.bias),
    )
    for ours, theirs in zip(cbn.fold_linear(weight, bias, bn), expected, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), **CLOSE["float64"])


def test_rounded_once(rng):
    """The nearest float32 to the exact value, where float32 throughout would be off."""
    bn = batch_norm(rng, 200)
    weight, bias = parameters(rng, (200, 3, 3, 3), 200, True, "float32")
    scale, _ = constants(bn)
    new_weight, new_bias = cbn.fold_conv(weight, bias, bn)
    np.testing.assert_array_equal(new_weight, (weight * scale[:, None, None, None]).astype("f4"))
    exact = (bias.astype(float) - bn.running_mean) * scale + bn.bias
    np.testing.assert_array_equal(new_bias, exact.astype("f4"))


def test_the_dtype_is_that_of_the_weight(rng):
    weight, bias = cbn.fold_linear(
        np.ones((4, 6), np.float32), np.ones(4), batch_norm(rng, 4, dtype="float64")
    )
    assert (weight.dtype, bias.dtype) == ("float32", "float32")


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_the_originals_stay_as_they_are(transposed, rng):
    """Nor do the new arrays share their memory, also where folding changes nothing."""
    bn = cbn.BatchNorm2d(4, eps=0).eval()
    weight, bias = parameters(rng, (4, 4, 1, 1), 4, True, "float32")
    arrays = [weight, bias, *bn.state_dict().values()]
    before = [array.copy() for array in arrays]
    folded = cbn.fold_conv(weight, bias, bn, transposed)
    assert not any(np.shares_memory(new, old) for new in folded for old in arrays)
    for new in folded:
        new[...] = 99
    np.testing.assert_equal(arrays, before)
    np.testing.assert_equal(bn.state_dict(), cbn.BatchNorm2d(4, eps=0).state_dict())


def test_any_layout_and_lists(rng):
    bn = batch_norm(rng, 4)
    weight, bias = parameters(rng, (4, 6, 3, 3), 4, True, "float64")
    expected = cbn.fold_conv(weight, bias, bn)
    turned = np.asfortranarray(weight)[:, ::-1][:, ::-1].astype(">f8")
    for given in (turned, weight.tolist()):
        for one, other in zip(cbn.fold_conv(given, bias.tolist(), bn), expected, strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == np.float64


# ---------------------------------------------------------------------------------------- refusals

CONV = np.ones((3, 2, 1, 1), np.float32)
EVAL = cbn.BatchNorm2d(3).eval()
FROZEN = cbn.freeze(cbn.BatchNorm2d(3))
UNTRACKED = cbn.BatchNorm2d(3, track_running_stats=False).eval()
TRAINING = (
    "bn: expected a layer in eval mode, whose statistics are constants, got one in training mode; "
    "call bn.eval() first"
)
GROUPS = (
    "weight: expected a number of groups that makes the 3 channels of bn of {} outputs each and "
    "divides the {} inputs, got none for shape {}"
)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((CONV, None, cbn.BatchNorm2d(3)), ValueError, TRAINING),
        ((CONV, None, FROZEN), ValueError, TRAINING),
        (
            (CONV, None, UNTRACKED),
            ValueError,
            "bn: expected a layer with running statistics, got one that normalises by the "
            "statistics of each batch, which no weight can take in",
        ),
        (
            (CONV, None, {"weight": 1}),
            TypeError,
            "bn: expected one of BatchNorm1d, BatchNorm2d, BatchNorm3d, got dict",
        ),
        (
            (CONV[:2], None, EVAL),
            ValueError,
            "weight: expected 3 output channels, as bn has, got 2 in shape (2, 2, 1, 1)",
        ),
        (
            (np.ones((1, 1, 2, 3), np.float32), None, EVAL),
            ValueError,
            "weight: expected 3 output channels, as bn has, got 1 in shape (1, 1, 2, 3); if it is "
            "(*kernel, in, out), as in Keras and Flax, give numpy.moveaxis(weight, (-1, -2), "
            "(0, 1))",
        ),
        (
            (CONV[:, :, 0, 0], None, EVAL),
            ValueError,
            "weight: expected shape (out, in / groups, *kernel), got (3, 2)",
        ),
        (
            (CONV[:, :, 0, 0], None, EVAL, True),
            ValueError,
            "weight: expected shape (in, out / groups, *kernel), got (3, 2)",
        ),
        ((CONV, None, EVAL, True), ValueError, GROUPS.format(2, 3, CONV.shape)),
        ((CONV[:, :0], None, EVAL, True), ValueError, GROUPS.format(0, 3, (3, 0, 1, 1))),
        ((CONV[:2, :1], None, EVAL, True), ValueError, GROUPS.format(1, 2, (2, 1, 1, 1))),
        ((CONV, None, EVAL, 1), TypeError, "transposed: expected True or False, got 1"),
        (
            (CONV, np.ones(2), EVAL),
            ValueError,
            "bias: expected shape (3,), one value per channel, got (2,)",
        ),
        (
            (CONV.astype(int), None, EVAL),
            TypeError,
            "weight: expected float32 or float64, got int64; convert it first, for example with "
            "weight.astype(numpy.float32)",
        ),
        (
            (None, None, EVAL),
            TypeError,
            "weight: expected an array of float32 or float64, got None",
        ),
    ],
)
def test_refused(arguments, error, text):
    with refused(text, error):
        cbn.fold_conv(*arguments)


UNFOLDED = (
    "bn: expected a finite weight and bias of every channel after folding, got NaN, infinity or "
    "more than the dtype of weight can hold in 1 of them (2); all arrays must be finite, and the "
    "scale and shift of bn within that dtype"
)


@pytest.mark.parametrize(
    ("attributes", "weight", "bias"),
    [
        ({"running_var": np.nan}, 1, None),
        ({"running_mean": np.inf}, 1, None),
        ({"running_var": 1e-30, "running_mean": 1e30}, 0, None),  # more than float32 in the bias
        ({"running_var": 1e-30}, 1e25, None),  # and in the weight
        ({}, np.nan, None),
        ({}, 1, np.inf),
    ],
    ids=str,
)
def test_what_would_not_be_finite(attributes, weight, bias):
    bn = cbn.BatchNorm2d(4, eps=0).eval()
    for name, value in attributes.items():
        getattr(bn, name)[2] = value
    bias = None if bias is None else np.array([0, 0, bias, 0])
    conv, transposed = np.ones((4, 1, 2), np.float32), np.ones((4, 2, 1), np.float32)
    conv[2, 0, 1] = weight
    transposed[3, 0] = weight  # the first output of the second group
    for arguments in ((conv, bias, bn), (transposed, bias, bn, True)):
        with refused(UNFOLDED):
            cbn.fold_conv(*arguments)
    with refused(UNFOLDED):
        cbn.fold_linear(conv[:, 0], bias, bn)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((CONV, None, EVAL), ValueError, "weight: expected shape (out, in), got (3, 2, 1, 1)"),
        (
            (CONV[1:, :, 0, 0], None, EVAL),
            ValueError,
            "weight: expected 3 output channels, as bn has, got 2 in shape (2, 2)",
        ),
        (
            (CONV[:, :, 0, 0].T, None, EVAL),
            ValueError,
            "weight: expected 3 output channels, as bn has, got 2 in shape (2, 3); if it is "
            "(in, out), as in Keras and Flax, transpose it: give weight.T",
        ),
        (
            (CONV[:, :, 0, 0], None, cbn.BatchNorm1d(1).eval()),
            ValueError,
            "weight: expected 1 output channel, as bn has, got 3 in shape (3, 2); if its one "
            "channel is meant for all outputs, repeat the norm: give one of 3 channels with the "
            "arrays of bn repeated",
        ),
        ((CONV[:, :, 0, 0], None, cbn.BatchNorm1d(3)), ValueError, TRAINING),
        (
            (CONV[:, :, 0, 0], None, 1),
            TypeError,
            "bn: expected one of BatchNorm1d, BatchNorm2d, BatchNorm3d, got int",
        ),
    ],
)
def test_linear_refused(arguments, error, text):
    with refused(text, error):
        cbn.fold_linear(*arguments)
