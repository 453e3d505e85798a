"""Instance, group, layer and RMS norm against the float64 reference: every way they are walked."""

from itertools import product
from math import prod

import hard
import numpy as np
import pytest

import cbn
from cbn import _dispatch, _threads, functional, reference

DTYPE = pytest.mark.parametrize("dtype", ["float32", "float64"])
LAYOUT = pytest.mark.parametrize("channel_axis", [1, -1], ids=["first", "last"])

# Rows and their lengths: of one piece and of several, by row and by plane, few and many.
ROWS = [(1, 1), (1, 5), (3, 7), (7, 16), (5, 17), (64, 64), (33, 100), (17, 768), (9, 1024)]
ROWS += [(3, 5000), (200, 31), (2, 70_001), (40, 4096), (130, 1500)]
# (N, C, S), and the number of groups.
GROUPS = [((2, 4, 3), 2), ((3, 6, 1), 3), ((5, 8, 16), 4), ((4, 32, 49), 8), ((2, 64, 196), 32)]
GROUPS += [((9, 64, 1), 32), ((2, 6, 5000), 1), ((70, 12, 1), 3), ((1, 8, 30_000), 2)]
GROUPS += [((33, 128, 4), 2), ((3, 10, 7), 10), ((2, 4, 600), 4), ((2, 2048, 3), 1)]
GROUPS += [((3, 1200, 2), 2), ((2, 120, 5), 3), ((4, 10, 3), 2), ((2, 600, 100), 1)]
GROUPS += [((5, 1024, 300), 1), ((1, 6, 70_001), 3)]
# (N, C, S)
INSTANCES = [(2, 3, 5), (4, 64, 49), (2, 16, 700), (3, 5, 3000), (20, 7, 20), (2, 2000, 9)]
INSTANCES += [(1, 2, 70_001)]


def kinds(rows=ROWS, groups=GROUPS, instances=INSTANCES):
    """The name of the function, its options, the shape of x and that of its weight."""
    for (R, D), name in product(rows, ("layer_norm", "rms_norm")):
        yield name, {"normalized_shape": (D,)}, (R, D), (D,)
    for axis, name in ((1, "first"), (-1, "last")):
        for (N, C, S), num_groups in groups:
            shape = (N, C, S) if name == "first" else (N, S, C)
            yield "group_norm", {"num_groups": num_groups, "channel_axis": axis}, shape, (C,)
        for N, C, S in instances:
            shape = (N, C, S) if name == "first" else (N, S, C)
            yield "instance_norm", {"channel_axis": axis}, shape, (C,)


def named(kind):
    name, options, shape, _ = kind
    return f"{name}-{'x'.join(map(str, shape))}-{'-'.join(map(str, options.values()))}"


# One or two of each way.
SOME_KINDS = list(
    kinds(
        rows=[(7, 16), (64, 64), (17, 768), (2, 20_001), (130, 301)],
        groups=[((3, 6, 1), 3), ((4, 32, 49), 8), ((2, 2048, 3), 1), ((2, 120, 50), 3)],
        instances=[(4, 64, 49), (2, 16, 700), (20, 7, 20)],
    )
)
SOME = pytest.mark.parametrize("kind", SOME_KINDS, ids=named)
CENTRED = pytest.mark.parametrize(
    "kind", [kind for kind in SOME_KINDS if kind[0] != "rms_norm"], ids=named
)


def compute(module, kind, x, grad_output, weight, bias, eps=1e-5):
    """The output and the gradients."""
    name, options, *_ = kind
    forward, backward = getattr(module, name), getattr(module, f"{name}_backward")
    shift = {} if name == "rms_norm" else {"bias": bias}
    y = forward(x, weight=weight, eps=eps, **shift, **options)
    y = y[0] if type(y) is tuple else y
    return y, *backward(grad_output, x, weight=weight, eps=eps, **options)


RESULTS = ("y", "grad_input", "grad_weight", "grad_bias")


def draw(rng, kind, dtype):
    """An input, a gradient, a weight and a bias."""
    _, _, shape, weight_shape = kind
    arrays = rng.normal(2, 3, shape), rng.standard_normal(shape)
    return [array.astype(dtype) for array in (*arrays, *rng.uniform(-2, 2, (2, *weight_shape)))]


