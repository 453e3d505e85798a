"""Layer norm and RMS norm: every row of the last axes by its own statistics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cbn import _checks
from cbn._types import Array, Shape
from cbn.functional import _groups


def layer_norm(
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
) -> Array:
    """Normalise x over its last axes.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, with the mean and the biased variance of
    the last axes, and a weight and a bias for each of their values.

    Parameters
    ----------
    x : array_like
        Float32 or float64 data whose last axes are ``normalized_shape``, in any memory layout.
        Never modified.
    normalized_shape : int or sequence of int
        Lengths of the axes to normalise over.
    weight, bias : array_like of shape normalized_shape, optional
        Scale and shift of each value; 1 and 0 where absent.
    eps : float
        Added to the variance, >= 0.
    out : ndarray, optional
        Array of the shape and dtype of ``x`` to write to: ``x`` itself or memory apart from it.

    Returns
    -------
    ndarray
        The normalised data, of the shape and dtype of ``x``; ``out`` if that was given.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as above.

    References
    ----------
    Ba, Kiros and Hinton, "Layer Normalization" (2016). Arguments follow
    ``torch.nn.functional.layer_norm``.

    Examples
    --------
    >>> import numpy as np
    >>> from cbn.functional import layer_norm
    >>> layer_norm(np.array([[1.0, 3.0], [10.0, 30.0]]), 2, eps=0.0)
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    shape = _checks.normalized_shape(normalized_shape)
    return _groups.forward(x, rows_of(shape), None, shape, weight, bias, eps, True, out)[0]


def layer_norm_backward(
    grad_output: ArrayLike,
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return the gradients of a loss with respect to the input, the weight and the bias.

    With ``x_hat = (x - mean) / sqrt(var + eps)``, ``g = weight * grad_output``, means over the
    normalised axes and sums over the others::

        grad_bias = sum(grad_output)
        grad_weight = sum(grad_output * x_hat)
        grad_input = (g - mean(g) - x_hat * mean(g * x_hat)) / sqrt(var + eps)

    Parameters
    ----------
    grad_output : array_like, shape and dtype of x
        Gradient with respect to the output. Never modified.
    x : array_like
        Input of the forward call, whose statistics are computed once more; a layer keeps them.
    normalized_shape, weight, eps
        As for :func:`layer_norm`.
    out : ndarray, optional
        Array to write ``grad_input`` to: ``grad_output`` or ``x`` itself, or memory apart.

    Returns
    -------
    grad_input : ndarray, shape and dtype of x
    grad_weight, grad_bias : ndarray of shape normalized_shape, dtype of x

    Raises
    ------
    TypeError, ValueError
        If an argument is not as above.

    References
    ----------
    Ba, Kiros and Hinton, "Layer Normalization" (2016), differentiated.

    Examples
    --------
    >>> import numpy as np
    >>> from cbn.functional import layer_norm_backward
    >>> gradients = layer_norm_backward([[1.0, 0.0, 0.0]], [[1.0, 2.0, 3.0]], 3, eps=0.0)
    >>> [gradient.round(3).tolist() for gradient in gradients]
    [[[0.204, -0.408, 0.204]], [-1.225, 0.0, 0.0], [1.0, 0.0, 0.0]]
    """
    shape = _checks.normalized_shape(normalized_shape)
    x = _checks.array("x", x)
    forward = _groups.of_input(x, rows_of(shape), shape, eps, True)
    return _groups.backward(forward, grad_output, weight, out, x)[:3]


def rms_norm(
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    out: Array | None = None,
) -> Array:
    """Divide x by the root mean square over its last axes.

    ``y = x / sqrt(mean(x**2) + eps) * weight``

    Parameters
    ----------
    x : array_like
        Float32 or float64 data whose last axes are ``normalized_shape``, in any memory layout.
        Never modified.
    normalized_shape : int or sequence of int
        Lengths of the axes to normalise over.
    weight : array_like of shape normalized_shape, optional
        Scale of each value; 1 where absent.
    eps : float or None
        Added to the mean square, >= 0. None: ``numpy.finfo(x.dtype).eps``.
    out : ndarray, optional
        Array of the shape and dtype of ``x`` to write to: ``x`` itself or memory apart from it.

    Returns
    -------
    ndarray
        The normalised data, of the shape and dtype of ``x``; ``out`` if that was given.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as above.

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). Arguments follow
    ``torch.nn.functional.rms_norm``.

    Examples
    --------
    >>> from cbn.functional import rms_norm
    >>> rms_norm([[1.0, 7.0]], 2, eps=0.0)
    array([[0.2, 1.4]])
    """
    shape = _checks.normalized_shape(normalized_shape)
    x = _checks.array("x", x)
    eps = default_eps(x.dtype) if eps is None else eps
    return _groups.forward(x, rows_of(shape), None, shape, weight, None, eps, False, out)[0]


def rms_norm_backward(
    grad_output: ArrayLike,
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Return the gradients of a loss with respect to the input and the weight.

    With ``rms = sqrt(mean(x**2) + eps)``, ``x_hat = x / rms`` and ``g = weight * grad_output``::

        grad_weight = sum(grad_output * x_hat)
        grad_input = (g - x_hat * mean(g * x_hat)) / rms

    Parameters
    ----------
    grad_output : array_like, shape and dtype of x
        Gradient with respect to the output. Never modified.
    x : array_like
        Input of the forward call, whose mean squares are computed once more; a layer keeps them.
    normalized_shape, weight, eps
        As for :func:`rms_norm`.
    out : ndarray, optional
        Array to write ``grad_input`` to: ``grad_output`` or ``x`` itself, or memory apart.

    Returns
    -------
    grad_input : ndarray, shape and dtype of x
    grad_weight : ndarray of shape normalized_shape, dtype of x

    Raises
    ------
    TypeError, ValueError
        If an argument is not as above.

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), differentiated.

    Examples
    --------
    >>> from cbn.functional import rms_norm_backward
    >>> gradients = rms_norm_backward([[1.0, 0.0]], [[1.0, 7.0]], 2, eps=0.0)
    >>> [gradient.round(3).tolist() for gradient in gradients]
    [[[0.196, -0.028]], [0.2, 0.0]]
    """
    shape = _checks.normalized_shape(normalized_shape)
    x = _checks.array("x", x)
    eps = default_eps(x.dtype) if eps is None else eps
    forward = _groups.of_input(x, rows_of(shape), shape, eps, False)
    return _groups.backward(forward, grad_output, weight, out, x)[:2]


def default_eps(dtype: np.dtype[Any]) -> float:
    """That of RMS norm, PyTorch's: the spacing of numbers of the element type at 1."""
    single = dtype.itemsize == 4  # in any byte order
    return float(np.finfo(np.float32 if single else np.float64).eps)


@lru_cache
def rows_of(normalized_shape: Shape) -> _groups.GroupingOf:
    """The grouping of an array by its last axes."""
    return lru_cache(partial(_rows, normalized_shape))


def _rows(normalized_shape: Shape, shape: Shape) -> _groups.Grouping:
    _checks.last_axes("x", shape, normalized_shape)
    values = prod(normalized_shape)
    return 1, 1, prod(shape[: len(shape) - len(normalized_shape)]), values, values, 1
