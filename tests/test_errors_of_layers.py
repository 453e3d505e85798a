"""Refusals of live layers: bad attributes, calls out of order, states; that nothing changes."""

import re
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from norms_table import NORMS, STATISTICS
from refusals import (
    COPY,
    EACH,
    IN_PLACE,
    KINDS,
    LEARNERS,
    LEARNING,
    NON_NEGATIVE,
    SHAPE,
    C,
    Scene,
    by_arguments,
    check_refused,
    read_only,
)

import cbn

# -------------------------------------------------------------------------------------- attributes


@EACH
@pytest.mark.parametrize(
    ("eps", "error"), [(-1.0, ValueError), (float("nan"), ValueError), (None, TypeError)]
)
def test_eps_of_a_layer(kind, eps, error):
    scene = Scene(kind)
    check_refused(partial(scene.with_(eps=eps), scene.x), error, f"{NON_NEGATIVE}{eps}")


COUNTER = (
    "num_batches_tracked: expected a writable array of shape () with an integer >= 0, got {!r}"
)


@LEARNING
@pytest.mark.parametrize(
    ("attributes", "text"),
    by_arguments(
        [
            ({"momentum": float("nan")}, "momentum: expected a finite number, got nan"),
            ({"correction": -1}, "correction: expected a finite number >= 0, got -1"),
            ({"num_batches_tracked": None}, COUNTER.format(None)),
            ({"num_batches_tracked": 3}, COUNTER.format(3)),
            ({"num_batches_tracked": "abc"}, COUNTER.format("abc")),
            ({"num_batches_tracked": np.array(-1)}, COUNTER.format(np.array(-1))),
            ({"num_batches_tracked": np.array([1])}, COUNTER.format(np.array([1]))),
            (
                {"num_batches_tracked": read_only(np.array(3))},
                f"num_batches_tracked: expected a writable array, {IN_PLACE}, "
                f"got a read-only one of shape (); {COPY}",
            ),
        ]
    ),
)
def test_a_layer_that_learns_with_a_bad_attribute(kind, attributes, text):
    scene = Scene(kind)
    check_refused(partial(scene.with_(**attributes), scene.x), ValueError, text)


@pytest.mark.parametrize("dtype", [np.float64, float, "float64"])
@EACH
def test_an_element_type_set_on_a_layer_is_named(kind, dtype, tmp_path):
    scene = Scene(kind)
    layer = scene.with_(dtype=dtype)
    text = (
        "x: expected float64, got float32; convert it with x.astype(numpy.float64), or use "
        "float32 throughout"
    )
    check_refused(partial(layer, scene.x), TypeError, text)
    assert "dtype=float64" in repr(layer)
    with pytest.raises(ValueError, match=r"expected float64 of shape \(.*\) to save, got float32"):
        layer.save(tmp_path / "file")


@EACH
def test_mode_is_a_flag(kind):
    text = "mode: expected True or False, got 1"
    check_refused(partial(Scene(kind).layer.train, 1), TypeError, text)


@LEARNING
def test_tracking_is_a_flag(kind):
    layer = Scene(kind).layer
    text = "track_running_stats: expected True or False, got 1"
    call = partial(type(layer).track_running_stats.fset, layer, 1)
    check_refused(call, TypeError, text)


# ----------------------------------------------------------------------------- the order of calls


@pytest.mark.parametrize("name", NORMS)
def test_backward_before_forward(name):
    text = "backward: expected a forward call before it, got none on this layer"
    call = partial(NORMS[name].layer().backward, np.ones(SHAPE, np.float32))
    check_refused(call, RuntimeError, text)


@EACH
@pytest.mark.parametrize(
    "shape", [(), (4, C, 2), (4, C, 2, 1), (3, C, 2, 2), (1, 4, C, 2, 2)], ids=str
)
def test_backward_of_another_shape(kind, shape):
    scene = Scene(kind)
    grad_output = np.ones(shape, np.float32)
    text = (
        f"grad_output: expected shape (4, 3, 2, 2), that of the input of the forward call, "
        f"got {shape}"
    )
    check_refused(partial(scene.layer.backward, grad_output), ValueError, text)
    if scene.gradients:
        check_refused(partial(scene.gradients, grad_output, scene.x), ValueError, text)


OVERWRITTEN = (
    "backward: expected the input of the last forward call to be intact, "
    "got one that an out= wrote over; give that call another out"
)


@EACH
def test_backward_after_a_call_in_place(kind):
    scene = Scene(kind)
    scene.layer(scene.x, out=scene.x)
    check_refused(partial(scene.layer.backward, scene.grad_output), RuntimeError, OVERWRITTEN)


@EACH
def test_backward_after_a_backward_over_x(kind):
    scene = Scene(kind)
    scene.layer.backward(scene.grad_output, out=scene.x)
    check_refused(partial(scene.layer.backward, scene.grad_output), RuntimeError, OVERWRITTEN)


def as_float64(array):
    array.dtype = np.float64


def cut_short(array):
    array.resize((2, C, 2, 2), refcheck=False)


