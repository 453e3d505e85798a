"""The libraries that are compared, each behind the same two methods.

All compute on the same NumPy arrays. Functions are called, not layers, and gradients without
automatic differentiation, so that nobody pays for bookkeeping that the others do not do.
"""

from __future__ import annotations

from peer import Peer
from peers_compiled import Jax, OnnxRuntime
from peers_numpy import Cbn, NumPy
from peers_torch import OneDNN, PyTorch

PEERS: tuple[type[Peer], ...] = (Cbn, NumPy, PyTorch, OneDNN, OnnxRuntime, Jax)