@pytest.fixture
def assert_agrees(rng, assert_close):
    def assert_agrees(kind, dtype, affine=True):
        x, grad_output, *parameters = draw(rng, kind, dtype)
        parameters = parameters if affine else (None, None)
        # A group may have two values that are nearly the same. Then eps says how large the
        # gradient is, and this one makes it of the size that tolerances are meant for.
        actual = compute(functional, kind, x, grad_output, *parameters, eps=0.1)
        expected = compute(reference, kind, x, grad_output, *parameters, eps=0.1)
        for name, one, other in zip(RESULTS, actual, expected, strict=False):
            assert one.dtype == dtype
            assert_close(name, one, other, dtype)

    return assert_agrees


# ------------------------------------------------------------------------------------------ shapes


@DTYPE
@pytest.mark.parametrize("kind", list(kinds()), ids=named)
def test_any_shape(assert_agrees, kind, dtype):
    assert_agrees(kind, dtype)


@pytest.mark.parametrize("kind", list(kinds([(8, 300_000)], [], [])), ids=named)
def test_huge_groups(assert_agrees, kind):
    assert_agrees(kind, "float32")


@DTYPE
@SOME
def test_without_parameters(assert_agrees, kind, dtype):
    assert_agrees(kind, dtype, affine=False)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("x_dtype", ["float32", "float64"])
@pytest.mark.parametrize("weight_dtype", ["float32", "float64"])
def test_parameters_of_another_type(rng, assert_close, name, x_dtype, weight_dtype):
    kind = name, {"normalized_shape": (3, 50)}, (4, 3, 50), (3, 50)
    x, grad_output, *_ = draw(rng, kind, x_dtype)
    _, _, *parameters = draw(rng, kind, weight_dtype)
    actual = compute(functional, kind, x, grad_output, *parameters)
    expected = compute(reference, kind, x, grad_output, *parameters)
    for quantity, one, other in zip(RESULTS, actual, expected, strict=False):
        assert one.dtype == x_dtype
        assert_close(quantity, one, other, x_dtype)


@pytest.mark.parametrize("given", ["weight", "bias"])
@SOME
def test_one_parameter(rng, assert_close, kind, given):
    x, grad_output, weight, bias = draw(rng, kind, "float32")
    parameters = (weight, None) if given == "weight" else (None, bias)
    actual = compute(functional, kind, x, grad_output, *parameters, eps=0.1)
    expected = compute(reference, kind, x, grad_output, *parameters, eps=0.1)
    for quantity, one, other in zip(RESULTS, actual, expected, strict=False):
        assert_close(quantity, one, other, "float32")


# --------------------------------------------------------------------------------- the same bits


@DTYPE
@SOME
def test_the_same_bits_for_any_threads_and_instruction_set(rng, monkeypatch, kind, dtype):
    x, *rest = draw(rng, kind, dtype)
    x.flat[0] = 1e4
    if dtype == "float32":
        x.flat[-1] = 1e25  # whose square is read again in another unit
    seen = set()
    for isa, threads in product(_dispatch.supported(), (1, 2, 3, 7)):
        monkeypatch.setattr(_dispatch, "kernels", _dispatch.load(isa))
        # As many as that, also where there is too little work for them.
        monkeypatch.setattr(_threads, "threads_for", lambda values, threads=threads: threads)
        seen.add(b"".join(array.tobytes() for array in compute(functional, kind, x, *rest)))
    assert len(seen) == 1


# ------------------------------------------------------------------------------- data that is hard

# Without scales that go from channel to channel, which are for batch norm.
HARD = list(hard.all_kinds(("1", "1e25")))
HARD_KINDS = list(
    kinds(
        rows=[(7, 16), (5, 768), (2, 3000)],
        groups=[((2, 24, 49), 8), ((2, 60, 10), 3)],
        instances=[(3, 8, 49), (2, 3, 700)],
    )
)


def from_groups(kind, matrix):
    """An input of this kind from one column for each group."""
    _, options, shape, _ = kind
    if options.get("channel_axis") != -1:
        return np.ascontiguousarray(matrix.T).reshape(shape)
    N, S, C = shape
    return np.ascontiguousarray(np.moveaxis(matrix.T.reshape(N, C, S), 1, -1))


