"""Finding the norm layers of a model: every nesting, each layer once, nothing executed."""

import collections
import dataclasses
import functools
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

import cbn


def layer():
    return cbn.BatchNorm1d(2)


def names(model):
    return [name for name, _ in cbn.named_norm_layers(model)]


class Block:
    """An object with attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


class Slotted:
    __slots__ = ("norm2", "_norm", "__norm", "never_set", "norm1")  # noqa: RUF023

    def __init__(self):
        self.norm1, self.norm2, self._norm, self.__norm = (layer() for _ in range(4))


class SlottedMore(Slotted):
    __slots__ = ("extra", "__dict__")  # noqa: RUF023

    def __init__(self):
        super().__init__()
        self.free, self.extra = layer(), layer()


class OneSlot:
    __slots__ = "norm"

    def __init__(self):
        self.norm = layer()


class IteratedSlots:
    __slots__ = iter(["norm", "act"])

    def __init__(self):
        self.norm = layer()


class SlotAgain(OneSlot):
    __slots__ = ("norm", "__dict__")  # noqa: RUF023

    def __init__(self):
        super().__init__()
        OneSlot.norm.__set__(self, layer())  # the slot of this name that nobody can reach
        vars(self)["norm"] = layer()


@dataclasses.dataclass(slots=True)
class Data:
    second: object
    first: object


class DictModel(dict):
    pass


def dict_model(key="item"):
    model = DictModel({key: layer()})
    model.attribute = layer()
    return model


def reordered():
    model = collections.OrderedDict(a=layer(), b=layer())
    model.move_to_end("a")
    return model


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (layer(), [""]),
        ([], []),
        (None, []),
        ("text", []),
        ({"a": layer(), "b": {"c": layer()}}, ["a", "b.c"]),
        ([layer(), (layer(), [layer()])], ["0", "1.0", "1.1.0"]),
        (Block(conv=1, norm=layer(), head=Block(norm=layer())), ["norm", "head.norm"]),
        (Block(_norm=layer(), __norm=layer()), ["_norm", "__norm"]),
        (Slotted(), ["norm2", "_norm", "_Slotted__norm", "norm1"]),
        (SlottedMore(), ["norm2", "_norm", "_Slotted__norm", "norm1", "extra", "free"]),
        (OneSlot(), ["norm"]),
        (SlotAgain(), ["norm"]),
        (IteratedSlots(), ["norm"]),
        (Data(layer(), layer()), ["second", "first"]),
        (dict_model(), ["item", "attribute"]),
        ({1: layer(), ("a", 2): layer(), None: layer()}, ["1", "('a', 2)", "None"]),
        ({"a.b": layer(), "": {"": layer()}}, ["a.b", "."]),
        (collections.OrderedDict(z=layer(), a=layer()), ["z", "a"]),
        (reordered(), ["b", "a"]),
        (collections.deque([layer(), [layer()]]), ["0", "1.0"]),
        (types.MappingProxyType({"b": layer(), "a": layer()}), ["b", "a"]),
        (types.MappingProxyType(collections.UserDict(a=layer())), ["data.a"]),
        (types.SimpleNamespace(z=layer(), a=layer()), ["z", "a"]),
        (collections.UserDict(a=layer()), ["data.a"]),
        (ValueError(layer()), []),
    ],
    ids=lambda value: None if type(value) is list else type(value).__name__,
)
def test_names(model, expected):
    assert names(model) == expected


def test_the_layers_are_those_of_the_model():
    model = {"a": layer(), "b": [layer()]}
    assert cbn.named_norm_layers(model) == [("a", model["a"]), ("b.0", model["b"][0])]


def test_the_slot_is_the_one_that_an_attribute_has():
    model = SlotAgain()
    assert cbn.named_norm_layers(model) == [("norm", model.norm)]


def test_a_layer_reached_twice_is_there_once_under_its_first_name():
    shared, block = layer(), Block(norm=layer())
    assert names({"a": shared, "b": [shared, block], "c": block}) == ["a", "b.1.norm"]


def test_the_first_name_is_that_of_the_walk_in_depth():
    shared = layer()
    assert names({"deep": [[shared]], "shallow": shared}) == ["deep.0.0"]


def test_cycles_end():
    model = Block(norm=layer(), parts=[])
    model.parts += [model, {"up": model, "parts": model.parts}, layer()]
    assert names(model) == ["norm", "parts.2"]


def test_nesting_deeper_than_calls_may_be():
    depth = 20_000
    inner = layer()
    model = inner
    for level in range(depth):
        model = ([model], {"x": model}, Block(x=model))[level % 3]
    [(name, found)] = cbn.named_norm_layers(model)
    assert found is inner
    assert name.count(".") == depth - 1


def test_a_layer_inside_a_norm_layer():
    outer = layer()
    outer.second = layer()
    assert names([outer]) == ["0", "0.second"]


class Lazy:
    """Whoever asks it for anything executes something."""

    def fail(self, *_):
        raise AssertionError("executed")

    norm = property(fail)
    __class__ = property(fail)
    __getattr__ = __getattribute__ = __iter__ = __len__ = __eq__ = __bool__ = fail
    __hash__ = None


class OwnDict:
    __slots__ = ("norm",)
    __dict__ = property(Lazy.fail)

    def __init__(self):
        self.norm = layer()


class LazyItems(dict):
    items = __iter__ = __getitem__ = keys = Lazy.fail


class LazyOrder(collections.OrderedDict):
    items = __iter__ = __getitem__ = keys = Lazy.fail


class LazyQueue(collections.deque):
    copy = __copy__ = __iter__ = __getitem__ = __len__ = Lazy.fail


def test_nothing_is_executed():
    lazy = Lazy()
    object.__getattribute__(lazy, "__dict__")["kept"] = layer()
    model = {
        "lazy": lazy,
        "dict": OwnDict(),
        "items": LazyItems(a=layer()),
        "order": LazyOrder(a=layer()),
        "queue": LazyQueue([layer()]),
        "view": types.MappingProxyType(LazyItems(a=layer())),
    }
    expected = ["lazy.kept", "dict.norm", "items.a", "order.a", "queue.0", "view.a"]
    assert names(model) == expected


def function():
    return None


function.norm = layer()


class ClassWithNorm:
    norm = layer()


module = types.ModuleType("module")
module.norm = layer()


class Array:
    """As PyTorch's and JAX's arrays are: with attributes, and one method by which NumPy knows."""

    def __init__(self):
        self.norm = layer()

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("executed")


class Text(str):
    norm: object


text = Text("text")
text.norm = layer()


@pytest.mark.parametrize(
    "end",
    [
        function,
        Block().__init__,
        functools.partial(function, layer()),
        ClassWithNorm,
        ClassWithNorm(),
        module,
        Array(),
        np.array([layer()], object),
        text,
        {layer()},
        frozenset([layer()]),
    ],
    ids=lambda end: type(end).__name__,
)
def test_not_searched(end):
    assert names([end, layer()]) == ["1"]


def test_tensors_are_not_searched(torch):
    tensor = torch.ones(3)
    tensor.norm = layer()
    assert names({"x": tensor, "norm": layer()}) == ["norm"]


def test_layers_on_a_module_of_torch(torch):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    model[0].norm = layer()
    assert names(model) == ["0.norm"]
    model.block = torch.nn.Module()
    model.block.norm, model.block.parts = layer(), [layer(), model]
    model.norm = layer()
    assert names({"model": model}) == [
        f"model.{name}" for name in ("0.norm", "block.norm", "block.parts.0", "norm")
    ]


def test_as_named_modules_of_torch(torch):
    """The same nesting in both, with a layer that is shared."""

    def build(norm, module, listed):
        model, block = module(), module()
        block.norm1, block.act, block.norm2 = norm(2), module(), norm(2)
        model.stem, model.blocks, model.again = norm(2), listed([block, norm(2)]), block.norm1
        return model

    theirs = build(torch.nn.BatchNorm1d, torch.nn.Module, torch.nn.ModuleList)
    expected = [n for n, m in theirs.named_modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert names(build(cbn.BatchNorm1d, Block, list)) == expected


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"a.b": layer(), "a": {"b": layer()}}, "a.b"),
        ({1: layer(), "1": layer()}, "1"),
        (dict_model("attribute"), "attribute"),
    ],
    ids=["dot", "number", "attribute"],
)
def test_the_same_name_twice_is_refused(model, name):
    text = (
        f"model: expected a name of its own for every norm layer, got {name!r} for two; rename a "
        f"key (dots in keys, 1 beside '1', and a key beside an attribute of the same name make "
        f"names that are the same)"
    )
    with refused(text):
        cbn.named_norm_layers(model)


LEAVES = st.sampled_from(["norm", 1, None, "text"])
NESTINGS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(lambda d: Block(**d))
    ),
    max_leaves=20,
)


def planted(value):
    """The nesting with a layer of its own for every "norm"."""
    if value == "norm":
        return layer()
    if isinstance(value, (list, tuple)):
        return type(value)(map(planted, value))
    if isinstance(value, dict):
        return {key: planted(part) for key, part in value.items()}
    return Block(**planted(vars(value))) if isinstance(value, Block) else value


def count(value):
    parts = vars(value) if isinstance(value, Block) else value
    parts = parts.values() if isinstance(parts, dict) else parts
    return (
        sum(map(count, parts))
        if isinstance(value, (list, tuple, dict, Block))
        else (value == "norm")
    )


def followed(model, name):
    for key in name.split(".") if name else []:
        if isinstance(model, (list, tuple)):
            model = model[int(key)]
        else:
            model = model[key] if isinstance(model, dict) else getattr(model, key)
    return model


@given(NESTINGS)
def test_every_name_leads_to_its_layer_and_none_is_missing(nesting):
    model = planted(nesting)
    found = cbn.named_norm_layers(model)
    assert all(followed(model, name) is bn for name, bn in found)
    assert len({id(bn) for _, bn in found}) == len(found) == count(nesting)
