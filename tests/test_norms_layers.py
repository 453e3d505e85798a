"""What the layers of the other norms do: construction, modes, outputs, copies, files, models."""

import copy
import json
import pickle
import re
import tracemalloc
import zipfile

import numpy as np
import pytest

import cbn
from cbn import functional

C = 4
SHAPE = (3, C, 6)
# A layer for data of SHAPE, and the function that it is.
LAYERS = {
    "InstanceNorm1d": (lambda **options: cbn.InstanceNorm1d(C, **options), ()),
    "GroupNorm": (lambda **options: cbn.GroupNorm(2, C, **options), (2,)),
    "LayerNorm": (lambda **options: cbn.LayerNorm((C, 6), **options), ((C, 6),)),
    "RMSNorm": (lambda **options: cbn.RMSNorm((C, 6), **options), ((C, 6),)),
}
EACH = pytest.mark.parametrize("name", LAYERS)
# Of every kind one with options of its own.
OPTIONS = [
    ("InstanceNorm1d", {}),
    ("InstanceNorm1d", {"affine": True, "bias": False, "momentum": None, "eps": 0.25}),
    ("InstanceNorm1d", {"affine": True, "track_running_stats": True, "correction": 0}),
    ("InstanceNorm1d", {"track_running_stats": True, "channel_axis": -1, "dtype": "float64"}),
    ("InstanceNorm1d", {"track_running_stats": True, "nonfinite": "skip"}),
    ("GroupNorm", {}),
    ("GroupNorm", {"affine": False, "eps": 1}),
    ("GroupNorm", {"bias": False, "channel_axis": -1, "dtype": "float64"}),
    ("LayerNorm", {}),
    ("LayerNorm", {"bias": False, "eps": 0.0}),
    ("LayerNorm", {"elementwise_affine": False, "dtype": "float64"}),
    ("RMSNorm", {}),
    ("RMSNorm", {"elementwise_affine": False, "eps": 0.5, "dtype": "float64"}),
]


def make(name, **options):
    """A layer whose every array differs from its default."""
    layer = LAYERS[name][0](**options)
    for seed, (key, array) in enumerate(layer._state().items()):
        random = np.random.default_rng(seed)
        array[...] = 7 if key == "num_batches_tracked" else random.uniform(0.5, 2, array.shape)
    return layer


def affine(name):
    return {"affine": True} if name == "InstanceNorm1d" else {}


@pytest.fixture
def x(rng):
    return rng.normal(1, 2, SHAPE).astype(np.float32)


@pytest.fixture
def grad_output(rng):
    return rng.standard_normal(SHAPE, np.float32)


def results(layer, x, grad_output, out=None, grad_out=None):
    y = layer(x, out)
    y = y.copy() if y is x else y
    grad_input = layer.backward(grad_output, grad_out)
    return [y, grad_input, layer.weight_grad, layer.bias_grad]


# -------------------------------------------------------------------------------------------- calls


@EACH
def test_a_layer_gives_what_its_function_gives(name, x, grad_output):
    layer = make(name, **affine(name))
    arguments = LAYERS[name][1]
    function = re.sub(r"(\w+)Norm.*", r"\1_norm", name).lower()
    parameters = {"weight": layer.weight, "bias": layer.bias}
    if name == "RMSNorm":
        del parameters["bias"]
    y = getattr(functional, function)(x, *arguments, **parameters)
    gradients = getattr(functional, f"{function}_backward")(
        grad_output, x, *arguments, weight=layer.weight
    )
    for actual, expected in zip(
        results(layer, x, grad_output), (y, *gradients), strict=name != "RMSNorm"
    ):
        np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(layer.forward(x), y)


@pytest.mark.parametrize("name", ["GroupNorm", "LayerNorm", "RMSNorm"])
def test_the_mode_changes_nothing(name, x, grad_output):
    layer = make(name)
    expected = results(layer, x, grad_output)
    assert layer.eval() is layer
    assert layer.training is False
    np.testing.assert_equal(results(layer, x, grad_output), expected)
    assert layer.train().training is True


def test_a_frozen_instance_norm_does_in_training_what_it_does_in_eval_mode(x, grad_output):
    layer = make("InstanceNorm1d", affine=True, track_running_stats=True)
    before = layer.state_dict()
    expected = results(layer.eval(), x, grad_output)
    cbn.freeze(layer.train())
    np.testing.assert_equal(results(layer, x, grad_output), expected)
    np.testing.assert_equal(layer.state_dict(), before)
    y, *_ = results(cbn.unfreeze(layer), x, grad_output)
    assert (y != expected[0]).any()
    assert layer.num_batches_tracked == 8


