"""Steps that go along with a norm: the bits of one step after the other, forward and backward."""

from functools import partial

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from norm_kinds import kinds
from norms_table import pickled
from refusals import check_refused, refused

import cbn
from cbn import _dispatch, functional, reference

ISAS = pytest.mark.parametrize("isa", _dispatch.supported())
STEPS = pytest.mark.parametrize(
    ("activation", "has_residual"),
    [("relu", False), ("relu", True), (None, True)],
    ids=["relu", "residual-relu", "residual"],
)
KINDS = pytest.mark.parametrize(
    "kind",
    kinds(  # by row, wide rows, by plane, short planes, pieces, parts of channels, by value
        batches=[(30, 64), (9, 1100), (4, 6, 5, 5), (2, 3, 40, 40), (1, 2, 70000)],
        groups=[((3, 16, 7, 7), 4), ((5, 12), 3), ((2, 8, 600), 2)],
        instances=[(2, 3, 50), (3, 40, 7)],
    ),
    ids=str,
)


def separate(y, activation, residual):
    """Return what the steps make of y, and the gradient that they let through, as a function."""
    y = y if residual is None else y + residual
    stopped = np.less_equal(y, 0) if activation else np.zeros(y.shape, bool)
    return (np.maximum(y, 0) if activation else y), lambda grad: np.where(stopped, 0, grad)


def same(one, other):
    return one is other is None or one.tobytes() == other.tobytes()


def check(kind, x, residual, grad_output, activation, training=True, **given):
    """Compare a layer with steps and one without, to the bit."""
    options = {"affine": True, "dtype": np.float64 if x.dtype == np.float64 else np.float32}
    if kind.norm.learns:
        options["track_running_stats"] = True
    plain = kind.layer(**options).train(training)
    plain.weight[...] = np.linspace(-1, 2, plain.weight.size).reshape(plain.weight.shape)
    plain.bias[...] = np.linspace(1, -1, plain.bias.size).reshape(plain.bias.shape)
    fused = pickled(plain)
    fused.activation = activation
    y, let_through = separate(plain(x), activation, residual)
    assert same(fused(x, residual=residual, **given), y)
    grad_output = let_through(grad_output).astype(x.dtype), grad_output
    for wanted in ("all", "input", "parameters"):
        right, found = (
            (layer.backward(grad, wanted=wanted), layer.weight_grad, layer.bias_grad)
            for layer, grad in zip((plain, fused), grad_output, strict=True)
        )
        assert all(map(same, found, right))
        of_residual = residual is not None and wanted != "parameters"
        assert same(fused.residual_grad, grad_output[0] if of_residual else None)


@KINDS
@STEPS
@ISAS
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ml_dtypes.bfloat16])
def test_layer(rng, kind, activation, has_residual, isa, threads, dtype, use_isa):
    use_isa(isa)
    x, residual, grad_output = rng.normal(0, 2, (3, *kind.shape)).astype(dtype)
    with cbn.num_threads(threads):
        check(kind, x, residual if has_residual else None, grad_output, activation)


@pytest.mark.parametrize("kind", kinds(batches=[(30, 64), (4, 6, 5, 5)], instances=[(2, 3, 50)]))
@STEPS
def test_layer_by_running_statistics(rng, kind, activation, has_residual):
    x, residual, grad_output = rng.normal(0, 2, (3, *kind.shape)).astype(np.float32)
    check(kind, x, residual if has_residual else None, grad_output, activation, training=False)


@pytest.mark.parametrize("threads", [1, 2])
def test_array_beyond_the_cache(rng, threads):
    shapes = (3, 64, 150, 151), (70, 260, 11, 13)
    for kind in kinds(batches=shapes, groups=[(shapes[0], 4)]):
        x, residual, grad_output = rng.standard_normal((3, *kind.shape), np.float32)
        with cbn.num_threads(threads):
            check(kind, x, residual, grad_output, "relu")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("offset", [0, 3, 12])
def test_the_gradient_of_a_large_residual_lies_as_that_of_the_input(offset, dtype):
    """Within cache lines, because only then both are streamed."""
    x = np.ones((1 << 13, 1 << 9), dtype)
    layer = cbn.BatchNorm1d(x.shape[1], activation="relu", dtype=np.float32)
    layer(x, residual=x)
    out = np.empty(x.size + offset, dtype)[offset:].reshape(x.shape)
    layer.backward(x, out=out)
    assert layer.residual_grad.ctypes.data % 64 == out.ctypes.data % 64
    assert layer.residual_grad.shape == x.shape
    assert layer.residual_grad.dtype == x.dtype


