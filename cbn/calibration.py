"""Running statistics measured anew: those of a whole stream of batches, or of one batch.

The running average of training trails behind the weights, forgets early batches, and averages the
variances of batches, which leaves out how far their means lie apart. Here the statistics of every
batch are merged into those of all values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from cbn import _scalars, _statistics
from cbn._types import Array
from cbn.layers import ChannelNorm, NormLayer
from cbn.model import some_layers, statistics_writable, unfrozen_layers

if TYPE_CHECKING:
    from cbn._core import Saved

__all__ = ["recalibrate", "reinitialize_norm_stats"]

Batch = TypeVar("Batch")


def recalibrate(
    model: object,
    batches: Iterable[Batch],
    forward: Callable[[Batch], Any],
    progress: bool = False,
) -> list[str]:
    """Set the running statistics of all norm layers to those of a whole stream of batches.

    For a model whose weights have changed since, by averaging, pruning or quantising them, or
    that was trained on batches too small. With the mean, the variance and the number of values of
    all batches so far (a) and of one more (b), in float64::

        n = n_a + n_b
        mean = mean_a + (mean_b - mean_a) * n_b / n
        var = var_a * n_a / n + var_b * n_b / n + (mean_b - mean_a)**2 * n_a * n_b / n**2

    At the end ``running_mean = mean``, ``running_var = var * n / (n - correction)`` and
    ``num_batches_tracked`` is the number of batches.

    Parameters
    ----------
    model : object
        As for :func:`named_norm_layers`.
    batches : iterable
        Of any sizes, down to one value per channel (an instance norm needs more than
        ``correction`` in each sample); a generator too: it is run through once. Empty batches
        count as none.
    forward : callable
        Runs the model on one batch. What it returns is not used.
    progress : bool
        Whether to show a progress bar, by tqdm.

    Returns
    -------
    list of str
        The names of the layers that have new statistics.

    Raises
    ------
    TypeError
        If ``batches`` is not iterable or ``forward`` not callable.
    ValueError
        If the model has no layer to recalibrate, no data reach any, there are too few values, or
        ``forward`` leaves a layer in eval mode or frozen.
    FloatingPointError
        If the statistics of a layer with ``nonfinite="raise"`` are not finite.
    ImportError
        If tqdm is asked for and missing.

    Notes
    -----
    On the way the layers are in training mode: each normalises **by the statistics of its batch**.
    That is what the weights behind it have learnt to expect. The running statistics, which are
    about to be replaced because they do not fit the model, would carry their error into the
    statistics of every layer behind. So the result for the first norm layer is exact, whatever the
    batches are; that for a layer behind another depends on the batches as the data in training
    did, and is best with batches as large as those.

    Each layer gets its mode back, and whatever is raised, by ``forward`` too, leaves all
    statistics as they were. Other kinds of layers keep theirs throughout: whoever has
    dropout switches it off first. A layer that is used several times by ``forward`` has the
    statistics of all its inputs. Those of an instance norm are averages over all samples, as in its
    training. Left as they are: layers that no data reach, frozen layers, and
    layers with ``track_running_stats=False``.

    With ``nonfinite="skip"`` a batch counts only in the channels where its statistics are finite.

    References
    ----------
    Chan, Golub and LeVeque (1983) for the formula. As ``torch.optim.swa_utils.update_bn`` and
    ``PreciseBN`` of fvcore do, but for the variance: these average it over the batches.

    Examples
    --------
    >>> import numpy as np, cbn
    >>> bn = cbn.BatchNorm1d(1).eval()
    >>> batches = [[[1.0], [2.0], [3.0]], [[4.0], [5.0]]]
    >>> cbn.recalibrate({"norm": bn}, batches, bn)
    ['norm']
    >>> bn.running_mean, bn.running_var, bn.training
    (array([3.], dtype=float32), array([2.5], dtype=float32), False)
    """
    found = unfrozen_layers(model)
    layers = {name: layer for name, layer in found.items() if layer.track_running_stats}
    some_layers("with track_running_stats=True", len(layers), len(found), model)
    # What "for" takes: by __iter__, or as a sequence of items. Not by a call of iter(), which may
    # start the workers of a loader.
    if not isinstance(batches, Iterable) and not hasattr(type(batches), "__getitem__"):
        raise TypeError(f"batches: expected an iterable of batches, got {type(batches).__name__}")
    if not callable(forward):
        raise TypeError(f"forward: expected a function of one batch, got {type(forward).__name__}")
    if _scalars.flag("progress", progress):
        batches = _with_progress(batches)
    measured = _measure(layers, batches, forward)
    if not measured:
        raise ValueError(
            "batches: expected data that reach a norm layer in training mode, got none; a "
            "generator gives its batches only once, and forward must not switch to eval mode"
        )
    return measured


def reinitialize_norm_stats(layer: ChannelNorm, batch: ArrayLike) -> None:
    """Set the running statistics of one layer to those of one batch.

    ``running_mean = mean(batch)`` and ``running_var = var(batch) * n / (n - correction)``, whatever
    they were before, NaN included: what one call in training with ``momentum = 1`` would give.
    ``num_batches_tracked`` becomes 1, and the mode stays as it is.

    Parameters
    ----------
    layer : norm layer
        With running statistics, not frozen.
    batch : array_like
        Data for it.

    Raises
    ------
    TypeError
        If ``layer`` is not a norm layer, or the batch is of another dtype.
    ValueError
        If the layer has no running statistics or is frozen, or the batch does not fit it. Then
        nothing has been changed.
    FloatingPointError
        If the statistics are not finite and the layer has ``nonfinite="raise"``.

    Examples
    --------
    >>> import cbn
    >>> bn = cbn.BatchNorm1d(1)
    >>> cbn.reinitialize_norm_stats(bn, [[1.0], [3.0]])
    >>> bn.running_mean, bn.running_var
    (array([2.], dtype=float32), array([2.], dtype=float32))
    """
    if not isinstance(layer, NormLayer):
        raise TypeError(f"layer: expected a norm layer of cbn, got {type(layer).__name__}")
    if layer.running_mean is None:
        can = hasattr(layer, "track_running_stats")
        raise ValueError(
            f"layer: expected one with running statistics, got {layer!r}; "
            + ("set layer.track_running_stats = True" if can else "this kind never has any")
        )
    if layer.frozen:
        raise ValueError(
            f"layer: expected one that is not frozen, got {layer!r}; call cbn.unfreeze(layer) first"
        )
    if not _measure({"": layer}, [batch], layer):
        raise ValueError("batch: expected at least one value per channel, got an empty batch")


def _measure(
    layers: dict[str, ChannelNorm], batches: Iterable[Batch], forward: Callable[[Batch], Any]
) -> list[str]:
    """Give the layers that a stream reaches its statistics: all of them, or none and an error."""
    statistics_writable(layers)
    with _observed(layers) as populations:
        for batch in batches:
            forward(batch)
            for name, layer in layers.items():
                if layer.frozen or not layer.training:
                    raise ValueError(
                        f"{name or 'layer'}: expected to stay in training mode and not frozen "
                        f"until the last batch, got {'frozen' if layer.frozen else 'eval mode'} "
                        f"after a call of forward; switch after recalibrate"
                    )
    reached = {name: population for name, population in populations.items() if population.calls}
    statistics = {name: population.running_statistics(name) for name, population in reached.items()}
    statistics_writable(layers)  # still: forward may have changed that
    for name, (mean, var) in statistics.items():
        layer = layers[name]
        for array, value in (
            (layer.running_mean, mean),
            (layer.running_var, var),
            (layer.num_batches_tracked, np.array(reached[name].calls)),
        ):
            if array is not None:
                array[...] = value
    return list(statistics)


@contextmanager
def _observed(layers: dict[str, ChannelNorm]) -> Iterator[dict[str, Collected]]:
    """Let layers normalise by their batches and learn nothing, but collect the statistics."""
    before = {
        name: (layer.training, layer._observer, layer._forward) for name, layer in layers.items()
    }
    try:
        populations: dict[str, Collected] = {}
        for name, layer in layers.items():
            kind = Instances if layer._averages_samples else Population
            populations[name] = kind(layer)
            layer._observer = populations[name].add
            layer.training = True
        yield populations
    finally:
        for name, layer in layers.items():
            layer.training, layer._observer, layer._forward = before[name]


class Collected:
    """What has been collected of the inputs of a layer."""

    def __init__(self, layer: ChannelNorm) -> None:
        self.calls = 0
        self._layer = layer
        self._count, self._mean, self._mean_low, self._var = np.zeros((4, layer.num_features))
        self._lock = Lock()  # forward may run the layer in several threads

    def add(self, saved: Saved) -> None:
        """Merge the statistics of a forward pass."""
        raise NotImplementedError

    def _takes(self, statistics: Array) -> Array | np.bool:
        """The channels in which a batch with these statistics counts."""
        return np.isfinite(statistics) if self._layer.nonfinite == "skip" else np.True_

    def result(self, name: str) -> tuple[Array, Array]:
        """The mean and the variance of all of them."""
        raise NotImplementedError

    def running_statistics(self, name: str) -> tuple[Array, Array]:
        """What the running statistics of the layer become: the result, where data came."""
        layer = self._layer
        old_mean, old_var = layer.running_mean, layer.running_var
        assert old_mean is not None
        assert old_var is not None
        with np.errstate(all="ignore"):
            mean, var = self.result(name)
            mean, var = mean.astype(old_mean.dtype), var.astype(old_var.dtype)
        seen = self._count > 0
        finite = np.isfinite(mean) & np.isfinite(var)
        if layer.nonfinite == "raise":
            _statistics.finite_statistics(np.flatnonzero(~finite).tolist())
        keeps = ~seen | ~finite if layer.nonfinite == "skip" else ~seen
        return np.where(keeps, old_mean, mean), np.where(keeps, old_var, var)


class Instances(Collected):
    """The statistics of all samples of an instance norm, averaged: what its training learns."""

    def add(self, saved: Saved) -> None:
        """Add those of each sample of a forward pass."""
        values, correction = saved.view.values, self._layer.correction
        if values == 0:
            return
        mean, mean_low, var = saved.statistics.reshape(3, -1, self._layer.num_features)
        _statistics.enough_values(saved.shape, values, correction, of_samples=True)
        with self._lock, np.errstate(all="ignore"):
            self.calls += 1
            means = (mean + mean_low).sum(axis=0)
            variances = var.sum(axis=0) * (values / (values - correction))
            taken = self._takes(means + variances)
            self._count += np.where(taken, len(mean), 0)
            self._mean += np.where(taken, means, 0)
            self._var += np.where(taken, variances, 0)

    def result(self, name: str) -> tuple[Array, Array]:
        """Their averages."""
        return self._mean / self._count, self._var / self._count


class Population(Collected):
    """The statistics of all values that a layer has normalised, merged batch by batch."""

    def add(self, saved: Saved) -> None:
        """Merge the statistics of a forward pass."""
        values, (mean, mean_low, var) = saved.view.values, saved.statistics
        if values == 0:
            return
        with self._lock, np.errstate(all="ignore"):
            self.calls += 1
            taken = self._takes(mean + var)
            count = self._count + np.where(taken, values, 0)
            old = self._count / np.maximum(count, 1)
            new = np.where(taken, values, 0) / np.maximum(count, 1)
            # The mean has two parts, because the difference of means that are large beside the
            # deviation would lose as many digits as one part of a mean has too few.
            distance, distance_low = _exact_sum(mean, -self._mean)
            distance_low += mean_low - self._mean_low
            merged, low = _exact_sum(self._mean, distance * new)
            low += self._mean_low + distance_low * new
            spread = (distance + distance_low) ** 2
            merged_var = self._var * old + var * new + spread * old * new
            self._mean = np.where(taken, merged, self._mean)
            self._mean_low = np.where(taken, low, self._mean_low)
            self._var = np.where(taken, merged_var, self._var)
            self._count = count

    def result(self, name: str) -> tuple[Array, Array]:
        """Those of the population."""
        correction = self._layer.correction
        counts, needed = self._count[self._count > 0], max(1.0, correction)
        if counts.size and counts.min() <= needed:
            values = "values" if needed > 1 else "value"
            raise ValueError(
                f"{name or 'layer'}: expected more than {needed:g} {values} per channel in all, "
                f"got {counts.min():g}; give more data"
            )
        unbiased = self._count / (self._count - correction)
        return self._mean + self._mean_low, self._var * unbiased


def _exact_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Add in two parts, without error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _with_progress(batches: Iterable[Batch]) -> Iterable[Batch]:
    try:
        tqdm = import_module("tqdm").tqdm
    except ImportError as error:
        raise ImportError(
            "progress: expected tqdm to be installed for progress=True, got none; "
            "install it with: pip install tqdm"
        ) from error
    bar: Iterable[Batch] = tqdm(batches, desc="recalibrate", unit="batch")
    return bar
