"""LayerNorm and RMSNorm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from numpy.typing import DTypeLike

from cbn import _norms, _scalars
from cbn._types import Config, Shape
from cbn.layers._base import NormLayer


class _RowNorm(NormLayer, of_cbn=True):
    """A layer that normalises over the last axes.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        Lengths of the last axes, over which to normalise.
    """

    _smallest: ClassVar[dict[str, Any]] = {"normalized_shape": [1]}
    _required = ("normalized_shape",)
    _shown: ClassVar[tuple[str, ...]] = ("eps", "elementwise_affine", "bias")
    _centred: ClassVar[bool]

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: str | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        self._normalized_shape = _norms.lengths_of(normalized_shape)
        self.eps = _scalars.non_negative("eps", eps)
        self.elementwise_affine = _scalars.flag("elementwise_affine", elementwise_affine)
        self._set_up(self._normalized_shape, self.elementwise_affine, bias, device, dtype)

    def _set_norm(self) -> None:
        self._norm = _norms.layer(self._normalized_shape, self._centred)

    @property
    def normalized_shape(self) -> Shape:
        """Lengths of the last axes, over which the layer normalises."""
        return self._normalized_shape

    __call__ = _normalise = NormLayer._normalise

    def _config(self) -> Config:
        return {**super()._config(), "normalized_shape": list(self.normalized_shape)}

    @classmethod
    def _parameter_shape_of(cls, config: Config) -> Shape:
        return _norms.lengths_of(config["normalized_shape"])


class LayerNorm(_RowNorm, of_cbn=True):
    """Layer normalisation: every row of the last axes by its own statistics.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, with the mean and the biased variance of
    the last axes, in training and in eval mode.

    Parameters
    ----------
    elementwise_affine : bool
        Whether to scale by ``weight`` and shift by ``bias``.

    References
    ----------
    Ba, Kiros and Hinton, "Layer Normalization" (2016). Arguments and state follow
    ``torch.nn.LayerNorm``.

    Examples
    --------
    >>> import numpy as np, cbn
    >>> norm = cbn.LayerNorm(2)
    >>> norm(np.array([[1, 3], [10, 30]], dtype=np.float32)).round(3)
    array([[-1.,  1.],
           [-1.,  1.]], dtype=float32)
    """

    _saved = ("normalized_shape", "eps", "elementwise_affine", "dtype", "bias")
    _centred = True


class RMSNorm(_RowNorm, of_cbn=True):
    """Division by the root mean square of the last axes.

    ``y = x / sqrt(mean(x**2) + eps) * weight``

    Parameters
    ----------
    eps : float or None
        Added to the mean square, >= 0. None: ``numpy.finfo(dtype).eps``.
    elementwise_affine : bool
        Whether to scale by ``weight``.

    Attributes
    ----------
    weight : ndarray of shape normalized_shape, or None
        Parameter. Edits in place take effect at the next call.
    weight_grad : ndarray of shape normalized_shape, or None
        Gradient of the last ``backward``.
    training : bool
        The mode, which changes nothing here.
    eps
        As above, a number.

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). Arguments and state follow
    ``torch.nn.RMSNorm``.

    Examples
    --------
    >>> import numpy as np, cbn
    >>> norm = cbn.RMSNorm(2)
    >>> norm(np.array([[1, 7]], dtype=np.float32)).round(3)
    array([[0.2, 1.4]], dtype=float32)
    """

    _saved = ("normalized_shape", "eps", "elementwise_affine", "dtype")
    _shown = ("eps", "elementwise_affine")
    _centred = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: str | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        eps = _norms.default_eps(_scalars.dtype(dtype)) if eps is None else eps
        super().__init__(normalized_shape, eps, elementwise_affine, False, device, dtype)