def reshape(array):
    array.shape = (4, C, 4)


@pytest.mark.filterwarnings("ignore:Setting the dtype:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (as_float64, "float64 of shape (4, 3, 2, 1)"),
        (cut_short, "float32 of shape (2, 3, 2, 2)"),
        (reshape, "float32 of shape (4, 3, 4)"),
    ],
)
@EACH
def test_backward_after_x_has_become_another(kind, change, seen):
    scene = Scene(kind)
    change(scene.x)
    text = (
        "backward: expected the input of the last forward call as it was, float32 of shape "
        f"(4, 3, 2, 2), got {seen}; do not change it in between"
    )
    check_refused(partial(scene.layer.backward, scene.grad_output), RuntimeError, text)


REFUSED_FORWARDS = {
    "rank": lambda s: s.layer(s.x[0, 0, 0]),
    "size": lambda s: s.layer(s.x[:, :2, :, :1]),
    "dtype": lambda s: s.layer(s.x.astype(float)),
    "out-shape": lambda s: s.layer(s.x, out=s.x[0]),
    "out-overlap": lambda s: s.layer(s.x, out=s.x[::-1]),
    "eps": lambda s: s.with_(eps=-1.0)(s.x),
    "weight": lambda s: s.with_(weight=np.ones(9))(s.x),
    "one-value": lambda s: s.layer(s.x[:1, :, :1, :1]),
}


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        (kind, refused)
        for kind in KINDS
        for refused in REFUSED_FORWARDS
        if refused != "one-value" or kind in ("batch", "instance")
    ],
)
def test_backward_after_a_refused_call_is_that_of_the_last_good_call(kind, refused):
    scene = Scene(kind)
    expected = scene.layer.backward(scene.grad_output)
    weight = scene.layer.weight
    with pytest.raises((TypeError, ValueError)):
        REFUSED_FORWARDS[refused](scene)
    scene.layer.weight = weight
    np.testing.assert_array_equal(scene.layer.backward(scene.grad_output), expected)


@LEARNING
def test_a_call_refused_in_the_other_mode_does_not_change_how_to_differentiate(kind):
    scene = Scene(kind)
    expected = scene.layer.backward(scene.grad_output)
    with pytest.raises(ValueError, match="expected 3 channels"):
        scene.layer.eval()(scene.x[:, :2])
    np.testing.assert_array_equal(scene.layer.backward(scene.grad_output), expected)


# ------------------------------------------------------------------------------------------- states

KEYS = {kind: norm.parameters + STATISTICS * norm.learns for kind, norm in KINDS.items()}
EACH_KEY = pytest.mark.parametrize(
    ("kind", "key"), [(kind, key) for kind, keys in KEYS.items() for key in keys]
)


def check_state_refused(kind, changes, error, text):
    """Load a state with such changes; None drops a key. Nothing else of it is loaded either."""
    layer = Scene(kind).layer
    state = {**{key: value + 1 for key, value in layer.state_dict().items()}, **changes}
    state = {key: value for key, value in state.items() if value is not None}
    check_refused(partial(layer.load_state_dict, state), error, text)


@EACH
def test_a_state_is_a_mapping(kind):
    text = "state: expected a mapping from names to arrays, got list"
    check_refused(partial(Scene(kind).layer.load_state_dict, []), TypeError, text)


@EACH
def test_strict_is_a_flag(kind):
    layer = Scene(kind).layer
    text = "strict: expected True or False, got 1"
    check_refused(partial(layer.load_state_dict, layer.state_dict(), strict=1), TypeError, text)


@EACH
@pytest.mark.parametrize(
    ("dropped", "added"),
    [(slice(None, None, 2), []), (slice(-1, None), []), (slice(0), ["gamma"])],
    ids=["every other missing", "last missing", "unexpected"],
)
def test_keys_of_a_state(kind, dropped, added):
    missing = list(KEYS[kind][dropped])
    changes = {**dict.fromkeys(missing), **dict.fromkeys(added, np.ones(C))}
    text = (
        f"state: expected exactly the keys of this layer, got missing keys {missing} "
        f"and unexpected keys {added}; pass strict=False to load what fits"
    )
    check_state_refused(kind, changes, ValueError, text)


@EACH_KEY
def test_shapes_of_a_state(kind, key):
    shape = np.shape(getattr(Scene(kind).layer, key))
    text = f"state[{key!r}]: expected shape {shape}, got {(2, *shape)}"
    check_state_refused(kind, {key: np.ones((2, *shape))}, ValueError, text)


@EACH_KEY
@pytest.mark.parametrize(
    ("value", "seen"),
    [
        pytest.param(1j, "complex128", id="complex"),
        pytest.param(True, "bool", id="bool"),
        pytest.param("1", "<U1", id="text"),
        pytest.param(None, "NoneType", id="none"),
        pytest.param(np.void(b"1234"), "|V4", id="void"),
        pytest.param(np.array(1j, object), "complex", id="complex-objects"),
        pytest.param(np.array(True, object), "bool", id="bool-objects"),
    ],
)
def test_a_state_is_of_real_numbers(kind, key, value, seen):
    values = np.full(np.shape(getattr(Scene(kind).layer, key)), value)
    text = f"state[{key!r}]: expected real numbers, got {seen}; convert them first"
    check_state_refused(kind, {key: values}, TypeError, text)


