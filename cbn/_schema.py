"""What a state file must say, and hold, to be that of a layer or a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cbn._statistics import batch_count
from cbn._types import Array, Expected

# What the file of a model stands under where that of a layer has the name of its class.
MODEL = "model"


class OfAnotherModel(ValueError):
    """What a file says of its layers may be right, but not for this model."""


class OfAnotherClass(ValueError):
    """A file may be good where another is expected; the message is whole but for the path."""


def same_class(saved: Any, expected: str) -> None:
    if saved == expected:
        return
    if not isinstance(saved, str) or not saved.isidentifier():
        raise ValueError(f"class: expected {expected!r}, got {str(saved)[:40]!r}")
    if saved == MODEL:
        whose, remedy = "a model", "cbn.load(model, path)"
    else:
        whose, remedy = saved[:40], f"{saved[:40]}.load(path)"
    this = "a model" if expected == MODEL else expected
    raise OfAnotherClass(f"expected a state file of {this}, got one of {whose}; use {remedy}")


def config_keys(
    config: Mapping[str, Any], expected: Mapping[str, Any], name: str = "config"
) -> None:
    missing, unexpected = expected.keys() - config.keys(), config.keys() - expected.keys()
    if missing or unexpected:
        raise ValueError(
            f"{name}: expected the keys {sorted(expected)}, got missing keys {sorted(missing)} and "
            f"unexpected keys {sorted(unexpected)[:8]}"
        )


def savable(state: Mapping[str, Array], expected: Expected, prefix: str = "") -> None:
    """Whether load() would take what save() is about to write."""
    for name in state.keys() | expected.keys():
        wanted = "no array" if name not in expected else "{} of shape {}".format(*expected[name])
        seen = "none" if name not in state else f"{state[name].dtype} of shape {state[name].shape}"
        if wanted != seen:
            raise ValueError(f"{prefix}{name}: expected {wanted} to save, got {seen}")
    if "num_batches_tracked" in state:
        batch_count(state["num_batches_tracked"], prefix)
