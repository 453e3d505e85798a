"""Walking through a model: any nesting of dicts, lists, tuples, deques, objects with attributes.

Nothing of the model is executed on the way. What an object holds is read where the interpreter
keeps it, from its ``__dict__`` and its slots, so that no property, no ``__getattr__`` and no lazy
proxy runs. Arrays, modules, classes and functions are ends: nothing is looked for inside. So are
sets, whose parts have no names.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from gc import get_referents
from types import (
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    ModuleType,
)
from typing import Any, TypeVar

import numpy as np

Found = TypeVar("Found")

# The way from the model to a part of it: the way to what holds the part, and the part's key there.
# Linked, because a name is needed only for what is found.
Way = tuple[Any, object] | None

# What a model holds most of, and nothing is in: passed over by type alone.
PLAIN = {str, bytes, int, float, complex, bool, type(None), np.ndarray, np.dtype}
ENDS = (str, bytes, bytearray, type, ModuleType, FunctionType)


def find(root: object, kind: type[Found]) -> Iterator[tuple[str, Found]]:
    """Yield what is of a kind with its dotted name: each object once, in the order of definition.

    The order is that of a walk which goes into each part before it looks at the next, as a reader
    would. An object that can be reached in several ways has the name of the first.
    """
    # A stack of its own, because a model may be nested deeper than Python calls may be.
    stack: list[tuple[Way, object]] = [(None, root)]
    seen = set()
    while stack:
        way, value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        # The type, not isinstance(), which asks the object for its __class__.
        if issubclass(type(value), kind):
            yield _dotted(way), value  # type: ignore[misc]
        parts = [((way, key), part) for key, part in _parts(value) if type(part) not in PLAIN]
        stack.extend(reversed(parts))


def _dotted(way: Way) -> str:
    keys = []
    while way is not None:
        way, key = way
        keys.append(str(key))
    return ".".join(reversed(keys))


def _parts(value: object) -> Iterator[tuple[object, object]]:
    """What an object holds, by key, index or attribute: items first."""
    kind = type(value)
    if issubclass(kind, ENDS) or _is_array(kind):
        return
    if kind is MappingProxyType:  # its methods call those of what it is a view of
        yield from _parts(get_referents(value)[0])
        return
    yield from _items(value)
    # A slot declared again hides the first, and an entry of __dict__ under its name.
    slots: dict[str, object] = {}
    for cls in reversed(kind.__mro__):
        slots.update(_slots(cls, value))
    for name, part in (slots | _instance_dict(value) | slots).items():
        if name == "_modules" and issubclass(type(part), dict):
            yield from _items(part)  # a module of PyTorch holds its children there
        else:
            yield name, part


def _items(value: object) -> Iterator[tuple[object, object]]:
    kind = type(value)
    # The methods of the built-in types, not those that a subclass may have put over them.
    if issubclass(kind, OrderedDict):
        yield from list(OrderedDict.items(value))  # type: ignore[arg-type]
    elif issubclass(kind, dict):
        yield from list(dict.items(value))  # type: ignore[arg-type]
    elif issubclass(kind, list):
        yield from enumerate(list.copy(value))  # type: ignore[arg-type]
    elif issubclass(kind, tuple):
        yield from enumerate(tuple.__iter__(value))  # type: ignore[arg-type]
    elif issubclass(kind, deque):
        yield from enumerate(list(deque.__iter__(value)))  # type: ignore[arg-type]


def _is_array(kind: type) -> bool:
    """Whether it is NumPy's, PyTorch's, JAX's or anyone's kind of array."""
    return any("__array__" in cls.__dict__ for cls in kind.__mro__)


def _slots(cls: type, value: object) -> Iterator[tuple[str, object]]:
    declared = cls.__dict__.get("__slots__")
    if declared is None:  # members of a type written in C are its own affair
        return
    # Python sorts the slots of a class; the declaration, where it can be read again, has the order.
    private = "_" + cls.__name__.lstrip("_")
    order = list(declared) if isinstance(declared, (list, tuple, dict)) else []
    members = [
        name for name, member in cls.__dict__.items() if type(member) is MemberDescriptorType
    ]

    def place(name: str) -> int:
        plain = name if name in order else name.removeprefix(private)
        return order.index(plain) if plain in order else len(order)

    for name in sorted(members, key=place):
        try:
            yield name, cls.__dict__[name].__get__(value)
        except AttributeError:  # declared, but not set
            continue


def _instance_dict(value: object) -> dict[str, object]:
    for cls in type(value).__mro__:
        if "__dict__" in cls.__dict__:
            descriptor = cls.__dict__["__dict__"]
            # A member where the type is written in C, as that of SimpleNamespace is.
            if type(descriptor) in (GetSetDescriptorType, MemberDescriptorType):
                return dict(descriptor.__get__(value))
            break  # somebody's own property
    return {}
