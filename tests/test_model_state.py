"""State dictionaries and files of a whole model: PyTorch's names, and all or nothing."""

import json
import os
import re
import zipfile

import numpy as np
import pytest
from norms_table import NORMS, filled
from refusals import refused

import cbn

C = 3


def build(seed=None, **first):
    """A model with three norm layers, fresh or filled."""
    layers = [
        cbn.BatchNorm2d(C, **first),
        cbn.BatchNorm1d(4, bias=False, dtype=np.float64),
        cbn.BatchNorm1d(2, affine=False, track_running_stats=False),
    ]
    if seed is not None:
        layers = [filled(layer, seed + i) for i, layer in enumerate(layers)]
    return {"features": [np.ones(5), layers[0]], "head": {"norm": layers[1], "last": layers[2]}}


KEYS = [
    *(f"features.1.{key}" for key in ("weight", "bias", "running_mean", "running_var")),
    "features.1.num_batches_tracked",
    *(f"head.norm.{key}" for key in ("weight", "running_mean", "running_var")),
    "head.norm.num_batches_tracked",
]


def assert_same_state(model, expected):
    np.testing.assert_equal(cbn.state_dict(model), expected)


# ------------------------------------------------------------------------------ state dictionaries


def test_keys_are_those_of_torch():
    assert list(cbn.state_dict(build())) == KEYS


def test_a_layer_is_a_model():
    bn = filled(cbn.BatchNorm1d(C), 0)
    np.testing.assert_equal(cbn.state_dict(bn), bn.state_dict())


def test_state_dict_is_a_copy():
    model = build(seed=1)
    for value in cbn.state_dict(model).values():
        value[...] = 99
    assert_same_state(model, cbn.state_dict(build(seed=1)))


def test_load_state_dict_into_the_very_arrays():
    model, state = build(), cbn.state_dict(build(seed=1))
    weight = model["features"][1].weight
    assert cbn.load_state_dict(model, state) == ([], [])
    assert_same_state(model, state)
    assert model["features"][1].weight is weight


def test_not_strict():
    model = build(seed=1)
    expected = cbn.state_dict(model)
    state = {"head.norm.weight": [7.0] * 4, "features.0.weight": np.ones((3, 3))}
    result = cbn.load_state_dict(model, state, strict=False)
    assert result.missing_keys == [key for key in KEYS if key != "head.norm.weight"]
    assert result.unexpected_keys == ["features.0.weight"]
    assert_same_state(model, {**expected, "head.norm.weight": np.full(4, 7.0)})


def test_strict_names_the_keys():
    state = cbn.state_dict(build())
    del state["head.norm.weight"]
    text = (
        "state: expected exactly the keys of this model, got missing keys ['head.norm.weight'] "
        "and unexpected keys ['conv.weight']; pass strict=False to load what fits"
    )
    with refused(text):
        cbn.load_state_dict(build(), {**state, "conv.weight": np.ones(3)})


@pytest.mark.parametrize("bad", KEYS)
def test_load_state_dict_is_all_or_nothing(bad):
    model = build(seed=1)
    before = cbn.state_dict(model)
    state = {**cbn.state_dict(build(seed=9)), bad: np.ones((3, 3), before[bad].dtype)}
    text = f"state[{bad!r}]: expected shape {before[bad].shape}, got (3, 3)"
    with refused(text):
        cbn.load_state_dict(model, state)
    assert_same_state(model, before)


@pytest.mark.parametrize("bad", KEYS)
def test_a_masked_array_is_refused(bad):
    model, before = build(seed=1), cbn.state_dict(build(seed=1))
    text = (
        f"state[{bad!r}]: expected an array without a mask, got a masked array; fill it first with "
        f"state[{bad!r}].filled(value)"
    )
    with refused(text, TypeError):
        cbn.load_state_dict(model, {**before, bad: np.ma.array(before[bad])})
    assert_same_state(model, before)


def test_a_counter_below_0_is_refused():
    text = "state['head.norm.num_batches_tracked']: expected an integer from 0 to 2**63 - 1, got -1"
    with refused(text):
        cbn.load_state_dict(build(), {"head.norm.num_batches_tracked": -1}, strict=False)