@ISAS
@pytest.mark.parametrize("length", range(1, 131))
def test_tails_of_every_length(rng, isa, length, use_isa):
    use_isa(isa)
    for kind in kinds(batches=[(4, 3, length), (5, length)], groups=[((2, 2 * length), 2)]):
        x, residual, grad_output = rng.standard_normal((3, *kind.shape), np.float32)
        check(kind, x, residual, grad_output, "relu")


@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    last=st.booleans(),
    activation=st.sampled_from([None, "relu"]),
    seed=st.integers(0, 99),
)
def test_function(shape, last, activation, seed):
    shape[0] += 1  # so that every channel has two values
    axis = -1 if last else 1
    x, residual, grad_output = np.random.default_rng(seed).standard_normal((3, *shape))
    y, let_through = separate(
        functional.batch_norm(x, None, None, training=True, channel_axis=axis), activation, residual
    )
    options = {"training": True, "channel_axis": axis}
    steps = {"activation": activation, "residual": residual}
    assert same(functional.batch_norm(x, None, None, **options, **steps), y)
    found, saved = functional.batch_norm_forward(x, None, None, **options, **steps)
    assert same(found, y)
    _, without = functional.batch_norm_forward(x, None, None, **options)
    right = functional.norm_backward(let_through(grad_output), without)
    *gradients, of_residual = functional.norm_backward(grad_output, saved)
    assert all(map(same, gradients, right))
    assert same(of_residual, let_through(grad_output))


def test_the_formula(rng, assert_close):
    x, residual = rng.standard_normal((2, 4, 6, 5, 5), np.float32)
    exact = np.maximum(reference.group_norm(x, 2) + residual, 0)
    y = functional.group_norm(x, 2, activation="relu", residual=residual)
    assert_close("y", y, exact, np.float32)


def test_as_torch(rng, torch, assert_close):
    x, residual, grad_output = rng.standard_normal((3, 4, 6, 5, 5), np.float32)
    ours, theirs = cbn.BatchNorm2d(6, activation="relu"), torch.nn.BatchNorm2d(6)
    inputs = [torch.tensor(array, requires_grad=True) for array in (x, residual)]
    y = torch.relu(theirs(inputs[0]) + inputs[1])
    y.backward(torch.from_numpy(grad_output))
    assert_close("y", ours(x, residual=residual), y.detach().numpy(), np.float32)
    assert_close("grad_input", ours.backward(grad_output), inputs[0].grad.numpy(), np.float32)
    assert_close("residual_grad", ours.residual_grad, inputs[1].grad.numpy(), np.float32)
    assert_close("weight_grad", ours.weight_grad, theirs.weight.grad.numpy(), np.float32)


# ------------------------------------------------------------------------------------- the memory


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("place", ["x", "residual"])
def test_output_over_an_input(rng, axis, place):
    x, residual = rng.standard_normal((2, 4, 6, 5, 6), np.float32)
    bn = cbn.BatchNorm2d(6, activation="relu", channel_axis=axis)
    y = bn(x, residual=residual)
    arrays = {"x": x.copy(), "residual": residual.copy()}
    assert same(bn(**arrays, out=arrays[place]), y)
    if place == "residual":
        bn.backward(x)


def test_residual_is_the_input(rng):
    x = rng.standard_normal((4, 6), np.float32)
    bn = cbn.BatchNorm1d(6, activation="relu")
    assert same(bn(x, residual=x), bn(x, residual=x.copy()))


def test_residual_in_another_layout(rng):
    x, residual = rng.standard_normal((2, 4, 6, 5, 5), np.float32)
    bn = cbn.BatchNorm2d(6, activation="relu")
    y = bn(x, residual=residual)
    assert same(bn(x, residual=np.asfortranarray(residual)), y)
    out = np.asfortranarray(residual)
    assert bn(x, residual=out, out=out) is out
    assert np.array_equal(out, y)