def test_a_frozen_instance_norm_uses_statistics_that_it_no_longer_tracks(x):
    layer = make("InstanceNorm1d", track_running_stats=True)
    expected = layer.eval()(x)
    layer.track_running_stats = False
    cbn.freeze(layer)
    np.testing.assert_array_equal(layer(x), expected)
    np.testing.assert_array_equal(layer.train()(x), expected)


def test_recalibration_leaves_a_pending_backward_pass_as_it_was(x, grad_output):
    layer = make("InstanceNorm1d", affine=True, track_running_stats=True).eval()
    layer(x)
    expected = layer.backward(grad_output)
    layer(x)
    cbn.recalibrate(layer, [2 * x], layer)
    np.testing.assert_array_equal(layer.backward(grad_output), expected)


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("InstanceNorm1d", "num_features"),
        ("GroupNorm", "num_groups"),
        ("GroupNorm", "num_channels"),
        ("LayerNorm", "normalized_shape"),
        ("RMSNorm", "normalized_shape"),
    ],
)
def test_the_shape_of_a_layer_stays(name, attribute):
    """Kernels write as many gradients as it says."""
    with pytest.raises(AttributeError):
        setattr(make(name), attribute, 1)


def test_tracking_switched_on_makes_statistics(x):
    layer = cbn.InstanceNorm1d(C)
    assert list(layer.state_dict()) == []
    layer.track_running_stats = True
    assert (layer.running_mean.tolist(), layer.running_var.tolist()) == ([0] * C, [1] * C)
    np.testing.assert_array_equal(layer(x), cbn.InstanceNorm1d(C)(x))
    assert layer.num_batches_tracked == 1


@EACH
@pytest.mark.parametrize("reset", ["reset_parameters", "reset_running_stats"])
def test_reset(name, reset):
    if name != "InstanceNorm1d" and reset == "reset_running_stats":
        assert not hasattr(make(name), reset)
        return
    options = {"affine": True, "track_running_stats": True} if name == "InstanceNorm1d" else {}
    layer, fresh = make(name, **options), LAYERS[name][0](**options)
    expected = layer.state_dict() if reset == "reset_running_stats" else {}
    kept = {key: value for key, value in expected.items() if key in ("weight", "bias")}
    getattr(layer, reset)()
    np.testing.assert_equal(layer.state_dict(), fresh.state_dict() | kept)


# ------------------------------------------------------------------------------- arrays of any kind


def strided(array):
    wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), 9, array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


WAYS = {
    "transposed": lambda array: np.asfortranarray(array),
    "strided": strided,
    "reversed": lambda array: array[::-1].copy()[::-1],
    "byte-swapped": lambda array: array.astype(array.dtype.newbyteorder()),
    "read-only": lambda array: np.broadcast_to(array, array.shape),
    "list": lambda array: array.tolist(),
}


@EACH
@pytest.mark.parametrize("way", WAYS)
def test_any_layout_gives_the_same_bits(name, way, x, grad_output):
    layer = make(name, **affine(name))
    expected = results(layer, x, grad_output)
    actual = results(layer, WAYS[way](x), WAYS[way](grad_output))
    np.testing.assert_equal(actual, expected)


@EACH
@pytest.mark.parametrize("way", ["plain", "transposed", "strided", "reversed"])
def test_out_in_any_layout(name, way, x, grad_output):
    layer = make(name, **affine(name))
    expected = results(layer, x, grad_output)
    out, grad_out = (WAYS.get(way, np.copy)(np.zeros_like(x)) for _ in range(2))
    actual = results(layer, x, grad_output, out, grad_out)
    assert actual[0] is out
    assert actual[1] is grad_out
    np.testing.assert_equal(actual, expected)


@EACH
@pytest.mark.parametrize("way", ["plain", "transposed", "strided", "reversed"])
def test_in_place(name, way, x, grad_output):
    layer = make(name, **affine(name))
    y, grad_input, *_ = results(layer, x, grad_output)
    x, grad_output = (WAYS.get(way, np.copy)(array) for array in (x, grad_output))
    layer(x)
    kept = x.copy()
    assert layer.backward(grad_output.copy(), out=x) is x
    np.testing.assert_array_equal(x, grad_input)
    x[...] = kept
    layer(x)
    assert layer.backward(grad_output, out=grad_output) is grad_output
    np.testing.assert_array_equal(grad_output, grad_input)
    assert layer(x, out=x) is x
    np.testing.assert_array_equal(x, y)
    with pytest.raises(RuntimeError, match="expected the input of the last forward call to be"):
        layer.backward(kept)


