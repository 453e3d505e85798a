"""The libraries that are compared, each behind the same two methods.

All compute on the same NumPy arrays. For batch norm functions are called, not layers, and
gradients without automatic differentiation, so that nobody pays for bookkeeping that the others do
not do. The other norms are layers where a library has layers: PyTorch's forward is without a graph,
its backward is torch.autograd.grad on one that is kept. What a library cannot do is left out: ONNX
Runtime and OpenVINO have no gradients and are given channels first alone; oneDNN is here for batch
norm.
"""

from __future__ import annotations

from peers_base import Peer
from peers_compiled import Jax, OnnxRuntime, OpenVino
from peers_numpy import Cbn, NumPy
from peers_torch import OneDNN, PyTorch, TorchCompile

PEERS: tuple[type[Peer], ...] = (
    Cbn,
    NumPy,
    PyTorch,
    TorchCompile,
    OneDNN,
    OnnxRuntime,
    OpenVino,
    Jax,
)