def test_what_happens_afterwards_does_not_matter(rng):
    """Backward goes by what the activation let through, not by arrays of the caller."""
    x, residual, grad_output = rng.standard_normal((3, 4, 6, 5, 5), np.float32)
    bn = cbn.BatchNorm2d(6, activation="relu")
    y = bn(x, residual=residual)
    right = bn.backward(grad_output).copy()
    y[...], residual[...], bn.bias[...] = -1, -100, -100
    assert same(bn.backward(grad_output), right)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_special_values(dtype):
    y = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1, -1, 1e-45, -1e-45] * 5, dtype)
    x, ones = np.zeros((1, 1, y.size), dtype), np.ones(1, dtype)
    found, saved = functional.batch_norm_forward(
        x, 0 * ones, ones - 1e-5, activation="relu", residual=y.reshape(x.shape)
    )
    assert same(found.ravel(), np.maximum(y, 0))
    *_, of_residual = functional.norm_backward(np.ones_like(x), saved)
    assert of_residual.ravel().tolist() == [float(not value <= 0) for value in y]


# ----------------------------------------------------------------------------------- the layer


def test_repr_and_pickle():
    bn = cbn.BatchNorm2d(3, activation="relu")
    assert "activation='relu'" in repr(bn)
    assert pickled(bn).activation == "relu"
    assert "activation" not in repr(cbn.BatchNorm2d(3))


@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm1d", "GroupNorm"])
def test_state_file(tmp_path, name):
    cls = getattr(cbn, name)
    path = tmp_path / "norm.npz"
    cls(**cls._smallest, activation="relu").save(path)
    assert cls.load(path).activation == "relu"


@pytest.mark.parametrize("length", [513, 514, 575])
def test_bits_are_read_within_their_array(length, rng):
    """A row of LANES values is read by whole vectors, each with its bits in four bytes."""
    x = rng.standard_normal((7, 9, length), np.float32)
    _, saved = functional.batch_norm_forward(x, None, None, training=True, activation="relu")
    last_vector = x.size - length % 64 + 62
    assert saved.passed.nbytes >= last_vector // 8 + 4


def test_a_pickle_keeps_nothing_as_large_as_the_data(rng):
    x = rng.standard_normal((4, 6), np.float32)
    bn = cbn.BatchNorm1d(6)
    bn(x, residual=x)
    bn.backward(x)
    assert bn.residual_grad is not None
    assert pickled(bn).residual_grad is None


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("residual", "error", "text"),
    [
        (
            np.zeros((4, 3), np.float32),
            ValueError,
            "residual: expected shape (4, 6), that of x, got (4, 3)",
        ),
        (
            np.zeros((4, 6)),
            TypeError,
            "residual: expected float32, got float64; convert it with "
            "residual.astype(numpy.float32), or use float64 throughout",
        ),
    ],
    ids=["shape", "dtype"],
)
@pytest.mark.parametrize("training", [True, False])
def test_bad_residual(residual, error, text, training):
    bn = cbn.BatchNorm1d(6).train(training)
    x, out = np.ones((2, 4, 6), np.float32)

    def call(x, out, residual):
        bn(x, out, residual=residual)

    state = {name: array.tobytes() for name, array in bn.state_dict().items()}
    check_refused(partial(call, x, out, residual), error, text)
    assert {name: array.tobytes() for name, array in bn.state_dict().items()} == state


def test_output_that_overlaps_the_residual_in_part():
    memory = np.zeros(30, np.float32)
    x, residual, out = np.ones((4, 6), np.float32), memory[:24], memory[6:]
    text = "out: expected memory apart from residual, or residual itself, got a partial overlap "
    with pytest.raises(ValueError, match=text):
        cbn.BatchNorm1d(6)(x, residual=residual.reshape(4, 6), out=out.reshape(4, 6))


def test_bad_activation_of_an_attribute():
    bn = cbn.BatchNorm1d(6)
    bn.activation = "gelu"
    with refused("activation: expected one of (None, 'relu'), got 'gelu'"):
        bn(np.ones((4, 6), np.float32))


def test_folding_refuses_an_activation():
    bn = cbn.BatchNorm1d(2, activation="relu").eval()
    with refused(
        "bn: expected a layer without an activation, which no weight can take in, got "
        "activation='relu'; set bn.activation to None, and apply it to the output of the folded "
        "layer: numpy.maximum(y, 0, out=y)"
    ):
        cbn.fold_linear(np.ones((2, 3)), None, bn)