@EACH
def test_no_samples(name):
    layer = make(name, **affine(name))
    before = layer.state_dict()
    x = np.empty((0, C, 6), np.float32)
    y, grad_input, weight_grad, bias_grad = results(layer, x, x)
    assert y.shape == grad_input.shape == x.shape
    assert not weight_grad.any()
    assert weight_grad.shape == layer.weight.shape
    assert bias_grad is None or not bias_grad.any()
    np.testing.assert_equal(layer.state_dict(), before)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(0, C, 6), (3, C, 0), (C, 0)], ids=str)
def test_no_values_move_no_statistics(shape, momentum):
    layer = make("InstanceNorm1d", track_running_stats=True, momentum=momentum)
    before = layer.state_dict()
    assert layer(np.empty(shape, np.float32)).shape == shape
    np.testing.assert_equal(layer.state_dict(), before)


# ---------------------------------------------------------------------------------- copies and repr


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_copies_work(name, options, duplicate, x, grad_output):
    layer = make(name, **options)
    x, grad_output = (array.astype(layer.dtype) for array in (x, grad_output))
    if options.get("channel_axis") == -1:
        x, grad_output = (np.moveaxis(array, 1, -1).copy() for array in (x, grad_output))
    layer(x)
    twin = duplicate(layer.eval())
    assert repr(twin) == repr(layer)
    assert twin.training is False
    with pytest.raises(RuntimeError, match="expected a forward call before it"):
        twin.backward(x)
    np.testing.assert_equal(results(twin, x, grad_output), results(layer, x, grad_output))
    np.testing.assert_equal(twin.state_dict(), layer.state_dict())
    if duplicate is not copy.copy:
        before = layer.state_dict()
        for array in twin._state().values():
            array[...] = 77
        np.testing.assert_equal(layer.state_dict(), before)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_repr_evaluates_to_the_layer(name, options):
    layer = make(name, **options)
    again = eval(repr(layer), {**vars(cbn), "float64": np.float64})
    assert repr(again) == repr(layer)
    assert again._config() == layer._config()


def test_pickle_does_not_grow_with_the_input():
    layer = cbn.LayerNorm(3)
    before = len(pickle.dumps(layer))
    layer(np.ones((10_000, 3), np.float32))
    assert len(pickle.dumps(layer)) == before


# -------------------------------------------------------------------------------------------- files


@pytest.fixture
def path(tmp_path):
    return tmp_path / "layer.npz"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_round_trip(name, options, training, path):
    layer = make(name, **options).train(training)
    layer.save(path)
    again = type(layer).load(path)
    assert repr(again) == repr(layer)
    assert again.training is training
    np.testing.assert_equal(again.state_dict(), layer.state_dict())
    assert [array.dtype for array in again._state().values()] == [
        array.dtype for array in layer._state().values()
    ]


def config_of(path):
    with np.load(path) as file:
        return json.loads(str(file["config"]))