@pytest.mark.parametrize("state", [None, [("a", 1)]], ids=["none", "pairs"])
def test_state_that_is_no_mapping(state):
    with pytest.raises(TypeError, match="state: expected a mapping from names to arrays, got "):
        cbn.load_state_dict(build(), state)


def torch_model(torch):
    """Convolutions, norm layers and a linear layer, after a training step on random data."""
    model = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Conv2d(1, C, 3), torch.nn.BatchNorm2d(C), torch.nn.ReLU()),
        torch.nn.Flatten(),
        torch.nn.Linear(27, 4),
        torch.nn.BatchNorm1d(4),
    )
    model(torch.rand(6, 1, 5, 5))
    return model


def test_state_from_torch_and_back(torch):
    theirs = torch_model(torch)
    ours = [[None, cbn.BatchNorm2d(C), None], None, None, cbn.BatchNorm1d(4)]
    whole = theirs.state_dict()
    norms = {key: whole[key] for key in whole if key.startswith(("0.1.", "3."))}
    assert cbn.load_state_dict(ours, norms) == ([], [])
    state = cbn.state_dict(ours)
    assert list(state) == list(norms)
    for key, tensor in norms.items():
        np.testing.assert_array_equal(state[key], tensor.numpy(), err_msg=key, strict=True)

    others = [key for key in whole if key not in norms]
    assert cbn.load_state_dict(ours, whole, strict=False) == ([], others)
    fresh = torch_model(torch)
    result = fresh.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (others, [])
    for key in norms:
        assert torch.equal(fresh.state_dict()[key], whole[key])


# ------------------------------------------------------------------------------------------- files


@pytest.fixture
def path(tmp_path):
    return tmp_path / "norms.npz"


@pytest.mark.parametrize(
    "first",
    [{}, {"momentum": None}, {"dtype": np.float64}, {"channel_axis": -1, "nonfinite": "skip"}],
    ids=str,
)
def test_round_trip(first, path):
    model = build(seed=1, **first)
    assert cbn.save(model, path) is None
    again = build(**first)
    assert cbn.load(again, path) is None
    assert_same_state(again, cbn.state_dict(model))


def test_a_layer_as_a_model(path):
    bn = filled(cbn.BatchNorm1d(C), 0)
    cbn.save(bn, path)
    again = cbn.BatchNorm1d(C)
    cbn.load(again, path)
    assert_same_state(again, bn.state_dict())


def test_modes_stay_those_of_the_program(path):
    cbn.save(cbn.freeze([cbn.BatchNorm1d(C), cbn.BatchNorm1d(C)]), path)
    model = [cbn.BatchNorm1d(C).eval(), cbn.BatchNorm1d(C)]
    cbn.load(model, path)
    assert [(bn.training, bn.frozen) for bn in model] == [(False, False), (True, False)]
    cbn.save(model, path)
    cbn.load(cbn.freeze(model), path)
    assert [(bn.training, bn.frozen) for bn in model] == [(False, True), (True, True)]


class Own(cbn.BatchNorm1d):
    def __init__(self):
        super().__init__(C)


def test_layers_with_a_constructor_of_their_own(path):
    cbn.save([filled(Own(), 1)], path)
    model = [Own()]
    cbn.load(model, path)
    assert_same_state(model, cbn.state_dict([filled(Own(), 1)]))


def test_numpy_reads_it(path):
    cbn.save(build(seed=1), path)
    with np.load(path, allow_pickle=False) as file:
        content = dict(file)
    config = json.loads(str(content.pop("config")))
    assert config["class"] == "model"
    assert list(config["layers"]) == ["features.1", "head.norm", "head.last"]
    assert config["layers"]["head.norm"]["num_features"] == 4
    np.testing.assert_equal(content, cbn.state_dict(build(seed=1)))


