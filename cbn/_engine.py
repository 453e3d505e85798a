"""Every norm, forward and backward: make the call, and mend it where an argument breaks a rule.

Nothing here knows one norm from another but by its row of the table (cbn/_norms.py). Batch norm is
the norm whose running statistics may be learnt or given; instance norm learns the averages over its
samples. A pass forward returns, beside the output, what a pass backward needs of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from cbn._dispatch import kernels
from cbn._mends import mended
from cbn._types import Array

if TYPE_CHECKING:
    from cbn._core import Norm, Saved


def forward(
    x: ArrayLike,
    norm: Norm,
    dtype: np.dtype[Any] | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float,
    out: Array | None,
    least: int = 1,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    num_batches_tracked: Array | None = None,
    momentum: float | None = 0.0,
    correction: float = 0.0,
    nonfinite: str = "propagate",
    keeps: bool = True,
    activation: str | None = None,
    residual: ArrayLike | None = None,
) -> tuple[Array, Saved]:
    """Normalise x by its own statistics, and let the running statistics learn them.

    least: the values that each mean should be of. Fewer than two are refused where it is not 1;
    fewer than four are warned of where it is four, once all checks have passed and before anything
    is computed. With a counter of batches, momentum may be None: the average over all of them.
    nonfinite is that of a layer. keeps: whether a backward pass may follow; if not, nothing is
    kept for it, and there is no Saved. residual is added to what the norm makes, and activation
    taken of the sum.
    """
    given = (
        x, norm, dtype, weight, bias, eps, out, least, running_mean, running_var,
        num_batches_tracked, momentum, correction, nonfinite, keeps, activation, residual,
    )  # fmt: skip
    done: Any = kernels.forward(*given)
    return done if type(done) is tuple else mended(kernels.forward, given, done)


def forward_given(
    x: ArrayLike,
    norm: Norm,
    dtype: np.dtype[Any] | None,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float,
    out: Array | None,
    keeps: bool = True,
    activation: str | None = None,
    residual: ArrayLike | None = None,
) -> tuple[Array, Saved]:
    """Normalise x by given statistics."""
    given = (
        x, norm, dtype, running_mean, running_var, weight, bias, eps, out, keeps, activation,
        residual,
    )  # fmt: skip
    done: Any = kernels.forward_given(*given)
    return done if type(done) is tuple else mended(kernels.forward_given, given, done)


def statistics(x: ArrayLike, norm: Norm, eps: float = 0.0) -> Saved:
    """Return what a forward pass would have kept, for a backward pass without one."""
    given = x, norm, eps
    done: Saved | str = kernels.saved_statistics(*given)
    return mended(kernels.saved_statistics, given, done) if isinstance(done, str) else done


def given_statistics(
    x: ArrayLike, norm: Norm, mean: ArrayLike, var: ArrayLike, eps: float, training: bool
) -> Saved:
    """Return the same of statistics that the caller has kept."""
    given = x, norm, mean, var, training, eps
    done: Saved | str = kernels.saved_given(*given)
    return mended(kernels.saved_given, given, done) if isinstance(done, str) else done


def backward(
    saved: Saved,
    grad_output: ArrayLike,
    weight: ArrayLike | None,
    out: Array | None,
    wanted: str = "all",
    given_x: Array | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Return the gradients of input, weight, bias and residual, None for what is not wanted.

    given_x: the input of the forward pass as the caller has it, where that is another layout.
    """
    given = grad_output, saved, weight, out, wanted, given_x
    done: Any = kernels.backward(*given)
    return done if type(done) is tuple else mended(kernels.backward, given, done)
