"""The state of a model: the arrays of all its norm layers under PyTorch's names, and their file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cbn import _schema
from cbn._arrays import writable
from cbn._state_dict import load_arrays
from cbn._types import Array, Config, Expected, Target
from cbn.layers import NormLayer

# What a file tells of a layer and a program decides.
MODES = ("training", "frozen")
# Names of members in an archive: a NUL would end one, and zipfile has two bytes for its length.
LONGEST_NAME = 60_000

Layers = Mapping[str, NormLayer]


def arrays(layers: Layers) -> dict[str, Array]:
    """Those that the layers themselves hold."""
    return {
        joined(name, key): array
        for name, layer in layers.items()
        for key, array in layer._state().items()
    }


def joined(name: str, key: str) -> str:
    """PyTorch's name of an array: that of the layer, then that of the array in it."""
    return f"{name}.{key}" if name else key


def save(layers: Layers, path: Target) -> None:
    """Write the file, if load() could read it."""
    from cbn import _state_files  # here, because zipfile and json are half of cbn's import time

    config = _config(layers)
    for name, layer in layers.items():
        cls = layer._class_of_cbn  # one derived from it may have another constructor
        with _of_layer(name):
            expected = cls._expected_state({**config["layers"][name], "class": cls.__name__})
        _schema.savable(layer._state(), expected, joined(name, ""))
    state = arrays(layers)
    for name in state:
        _check_member_name(name)
    _state_files.save(path, config, state)


def load(layers: Layers, path: Target) -> None:
    """Read a file into the layers: all of it, or nothing."""
    import json  # here, as in save()

    from cbn import _state_files

    state = arrays(layers)
    for name, array in state.items():
        writable(name, array)
    text = json.dumps(_config(layers))
    own = json.loads(text)  # which makes lists of tuples, as in the file

    def expected(config: Config) -> Expected:
        _schema.same_class(config.get("class"), _schema.MODEL)
        _schema.config_keys(config, own)
        later = {name: layer._later for name, layer in layers.items()}
        _check_same_layers(config["layers"], own["layers"], later)
        return {name: (array.dtype, array.shape) for name, array in state.items()}

    # Room for another model's, whose layers are then named in the error.
    longest = _state_files.LONGEST_CONFIG + 10 * len(text)
    _, new = _state_files.load(path, expected, longest)
    with _state_files.damage_named(path):  # a counter below 0
        load_arrays(state, new, True, "model")


def _config(layers: Layers) -> Config:
    configs = {}
    for name, layer in layers.items():
        with _of_layer(name):
            configs[name] = layer._config()
    return {"class": _schema.MODEL, "layers": configs}


@contextmanager
def _of_layer(name: str) -> Iterator[None]:
    """Name the layer of a model before its attribute."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(joined(name, str(error))) from error


def _check_member_name(name: str) -> None:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:  # half of a character
        size = LONGEST_NAME + 1
    if "\0" in name or size > LONGEST_NAME:
        raise ValueError(
            f"model: expected names of text without NUL and of at most {LONGEST_NAME} bytes to "
            f"save, got {name[:40]!r}; rename the key"
        )


def _check_same_layers(
    saved: Any, expected: Mapping[str, Mapping[str, Any]], later: Mapping[str, Mapping[str, Any]]
) -> None:
    """Whether a file has the layers of a model, with their configurations.

    later: what an older file does not tell of each layer.
    """
    if not isinstance(saved, dict) or not all(isinstance(each, dict) for each in saved.values()):
        raise ValueError(f"layers: expected an object of objects, got {str(saved)[:40]}")
    missing = [name for name in expected if name not in saved]
    unexpected = [name for name in saved if name not in expected]
    if missing or unexpected:
        raise _schema.OfAnotherModel(
            f"layers: expected those of this model, got missing layers {missing[:8]} and "
            f"unexpected layers {unexpected[:8]}"
        )
    for name, config in expected.items():
        layer, seen = name or "model", {**later[name], **saved[name]}
        if seen.get("class") == config["class"]:  # another has other keys
            _schema.config_keys(seen, config, layer)
        for key in ("class", *config):
            if key not in MODES and seen.get(key) != config[key]:
                raise _schema.OfAnotherModel(
                    f"{layer}: expected {key}={config[key]!r}, as in this model, got "
                    f"{repr(seen.get(key))[:40]}"
                )