def test_equal_states_make_equal_files(tmp_path):
    for name in ("a", "b"):
        cbn.save(build(seed=1), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_many_layers_and_strange_names(path):
    names = [
        *map(str, range(300)),
        "größe",
        "../up",
        "a/b\\c",
        "config",
        "weight",
        "npy.npy",
        "x.y",
    ]
    names += ["long" * 10_000]

    def many(seed=None):
        layers = {name: cbn.BatchNorm1d(C) for name in names}
        return {n: filled(bn, seed) for n, bn in layers.items()} if seed else layers

    cbn.save(many(seed=1), path)
    model = many()
    cbn.load(model, path)
    assert_same_state(model, cbn.state_dict(many(seed=1)))


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 60_000], ids=["nul", "half", "long"])
def test_names_that_cannot_be_written(name, tmp_path):
    text = (
        "model: expected names of text without NUL and of at most 60000 bytes to save, got "
        f"{(name + '.weight')[:40]!r}; rename the key"
    )
    with refused(text):
        cbn.save({name: cbn.BatchNorm1d(C)}, tmp_path / "norms.npz")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("function", [cbn.save, cbn.load])
def test_a_model_without_norm_layers(function, path):
    text = (
        "model: expected at least one norm layer in the model, got PosixPath with none among 0; "
        "layers are found in dicts, lists, tuples and attributes"
    )
    with refused(text):
        function(path, path)  # the arguments in the wrong order, say


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        (
            {"weight": np.ones(3)},
            "head.norm.weight: expected float64 of shape (4,) to save, got float64 of shape (3,)",
        ),
        (
            {"num_batches_tracked": np.array(-1)},
            "head.norm.num_batches_tracked: expected a writable array of shape () with an integer",
        ),
        ({"momentum": np.nan}, "head.norm.momentum: expected a finite number, or None for"),
    ],
    ids=["shape", "counter", "momentum"],
)
def test_save_refuses_what_load_would(attributes, text, tmp_path):
    model = build()
    vars(model["head"]["norm"]).update(attributes)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        cbn.save(model, tmp_path / "norms.npz")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("function", [cbn.save, cbn.load])
@pytest.mark.parametrize("attribute", ["eps", "training"])
def test_the_layer_of_an_attribute_of_the_wrong_kind_is_named(attribute, function, path):
    model = build(seed=1)
    cbn.save(model, path)
    before = path.read_bytes()
    vars(model["features"][1])[attribute] = "no"
    with pytest.raises(TypeError, match=rf"^features\.1\.{attribute}: expected .*, got 'no'$"):
        function(model, path)
    assert path.read_bytes() == before