@EACH_KEY
@pytest.mark.parametrize("item", ["", "[1]"])
def test_a_state_is_not_masked(kind, key, item):
    masked = np.ma.ones(np.shape(getattr(Scene(kind).layer, key)))
    name = f"state[{key!r}]{item}"
    text = (
        f"{name}: expected an array without a mask, got a masked array; "
        f"fill it first with {name}.filled(value)"
    )
    value = [0.0, np.ma.masked, 1.0] if item else masked
    check_state_refused(kind, {key: value}, TypeError, text)


@EACH
@pytest.mark.parametrize(
    ("value", "seen"),
    [
        pytest.param(1e300, "1e+300", id="float"),
        pytest.param(10**300, "1e+300", id="integer"),
        pytest.param(10**5000, "an integer beyond floats", id="long-integer"),
        pytest.param(Decimal("-1e999"), "-1E+999", id="decimal"),
    ],
)
def test_a_state_is_within_float32(kind, value, seen):
    values = np.zeros(KINDS[kind].shape_of_parameters(), object)
    values.flat[-1] = value
    text = (
        f"state['weight']: expected numbers that float32 can hold, got {seen}; rescale the "
        "layer's input, or use float64 throughout"
    )
    check_state_refused(kind, {"weight": values.tolist()}, ValueError, text)


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (1.5, "1.5; round an averaged counter first"),
        (Fraction(7, 2), "7/2; round an averaged counter first"),
        (-1.0, "-1.0"),
        (np.array(-1), "-1"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (2**63, str(2**63)),
    ],
)
def test_a_counter_of_a_state_is_a_count(kind, value, seen):
    text = f"state['num_batches_tracked']: expected an integer from 0 to 2**63 - 1, got {seen}"
    check_state_refused(kind, {"num_batches_tracked": value}, ValueError, text)


@EACH
@pytest.mark.parametrize(
    ("unwritable", "seen"), [(read_only, "a read-only one"), (lambda array: [*array.flat], "list")]
)
def test_what_cannot_be_written_is_neither_loaded_nor_reset(kind, unwritable, seen):
    layer = Scene(kind).layer
    last = KEYS[kind][-1]
    state = {key: value + 1 for key, value in layer.state_dict().items()}
    setattr(layer, last, unwritable(getattr(layer, last)))
    text = f"{last}: expected a writable array, got {seen}"
    check_refused(partial(layer.load_state_dict, state), ValueError, text)
    check_refused(partial(layer.reset_parameters), ValueError, text)
    if kind in LEARNERS:
        check_refused(partial(layer.reset_running_stats), ValueError, text)


@EACH
def test_a_layer_of_read_only_arrays_is_saved(kind, tmp_path):
    layer = Scene(kind).layer
    for key in KEYS[kind]:
        read_only(getattr(layer, key))
    layer.save(tmp_path / "file")
    again = type(layer).load(tmp_path / "file")
    np.testing.assert_equal(again.state_dict(), layer.state_dict())


@EACH
def test_what_no_file_could_give_back_is_not_saved(kind, tmp_path):
    path = tmp_path / "layer.npz"
    layer = Scene(kind).layer
    shape, layer.weight = layer.weight.shape, np.ones(5)
    text = f"weight: expected float32 of shape {shape} to save, got float64 of shape (5,)"
    check_refused(partial(layer.save, path), ValueError, text)
    layer.eps = -1.0
    check_refused(partial(layer.save, path), ValueError, NON_NEGATIVE + "-1.0")
    assert not path.exists()


# ------------------------------------------------------------------- what not every norm can do


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("InstanceNorm2d", "set layer.track_running_stats = True"),
        ("GroupNorm", "this kind never has any"),
        ("LayerNorm", "this kind never has any"),
        ("RMSNorm", "this kind never has any"),
    ],
)
def test_statistics_of_a_layer_without_any(name, reason):
    layer, x = NORMS[name].layer(), np.ones(SHAPE, np.float32)
    text = f"layer: expected one with running statistics, got {layer!r}; {reason}"
    check_refused(partial(cbn.reinitialize_norm_stats, layer, x), ValueError, text)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("batch")])
@pytest.mark.parametrize(
    ("fold", "shape"), [(cbn.fold_linear, (C, C)), (cbn.fold_conv, (C, C, 3, 3))]
)
def test_folding(kind, fold, shape):
    layer = Scene(kind).layer.eval()
    text = (
        "bn: expected one of BatchNorm1d, BatchNorm2d, BatchNorm3d, "
        f"got {re.sub(r'[(].*', '', repr(layer))}"
    )
    check_refused(partial(fold, np.ones(shape), None, layer), TypeError, text)