def rewrite(path, changes, members=None, without=()):
    """Change the configuration of a file, and its members."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    config = {name: value for name, value in config_of(path).items() if name not in without}
    content.update(members or {})
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            if name == "config.npy":
                with archive.open(name, "w") as member:
                    np.save(member, np.array(json.dumps(config | changes)))
            else:
                archive.writestr(name, data)


@pytest.mark.parametrize(("nonfinite", "loads"), [("propagate", True), ("skip", False)])
def test_files_that_are_older_than_nonfinite_of_instance_norm(nonfinite, loads, path):
    layer = make("InstanceNorm1d", track_running_stats=True)
    layer.save(path)
    rewrite(path, {}, without=("nonfinite",))
    again = cbn.InstanceNorm1d.load(path)
    assert again.nonfinite == "propagate"
    np.testing.assert_equal(again.state_dict(), layer.state_dict())

    cbn.save({"norm": layer}, path)
    config = config_of(path)
    del config["layers"]["norm"]["nonfinite"]
    rewrite(path, config)
    model = {"norm": cbn.InstanceNorm1d(C, track_running_stats=True, nonfinite=nonfinite)}
    if loads:
        cbn.load(model, path)
        np.testing.assert_equal(model["norm"].state_dict(), layer.state_dict())
    else:
        text = "norm: expected nonfinite='skip', as in this model, got 'propagate'"
        with pytest.raises(cbn.StateFileError, match=text):
            cbn.load(model, path)


@pytest.mark.parametrize(("name", "other"), [("RMSNorm", "LayerNorm"), ("GroupNorm", "RMSNorm")])
def test_a_file_of_another_class(name, other, path):
    make(other).save(path)
    text = f"{path}: expected a state file of {name}, got one of {other}; use {other}.load(path)"
    with pytest.raises(cbn.StateFileError, match=f"^{re.escape(text)}$"):
        getattr(cbn, name).load(path)


def assert_refused(layer, path, reason):
    start = f"{path}: expected a state file of cbn, got one that is damaged or foreign: "
    with pytest.raises(cbn.StateFileError, match=f"^{re.escape(start + reason)}"):
        type(layer).load(path)


LENGTH = "normalized_shape: expected a positive integer, got "
MISMATCH = "weight: expected float32 of shape {}, got float32 of shape {}"


@pytest.mark.parametrize("make_norm", [cbn.LayerNorm, cbn.RMSNorm])
def test_as_many_axes_as_numpy_has(make_norm):
    assert make_norm([1] * 64).weight.ndim == 64
    text = (
        "normalized_shape: expected at most 64 lengths, as many as NumPy's arrays have axes, got 70"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        make_norm([1] * 70)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("LayerNorm", {"normalized_shape": "46"}, LENGTH + "'46'"),
        ("LayerNorm", {"normalized_shape": [4, -6]}, LENGTH + "-6"),
        ("LayerNorm", {"normalized_shape": [4, 0]}, LENGTH + "0"),
        ("LayerNorm", {"normalized_shape": [[4, 6]]}, LENGTH + "[4, 6]"),
        ("LayerNorm", {"normalized_shape": {"4": 6}}, LENGTH + "{'4': 6}"),
        ("LayerNorm", {"normalized_shape": [4, "6"]}, LENGTH + "'6'"),
        ("LayerNorm", {"normalized_shape": [True]}, LENGTH + "True"),
        ("LayerNorm", {"normalized_shape": None}, LENGTH + "None"),
        ("LayerNorm", {"normalized_shape": []}, "normalized_shape: expected at least one length"),
        ("LayerNorm", {"normalized_shape": [24]}, MISMATCH.format((24,), (4, 6))),
        ("RMSNorm", {"normalized_shape": [6, 4]}, MISMATCH.format((6, 4), (4, 6))),
        (
            "RMSNorm",
            {"normalized_shape": [2**62, 2**62]},
            MISMATCH.format((2**62, 2**62), (4, 6)),
        ),
        ("RMSNorm", {"normalized_shape": [1] * 99}, "normalized_shape: expected at most 64"),
        ("RMSNorm", {"eps": -1}, "eps: expected a finite number >= 0, got -1"),
        ("RMSNorm", {"elementwise_affine": 1}, "elementwise_affine: expected True or False, got 1"),
        ("RMSNorm", {"bias": True}, "config: expected the keys ['class', 'dtype', "),
        (
            "GroupNorm",
            {"num_groups": 3},
            "num_groups: expected a divisor of the 4 channels, got 3",
        ),
        ("GroupNorm", {"num_groups": 0}, "num_groups: expected a positive integer, got 0"),
        ("GroupNorm", {"num_groups": "2"}, "num_groups: expected a positive integer, got '2'"),
        ("GroupNorm", {"num_channels": 10**18}, MISMATCH.format((10**18,), (4,))),
        ("GroupNorm", {"num_channels": -4}, "num_channels: expected a positive integer, got -4"),
        ("GroupNorm", {"affine": False}, "expected the arrays [], got ['bias', 'weight']"),
        ("InstanceNorm1d", {"num_features": 2**62}, "weight: expected float32 of shape (46116860"),
        ("InstanceNorm1d", {"has_running_stats": True}, "expected the arrays ['bias', 'num_batch"),
    ],
    ids=str,
)
def test_hostile_configurations(name, changes, reason, path):
    layer = make(name, **affine(name))
    layer.save(path)
    rewrite(path, changes)
    assert_refused(layer, path, reason)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm1d"])
def test_what_promises_terabytes_is_refused_from_the_header(name, path):
    layer = make(name, **affine(name))
    layer.save(path)
    shape = (2**20, 2**20) if "Layer" in name or "RMS" in name else (2**40,)
    changes = {
        "LayerNorm": {"normalized_shape": shape},
        "RMSNorm": {"normalized_shape": shape},
        "GroupNorm": {"num_channels": 2**40},
        "InstanceNorm1d": {"num_features": 2**40},
    }[name]
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode()
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(8)
    rewrite(path, changes, {"weight.npy": member})
    tracemalloc.start()
    try:
        assert_refused(layer, path, f"weight.npy: expected {4 * 2**40} bytes of float32 {shape}, g")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------------------------------- models


def model(**of_instance):
    return {
        "conv": np.ones(3),
        "blocks": [
            make("InstanceNorm1d", **of_instance),
            make("GroupNorm"),
            {"row": make("LayerNorm"), "rms": make("RMSNorm", dtype="float64")},
        ],
        "head": cbn.BatchNorm1d(3),
    }


NAMES = ["blocks.0", "blocks.1", "blocks.2.row", "blocks.2.rms", "head"]


def test_all_kinds_are_found():
    found = cbn.named_norm_layers(model())
    assert [name for name, _ in found] == NAMES
    assert len({type(layer) for _, layer in found}) == 5


def test_a_model_of_all_kinds_is_saved_and_loaded(path):
    saved, fresh = (model(affine=True, track_running_stats=True) for _ in range(2))
    for array in (
        array for _, layer in cbn.named_norm_layers(saved) for array in layer._state().values()
    ):
        array[...] += 1
    cbn.save(saved, path)
    cbn.load(fresh, path)
    np.testing.assert_equal(cbn.state_dict(fresh), cbn.state_dict(saved))
    other = model(affine=True, track_running_stats=True)
    other["blocks"][2]["row"] = cbn.LayerNorm((C, 7))
    before = cbn.state_dict(other)
    with pytest.raises(
        cbn.StateFileError, match=r"blocks\.2\.row: expected normalized_shape=\[4, 7\]"
    ):
        cbn.load(other, path)
    np.testing.assert_equal(cbn.state_dict(other), before)


def test_only_layers_with_statistics_are_frozen_and_reset():
    tracking = model(track_running_stats=True)
    cbn.freeze(tracking)
    frozen = {name: layer.frozen for name, layer in cbn.named_norm_layers(tracking)}
    assert frozen == dict.fromkeys(NAMES, False) | {"blocks.0": True, "head": True}
    cbn.unfreeze(tracking)
    before = cbn.state_dict(tracking)
    cbn.reset_norm_stats(tracking)
    after = cbn.state_dict(tracking)
    changed = [key for key in after if (after[key] != before[key]).any()]
    assert changed == [
        f"blocks.0.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")
    ]
    without = [make(name) for name in LAYERS]
    with pytest.raises(ValueError, match="expected at least one norm layer with running statistic"):
        cbn.freeze(without)


def test_recalibration_gives_the_averages_over_all_samples(rng):
    batches = [rng.normal(1, 3, (n, C, 6)) for n in (1, 4, 2)]
    layer = make("InstanceNorm1d", track_running_stats=True, dtype="float64", correction=2)
    others = [make("GroupNorm", dtype="float64"), make("LayerNorm", dtype="float64")]

    def forward(x):
        return others[1](others[0](layer(x)))

    assert cbn.recalibrate([layer, *others], batches, forward) == ["0"]
    everything = np.concatenate(batches)
    np.testing.assert_allclose(layer.running_mean, everything.mean((0, 2)), rtol=1e-12)
    var = everything.var(axis=2, ddof=2).mean(axis=0)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-12)
    assert layer.num_batches_tracked == 3
    cbn.reinitialize_norm_stats(layer, batches[0])
    np.testing.assert_allclose(layer.running_mean, batches[0].mean((0, 2)), rtol=1e-12)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("correction", [2, 2.5])
def test_recalibration_refuses_samples_that_are_too_small(correction):
    layer = make("InstanceNorm1d", track_running_stats=True, correction=correction)
    before = layer.state_dict()
    batches = [np.ones((1, C, 9), np.float32), np.ones((1, C, 2), np.float32)]
    text = f"x: expected more than {correction:g} values per channel of a sample, got 2 in shape "
    with pytest.raises(ValueError, match=re.escape(text)):
        cbn.recalibrate(layer, batches, layer)
    np.testing.assert_equal(layer.state_dict(), before)
    assert layer.training


def test_recalibration_takes_what_is_not_finite_or_too_large():
    layer = make("InstanceNorm1d", track_running_stats=True)
    x = np.ones((2, C, 3), np.float32)
    x[0, 0, 0], x[1, 0, 0], x[0, 1] = np.inf, -np.inf, [1e25, -1e25, 0]
    assert cbn.recalibrate(layer, [x], layer) == [""]
    assert np.isnan(layer.running_mean[0])
    assert layer.running_mean[1:].tolist() == [0.5, 1, 1]
    assert layer.running_var[1:].tolist() == [np.inf, 0, 0]