def test_a_failed_write_leaves_what_was_there(path, monkeypatch):
    cbn.save(build(seed=1), path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        cbn.save(build(seed=2), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


# ---------------------------------------------------------------------------- what load refuses


UNFIT = "a state file of cbn, got one that is damaged or foreign"
ANOTHER = "a state file of this model, got one of another"


def assert_refused(model, path, reason, expected=UNFIT):
    """The file is refused for this reason, and the model is as it was."""
    before = cbn.state_dict(model)
    text = f"{path}: expected {expected}: {reason}"
    with pytest.raises(cbn.StateFileError, match=f"^{re.escape(text)}"):
        cbn.load(model, path)
    assert_same_state(model, before)


LAYERS = "layers: expected those of this model, got missing layers "


def layers_of(**layers):
    return {name: filled(bn, 3) for name, bn in layers.items()}


@pytest.mark.parametrize(
    ("saved", "reason"),
    [
        (cbn.BatchNorm1d(2), "a: expected num_features=3, as in this model, got 2"),
        (
            cbn.BatchNorm2d(C),
            "a: expected class='BatchNorm1d', as in this model, got 'BatchNorm2d'",
        ),
        (cbn.BatchNorm1d(C, 1e-3), "a: expected eps=1e-05, as in this model, got 0.001"),
        (cbn.BatchNorm1d(C, momentum=None), "a: expected momentum=0.1, as in this model, got None"),
        (cbn.BatchNorm1d(C, bias=False), "a: expected bias=True, as in this model, got False"),
        (
            cbn.BatchNorm1d(C, dtype=float),
            "a: expected dtype='float32', as in this model, got 'float64'",
        ),
        (
            cbn.BatchNorm1d(C, channel_axis=-1),
            "a: expected channel_axis=1, as in this model, got -1",
        ),
        (
            cbn.BatchNorm1d(C, track_running_stats=False),
            "a: expected track_running_stats=True, as in this model, got False",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_configuration(saved, reason, path):
    cbn.save({"a": saved}, path)
    assert_refused(layers_of(a=cbn.BatchNorm1d(C)), path, reason, ANOTHER)


def test_other_layers(path):
    cbn.save(layers_of(a=cbn.BatchNorm1d(C), b=cbn.BatchNorm1d(C)), path)
    model = layers_of(b=cbn.BatchNorm1d(C), c=cbn.BatchNorm1d(C))
    assert_refused(model, path, LAYERS + "['c'] and unexpected layers ['a']", ANOTHER)


def test_a_larger_model(path):
    cbn.save([cbn.BatchNorm1d(C) for _ in range(40)], path)
    reason = LAYERS + "[] and unexpected layers ['1', '2', "
    assert_refused([cbn.BatchNorm1d(C)], path, reason, ANOTHER)


def test_the_file_of_a_layer(path):
    cbn.BatchNorm1d(C).save(path)
    text = (
        f"{path}: expected a state file of a model, got one of BatchNorm1d; "
        "use BatchNorm1d.load(path)"
    )
    with refused(text, cbn.StateFileError):
        cbn.load(cbn.BatchNorm1d(C), path)


def test_the_file_of_a_model_as_that_of_a_layer(path):
    cbn.save(cbn.BatchNorm1d(C), path)
    text = (
        f"{path}: expected a state file of BatchNorm1d, got one of a model; "
        "use cbn.load(model, path)"
    )
    with refused(text, cbn.StateFileError):
        cbn.BatchNorm1d.load(path)


def test_missing_file(path):
    with pytest.raises(FileNotFoundError, match=path.name):
        cbn.load(build(), path)


def test_read_only_arrays_are_not_the_fault_of_the_file(path):
    cbn.save(build(seed=1), path)
    model = build()
    model["head"]["norm"].running_var.flags.writeable = False
    with pytest.raises(
        ValueError, match=r"^head\.norm\.running_var: expected a writable"
    ) as caught:
        cbn.load(model, path)
    assert type(caught.value) is ValueError


def rewrite(path, change, model=None):
    """Exchange arrays in a valid file, or change its configuration."""
    cbn.save(model or build(seed=1), path)
    with np.load(path) as file:
        content = dict(file)
    if callable(change):
        config = json.loads(str(content["config"]))
        change(config)
        change = {"config": np.array(json.dumps(config))}
    content |= change
    np.savez(path, **{name: value for name, value in content.items() if value is not None})


KEYS_OF_A_LAYER = (
    "head.norm: expected the keys ['activation', 'affine', 'bias', 'channel_axis', 'class', "
    "'correction', "
    "'dtype', 'eps', 'frozen', 'has_running_stats', 'momentum', 'nonfinite', 'num_features', "
    "'track_running_stats', 'training'], got "
)
FILES = {
    "missing": ({"head.norm.weight": None}, "expected the arrays ['features.1.bias', "),
    "extra": ({"gamma": np.ones(C)}, "expected the arrays ['features.1.bias', "),
    "shape": (
        {"head.norm.weight": np.ones(5)},
        "head.norm.weight: expected float64 of shape (4,), got float64 of shape (5,)",
    ),
    "dtype": (
        {"head.norm.weight": np.ones(4, np.float32)},
        "head.norm.weight: expected float64 of shape (4,), got float32 of shape (4,)",
    ),
    "counter": (
        {"head.norm.num_batches_tracked": np.array(-1)},
        "state['head.norm.num_batches_tracked']: expected an integer from 0 to 2**63 - 1, got -1",
    ),
    "no-class": (lambda c: c.pop("class"), "class: expected 'model', got 'None'"),
    "more-keys": (
        lambda c: c.update(x=1),
        "config: expected the keys ['class', 'layers'], got missing keys [] and unexpected keys "
        "['x']",
    ),
    "list": (lambda c: c.update(layers=[]), "layers: expected an object of objects, got []"),
    "list-inside": (
        lambda c: c["layers"].update({"head.norm": 1}),
        "layers: expected an object of objects, got {'features.1'",
    ),
    "no-eps": (
        lambda c: c["layers"]["head.norm"].pop("eps"),
        KEYS_OF_A_LAYER + "missing keys ['eps'] and unexpected keys []",
    ),
    "unknown-key": (
        lambda c: c["layers"]["head.norm"].update(zeta=1),
        KEYS_OF_A_LAYER + "missing keys [] and unexpected keys ['zeta']",
    ),
    "long": (
        {"config": np.array("x" * 99_999)},
        "config: expected a short string, got <U99999 of shape ()",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_do_not_fit(kind, path):
    change, reason = FILES[kind]
    rewrite(path, change)
    assert_refused(build(), path, reason)


def test_rewritten_as_it_was_it_is_valid(path):
    rewrite(path, lambda config: None)
    model = build()
    cbn.load(model, path)
    assert_same_state(model, cbn.state_dict(build(seed=1)))


def test_truncated_or_changed_at_any_point(path):
    """What still loads is what was saved; what does not leaves the model as it was."""
    cbn.save({"a": filled(cbn.BatchNorm1d(2), 1)}, path)
    content, model = path.read_bytes(), {"a": cbn.BatchNorm1d(2)}
    fresh, expected = cbn.state_dict(model), cbn.state_dict({"a": filled(cbn.BatchNorm1d(2), 1)})
    loaded = 0
    for position in range(0, len(content), 7):
        flipped = content[position] ^ 0xFF
        for damaged in (
            content[:position],
            content[:position] + bytes([flipped]) + content[position + 1 :],
        ):
            path.write_bytes(damaged)
            try:
                cbn.load(model, path)
            except cbn.StateFileError:
                assert_same_state(model, fresh)
            else:
                loaded += 1
                assert_same_state(model, expected)
                cbn.load_state_dict(model, fresh)
    assert loaded < len(content) // 20


def test_terabytes_promised_take_no_memory(path):
    rewrite(path, {})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = "head.norm.weight.npy"
    members[name] = members[name].replace(b"(4,), }", b"(4000000000000,), }")[: len(members[name])]
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    assert_refused(build(), path, "head.norm.weight.npy: expected 32000000000000 bytes of float64")


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_files_that_are_older_than_nonfinite_of_instance_norm(nonfinite, path):
    options = {"track_running_stats": True, "nonfinite": nonfinite}
    saved = {"norm": filled(cbn.InstanceNorm1d(C, track_running_stats=True))}
    rewrite(path, lambda config: config["layers"]["norm"].pop("nonfinite"), saved)
    model = {"norm": cbn.InstanceNorm1d(C, **options)}
    if nonfinite == "propagate":
        cbn.load(model, path)
        assert_same_state(model, cbn.state_dict(saved))
    else:
        reason = "norm: expected nonfinite='skip', as in this model, got 'propagate'"
        assert_refused(model, path, reason, ANOTHER)


# ------------------------------------------------------------------------------ models of all norms


def model_of_all(row=(C, 6), **of_instance):
    return {
        "conv": np.ones(3),
        "blocks": [
            filled(NORMS["InstanceNorm1d"].layer(C, **of_instance)),
            filled(NORMS["GroupNorm"].layer(C)),
            {
                "row": filled(NORMS["LayerNorm"].layer(row=row)),
                "rms": filled(NORMS["RMSNorm"].layer(row=row, dtype="float64")),
            },
        ],
        "head": cbn.BatchNorm1d(C),
    }


NAMES = ["blocks.0", "blocks.1", "blocks.2.row", "blocks.2.rms", "head"]


def test_all_norms_are_found():
    found = cbn.named_norm_layers(model_of_all())
    assert [name for name, _ in found] == NAMES
    assert len({type(layer) for _, layer in found}) == 5


def test_a_model_of_all_norms_is_saved_and_loaded(path):
    options = {"affine": True, "track_running_stats": True}
    saved, fresh = model_of_all(**options), model_of_all(**options)
    for _, layer in cbn.named_norm_layers(fresh):
        layer.reset_parameters()
    cbn.save(saved, path)
    cbn.load(fresh, path)
    assert_same_state(fresh, cbn.state_dict(saved))
    other = model_of_all(**options)
    other["blocks"][2]["row"] = cbn.LayerNorm((C, 7))
    assert_refused(
        other,
        path,
        "blocks.2.row: expected normalized_shape=[3, 7], as in this model, got [3, 6]",
        ANOTHER,
    )


def test_only_layers_with_statistics_are_frozen_and_reset():
    tracking = model_of_all(track_running_stats=True)
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
    without = [layer for _, layer in cbn.named_norm_layers(model_of_all()["blocks"])]
    with pytest.raises(ValueError, match="expected at least one norm layer with running statistic"):
        cbn.freeze(without)