def groups_of(kind):
    """The number of values of a group, and of groups."""
    name, options, shape, (channels, *_) = kind
    groups = shape[0] * {"instance_norm": channels}.get(name, options.get("num_groups", 1))
    return prod(shape) // groups, groups


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("float64", 1e-14)])
@pytest.mark.parametrize("kind", HARD_KINDS, ids=named)
def test_hard_data_is_as_exact_as_promised(rng, kind, dtype, bound):
    """The errors of docs/numerics.md."""
    wide = np.float64 if dtype == "float32" else np.longdouble
    parameters = rng.uniform(-2, 2, (2, *kind[3])).astype(dtype)
    for data in HARD:
        values, gradients = hard.draw(data, groups_of(kind), -1, dtype)
        x, grad_output = from_groups(kind, values), from_groups(kind, gradients)
        # The first value of a group is subtracted from all, as hard.exact does and says why.
        centred = values.astype(wide)
        if kind[0] == "rms_norm":
            var = np.mean(centred**2, axis=0)
        else:
            centred -= centred[0].copy()
            var = centred.var(axis=0)
        std = from_groups(kind, np.broadcast_to(np.sqrt(var + 1e-5), values.shape))
        exact = compute(
            reference,
            kind,
            from_groups(kind, centred),
            grad_output.astype(wide),
            *parameters.astype(wide),
        )
        y, grad_input, *_ = compute(functional, kind, x, grad_output, *parameters)
        errors = hard.errors(hard.Exact(*exact[:2], std), y, grad_input)
        assert max(errors) <= bound, (data, errors)


@DTYPE
@CENTRED
def test_constant_groups_give_exactly_the_bias(rng, kind, dtype):
    name, options, _, weight_shape = kind
    values, groups = groups_of(kind)
    x = from_groups(kind, np.broadcast_to(rng.normal(0, 1e4, groups), (values, groups)))
    weight, bias = rng.normal(size=(2, *weight_shape)).astype(dtype)
    y = getattr(functional, name)(x.astype(dtype), weight=weight, bias=bias, **options)
    axis = options.get("channel_axis", -1)
    assert (np.moveaxis(y, axis, -1) == bias).all()


@pytest.mark.parametrize("value", [np.nan, -np.inf], ids=["nan", "minus_inf"])
@pytest.mark.parametrize("where", ["x", "grad_output"])
@DTYPE
@SOME
def test_what_is_not_finite_stays_in_its_group(rng, kind, dtype, where, value):
    arrays = draw(rng, kind, dtype)
    clean = compute(functional, kind, *arrays)
    arrays[where == "grad_output"].flat[-1] = value
    results = compute(functional, kind, *arrays)
    values, groups = groups_of(kind)
    own = from_groups(kind, np.broadcast_to(np.arange(groups) == groups - 1, (values, groups)))
    for name, actual, expected in zip(RESULTS[:2], results, clean, strict=False):
        assert actual[~own].tobytes() == expected[~own].tobytes(), name
    assert not np.isfinite(results[1][own]).any()
    if where == "x" and kind[0] != "rms_norm":  # that divides the others by infinity
        assert not np.isfinite(results[0][own]).any()
    elif where == "grad_output":
        assert results[0].tobytes() == clean[0].tobytes()
    # Parameters have gradients from every group that they belong to.
    touched = np.zeros(kind[3], bool)
    channels = np.moveaxis(own, kind[1].get("channel_axis", -1), -1)
    touched |= channels.reshape(-1, *kind[3]).any(axis=0)
    for name, actual, expected in zip(RESULTS[2:], results[2:], clean[2:], strict=False):
        assert actual[~touched].tobytes() == expected[~touched].tobytes(), name


# ------------------------------------------------------------------------------------ large arrays


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (cbn.LayerNorm(1000), (9001, 1000)),
        (cbn.RMSNorm((7, 100)), (13_001, 7, 100)),
        (cbn.GroupNorm(2, 62, channel_axis=-1), (9, 127, 127, 62)),
        (cbn.InstanceNorm2d(62, affine=True), (9, 62, 127, 127)),
        (cbn.InstanceNorm2d(62, affine=True, channel_axis=-1), (9, 127, 127, 62)),
    ],
    ids=str,
)
def test_large_outputs_are_those_written_in_place(rng, layer, shape):
    """Outputs beyond the cache are written past it, unless they overwrite an input."""
    x = rng.standard_normal(shape, np.float32)
    grad_output = x[::-1].copy()
    assert x.nbytes >= 2**25
    y = layer(x)
    grad_input = layer.backward(grad_output)
    layer.backward(grad_output, out=grad_output)
    layer(x, out=x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(grad_input, grad_output)
