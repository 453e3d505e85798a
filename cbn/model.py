"""The norm layers of a whole model: found by name, reset, frozen, saved and loaded together.

A model is any nesting of dicts, lists, tuples and objects with attributes; nothing need be
registered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from cbn import _model_state, _walk
from cbn._arrays import writable
from cbn._docstrings import documented_by
from cbn._state_dict import IncompatibleKeys, load_arrays
from cbn._types import Array, Target
from cbn.layers import ChannelNorm, NormLayer

__all__ = [
    "freeze",
    "load",
    "load_state_dict",
    "named_norm_layers",
    "reset_norm_stats",
    "save",
    "state_dict",
    "unfreeze",
]

Model = TypeVar("Model")


# ----------------------------------------------------------------------------------------- layers


def named_norm_layers(model: object) -> list[tuple[str, NormLayer]]:
    """Return every norm layer of a model with its dotted name, as PyTorch's ``named_modules`` does.

    Parameters
    ----------
    model : object
        Any nesting of dicts, lists, tuples, deques and objects with attributes, cycles included.
        Private attributes and slots count as well; a property is never executed. Not searched are
        sets, arrays (NumPy's of objects, and whatever has ``__array__``), modules, classes,
        functions and what ``functools.partial`` has bound.

    Returns
    -------
    list of (str, layer)
        Each layer once, under the first name by which it is reached, in the order of definition.
        A name consists of keys, indices and attributes, ``"features.1"``; keys that are not strings
        count as ``str(key)``, and a child of a PyTorch module has PyTorch's name. The name of a
        model that is itself a norm layer is ``""``.

    Raises
    ------
    ValueError
        If two layers get the same name, as with ``{"a.b": layer, "a": {"b": another}}``, or a key
        of a dict and an attribute beside it.

    Examples
    --------
    >>> import cbn
    >>> model = {"features": [None, cbn.BatchNorm2d(3)], "head": cbn.BatchNorm1d(4)}
    >>> [name for name, layer in cbn.named_norm_layers(model)]
    ['features.1', 'head']
    """
    found: list[tuple[str, NormLayer]] = list(
        _walk.find(model, NormLayer)  # type: ignore[type-abstract]  # of any class derived from it
    )
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"model: expected a name of its own for every norm layer, got {twice!r} for two; "
            f"rename a key (dots in keys, 1 beside '1', and a key beside an attribute of the same "
            f"name make names that are the same)"
        )
    return found


def layers_with_statistics(model: object) -> dict[str, ChannelNorm]:
    """The layers that have running statistics, frozen ones included; at least one, or an error."""
    found = named_norm_layers(model)
    layers = {
        name: layer
        for name, layer in found
        if isinstance(layer, ChannelNorm) and layer.running_mean is not None
    }
    some_layers("with running statistics", len(layers), len(found), model)
    return layers


def unfrozen_layers(model: object) -> dict[str, ChannelNorm]:
    """Those of them whose running statistics may change; at least one, or an error."""
    found = layers_with_statistics(model)
    layers = {name: layer for name, layer in found.items() if not layer.frozen}
    remedy = "call cbn.unfreeze(model) first"
    some_layers("that is not frozen", len(layers), len(found), model, remedy)
    return layers


def some_layers(
    which: str,
    count: int,
    of: int,
    model: object,
    remedy: str = "layers are found in dicts, lists, tuples and attributes",
) -> None:
    if count == 0:
        raise ValueError(
            f"model: expected at least one norm layer {which}, got {type(model).__name__} with "
            f"none among {of}; {remedy}"
        )


# ------------------------------------------------------------------------------------- statistics


def reset_norm_stats(model: object) -> None:
    """Set the running statistics of all norm layers to mean 0 and variance 1, after no batch.

    Parameters
    ----------
    model : object
        As for :func:`named_norm_layers`. Layers without running statistics and frozen layers stay
        as they are, and so do all parameters.

    Raises
    ------
    ValueError
        If the model has no norm layer with running statistics that is not frozen, or one of the
        arrays is read-only. Then nothing has been changed.

    Examples
    --------
    >>> import cbn
    >>> model = [cbn.BatchNorm1d(2, running_mean=5)]
    >>> cbn.reset_norm_stats(model)
    >>> model[0].running_mean
    array([0., 0.], dtype=float32)
    """
    layers = unfrozen_layers(model)
    statistics_writable(layers)
    for layer in layers.values():
        layer.reset_running_stats()


def statistics_writable(layers: dict[str, ChannelNorm]) -> None:
    for name, layer in layers.items():
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            writable(_model_state.joined(name, key), getattr(layer, key))


def freeze(model: Model) -> Model:
    """Let all norm layers use and keep their running statistics, in training mode too.

    For fine-tuning on batches too small, or too unlike the first data, for statistics of their
    own. A frozen layer does in training what it does in eval mode: it normalises by the running
    statistics, which stay as they are, and ``backward`` counts them as constants. ``weight`` and
    ``bias`` still get their gradients. ``train()`` and ``eval()`` change the mode as ever, and the
    layer stays frozen until :func:`unfreeze`.

    Whether a layer is frozen stands in its attribute ``frozen`` and in its repr; copies, pickles
    and the files of ``layer.save`` have it, state dictionaries do not.

    Parameters
    ----------
    model : object
        As for :func:`named_norm_layers`; a single layer will do. Layers without running statistics
        stay as they are: they do the same in both modes, and there is nothing to freeze.

    Returns
    -------
    object
        The model.

    Raises
    ------
    ValueError
        If the model has no norm layer with running statistics.

    Examples
    --------
    >>> import cbn
    >>> bn = cbn.freeze(cbn.BatchNorm1d(2))
    >>> bn.train()([[1.0, 2.0], [3.0, 4.0]]).round(2).tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    >>> bn.running_mean.tolist()
    [0.0, 0.0]
    """
    for layer in layers_with_statistics(model).values():
        layer.frozen = True
    return model


@documented_by(freeze)
def unfreeze(model: Model) -> Model:
    """Let all norm layers learn running statistics again: undo :func:`freeze`.

    Examples
    --------
    >>> import cbn
    >>> cbn.unfreeze(cbn.freeze(cbn.BatchNorm1d(2))).frozen
    False
    """
    for layer in layers_with_statistics(model).values():
        layer.frozen = False
    return model


# ------------------------------------------------------------------------------------------- state


def state_dict(model: object) -> dict[str, Array]:
    """Return a copy of the parameters and statistics of all norm layers, under PyTorch's names.

    Parameters
    ----------
    model : object
        As for :func:`named_norm_layers`.

    Returns
    -------
    dict of str to ndarray
        By the name of the layer, then that of the array: ``"features.1.weight"``. What is not part
        of a norm layer is not in it. A layer that is reached in several ways is in it once, under
        its first name; PyTorch repeats it under every name.

    Examples
    --------
    >>> import cbn
    >>> list(cbn.state_dict({"norm": cbn.BatchNorm1d(3, affine=False)}))
    ['norm.running_mean', 'norm.running_var', 'norm.num_batches_tracked']
    """
    arrays = _model_state.arrays(dict(named_norm_layers(model)))
    return {name: np.array(array) for name, array in arrays.items()}


@documented_by(NormLayer.load_state_dict)
def load_state_dict(
    model: object, state: Mapping[str, ArrayLike], strict: bool = True
) -> IncompatibleKeys:
    """Copy parameters and statistics into all norm layers of a model: all, or none and an error.

    Parameters
    ----------
    model : object
        As for :func:`named_norm_layers`.
    state : mapping of str to array_like
        As :func:`state_dict` returns it, or what PyTorch's ``model.state_dict()`` holds of norm
        layers. Real numbers of any type are cast to the dtypes of the layers.
    strict : bool
        Whether the keys must be exactly those of the norm layers. Otherwise what is missing keeps
        its value, and what is unexpected, such as a convolution in PyTorch's, is passed over.

    Examples
    --------
    >>> import cbn
    >>> model = [cbn.BatchNorm1d(1, affine=False)]
    >>> state = {"0.running_mean": [5.0], "1.weight": [[2.0]]}
    >>> cbn.load_state_dict(model, state, strict=False).unexpected_keys
    ['1.weight']
    >>> model[0].running_mean
    array([5.], dtype=float32)
    """
    return load_arrays(_model_state.arrays(dict(named_norm_layers(model))), state, strict, "model")


@documented_by(NormLayer.save)
def save(model: object, path: Target) -> None:
    """Write all norm layers of a model to one .npz file, without pickle.

    The file is written whole or not at all, under the very name given. It holds the arrays of
    :func:`state_dict` and the configuration of each layer; what is not a norm layer is not in it.

    Parameters
    ----------
    model : object
        As for :func:`named_norm_layers`.

    Raises
    ------
    TypeError, ValueError
        If the model has no norm layer, a name cannot be written, or an attribute of a layer has
        been given a value that no layer can be made with.
    OSError
        If it cannot be written; what was there stays.

    Examples
    --------
    >>> import tempfile, pathlib, cbn
    >>> model = {"norm": cbn.BatchNorm2d(3, running_mean=5)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "norms.npz")
    ...     cbn.save(model, path)
    ...     cbn.reset_norm_stats(model)
    ...     cbn.load(model, path)
    >>> model["norm"].running_mean
    array([5., 5., 5.], dtype=float32)
    """
    _model_state.save(_norm_layers(model), path)


def load(model: object, path: Target) -> None:
    """Read a file that :func:`save` wrote into the norm layers of a model: all of it, or nothing.

    The program makes the model; the file must have the same layers, by name, with the same
    configurations. The modes are the program's too: which layers are in training mode, and which
    are frozen, stays as it is.

    Parameters
    ----------
    model : object
        As for :func:`named_norm_layers`.
    path : str, path or open binary file
        The file. Nothing in it is trusted: it is read without pickle, and sizes are checked
        against those of the model before memory is taken.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    StateFileError
        If the file is damaged or foreign, or a layer or its configuration differs; the message
        names it. A kind of ValueError.
    TypeError, ValueError
        If the model has no norm layer, one of its arrays is read-only, or an attribute of a layer
        has been given a value that no layer can be made with.
    """
    _model_state.load(_norm_layers(model), path)


def _norm_layers(model: object) -> dict[str, NormLayer]:
    """All of them; at least one, or an error."""
    layers = dict(named_norm_layers(model))
    some_layers("in the model", len(layers), len(layers), model)
    return layers
