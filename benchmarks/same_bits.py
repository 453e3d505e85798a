"""Count the different results of every pass over instruction sets, thread counts and repeats.

    python benchmarks/same_bits.py
    python benchmarks/same_bits.py --threads 1 3 --repeats 1

There must be one of each. The last line is a fingerprint of all results; it is the same wherever
the results are, on another processor too. The data are made by operations that are exact or
rounded alike everywhere. All are finite: the sign and the payload of a NaN are promised nowhere.
"""

from __future__ import annotations

import argparse
import warnings
from collections import defaultdict
from collections.abc import Iterator
from hashlib import sha256
from itertools import product
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from shapes import Array
from tqdm import tqdm

import cbn
from cbn import _dispatch, functional

# (N, C, H, W), walked in every way and in one piece and many; (9, 62, 127, 127) is written past the
# cache. In the last, channels last, the first row of a sheet starts in the middle of a row of the
# table of coefficients.
SHAPES = [
    (2, 3, 1, 1),
    (4096, 16, 1, 1),
    (500, 1100, 1, 1),
    (30001, 3, 1, 1),
    (1, 64, 7, 7),
    (1, 7, 15, 15),
    (5, 65, 7, 7),
    (32, 33, 14, 14),
    (9, 5, 23, 23),
    (3, 2, 57, 57),
    (2, 1, 300, 300),
    (16, 64, 28, 28),
    (9, 62, 127, 127),
    (2, 5, 3, 3),
]
DTYPES = tuple(map(np.dtype, ("float32", "float64", "float16", bfloat16)))


def draw(shape: tuple[int, ...], seed: int, dtype: np.dtype[Any]) -> Array:
    """Uniform values whose channels differ in mean and size, with an outlier.

    Two channels of five have squares that leave the range of float32, but of float16.
    """
    rng = np.random.default_rng(seed)
    channel = rng.random((shape[1], 1, 1))
    x = (rng.random(shape) - channel) * (0.001 + 8 * channel)
    x.flat[0] = 1000
    step = 3 if dtype == np.float16 else 40
    x *= np.ldexp(1.0, step * (np.arange(shape[1]) % 5 - 2)).reshape(-1, 1, 1)
    return x.astype(dtype)


def results(x: Array, grad_output: Array, channel_axis: int) -> Iterator[tuple[str, Array]]:
    """Every result of every pass."""
    C, dtype = x.shape[channel_axis], type_of_layers(x)
    bn = cbn.BatchNorm2d(C, dtype=dtype, channel_axis=channel_axis)
    bn.weight[...] = 0.5 + np.arange(C) / C
    bn.bias[...] = np.arange(C) / C - 0.5
    for mode in ("training", "eval"):
        yield f"{mode} y", bn.train(mode == "training")(x)
        yield f"{mode} grad_input", bn.backward(grad_output)
        yield f"{mode} weight_grad", bn.weight_grad
        yield f"{mode} bias_grad", bn.bias_grad
    yield "running_mean", bn.running_mean
    yield "running_var", bn.running_var
    mean, var, _ = functional.batch_norm_stats(x, channel_axis=channel_axis)
    yield "mean", mean
    yield "var", var
    for norm in others(x, channel_axis):
        for value in norm._state().values():
            value.flat = 0.5 + np.arange(value.size) / value.size
        yield f"{norm} y", norm(x)
        yield f"{norm} grad_input", norm.backward(grad_output)
        yield f"{norm} weight_grad", norm.weight_grad
        if norm.bias_grad is not None:
            yield f"{norm} bias_grad", norm.bias_grad
    for norm in (bn.train(), *others(x, channel_axis)):
        if "activation" in norm._saved:
            norm.activation = "relu"
            yield f"{norm} y", norm(x, residual=grad_output)
            yield f"{norm} grad_input", norm.backward(grad_output)
            yield f"{norm} weight_grad", norm.weight_grad
            yield f"{norm} residual_grad", norm.residual_grad


def type_of_layers(x: Array) -> np.dtype[Any]:
    """That of the layers that take such an array."""
    return np.dtype(np.float64 if x.dtype == np.float64 else np.float32)


def others(x: Array, channel_axis: int) -> list[cbn.layers.NormLayer]:
    """The other norms that take such an array, with few groups and with many."""
    C, dtype = x.shape[channel_axis], type_of_layers(x)
    by_channel = {"dtype": dtype, "channel_axis": channel_axis}
    groups = {max(k for k in range(1, most + 1) if C % k == 0) for most in (2, 32)}
    instances = [cbn.InstanceNorm2d(C, affine=True, **by_channel)]
    return [
        *(instances if x.size > x.shape[0] * C else []),  # it refuses samples of one value
        *(cbn.GroupNorm(count, C, **by_channel) for count in sorted(groups)),
        cbn.LayerNorm(x.shape[-1], dtype=dtype),
        cbn.LayerNorm(x.shape[1:], dtype=dtype),
        cbn.RMSNorm(x.shape[-1], dtype=dtype),
    ]


def main() -> None:
    """Count, and exit with an error where there is more than one result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2, 3, 4, 7], metavar="N")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--largest", type=int, default=1 << 24, help="values in an array")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", cbn.SmallBatchWarning)
    sets = _dispatch.supported()
    shapes = [shape for shape in SHAPES if np.prod(shape) <= arguments.largest]
    kinds = list(product(shapes, (1, -1), DTYPES))
    everything = sha256()
    most = count = 0
    for shape, channel_axis, dtype in tqdm(kinds, unit="case", leave=False):
        x, grad_output = (
            np.ascontiguousarray(np.moveaxis(draw(shape, seed, dtype), 1, channel_axis))
            for seed in (1, 2)
        )
        seen: dict[str, set[bytes]] = defaultdict(set)
        for isa, threads, _ in product(sets, arguments.threads, range(arguments.repeats)):
            _dispatch.use(isa)
            with cbn.num_threads(threads):
                for name, array in results(x, grad_output, channel_axis):
                    seen[name].add(sha256(array.tobytes()).digest())
        for name, digests in seen.items():
            everything.update(b"".join(sorted(digests)))
            most = max(most, len(digests))
            count += 1
            if len(digests) > 1:
                print(f"{len(digests)} different {name}: {shape}, {channel_axis=}, {dtype}")
    print(
        f"{len(kinds)} cases, {count} results; instruction sets {', '.join(sets)}; "
        f"threads {arguments.threads}; {arguments.repeats} repeats"
    )
    print(f"most distinct results of one kind: {most}")
    print(f"fingerprint: {everything.hexdigest()[:16]}")
    raise SystemExit(most != 1)


if __name__ == "__main__":
    main()
