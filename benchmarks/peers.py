"""The libraries that are compared, each behind the same two methods.

All compute on the same NumPy arrays. For batch norm functions are called, not layers, and
gradients without automatic differentiation, so that nobody pays for bookkeeping that the others do
not do. The other norms are layers, of cbn and PyTorch alone: PyTorch's forward is without a graph,
its backward is torch.autograd.grad on one that is kept.
"""

from __future__ import annotations

from peer import Peer
from peers_compiled import Jax, OnnxRuntime
from peers_numpy import Cbn, NumPy
from peers_torch import OneDNN, PyTorch

PEERS: tuple[type[Peer], ...] = (Cbn, NumPy, PyTorch, OneDNN, OnnxRuntime, Jax)
