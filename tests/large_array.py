"""A script, not a test: normalise 2.5e9 values in place. It needs 10 GB of memory and a minute.

    python tests/large_array.py

Indices beyond 2^31 and offsets beyond 2^33 bytes occur in every pass; the values are compared with
those of a single sample, of which the array is made.
"""

from __future__ import annotations

import argparse

import numpy as np
from tqdm import tqdm

import cbn
from cbn import reference

SHAPE = (3072, 64, 112, 112)


def main() -> None:
    """Fill, normalise in eval mode and in training, and compare every value."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=SHAPE[0])
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    for axis in (1, -1):
        sample = rng.standard_normal(SHAPE[1:], dtype=np.float32)
        sample = sample if axis == 1 else np.ascontiguousarray(np.moveaxis(sample, 0, -1))
        x = np.empty((arguments.samples, *sample.shape), np.float32)
        bn = cbn.BatchNorm2d(SHAPE[1], channel_axis=axis)
        bn.running_mean[...], bn.running_var[...] = rng.uniform(0.5, 2, (2, SHAPE[1]))
        for training in (False, True):
            # What distinguishes samples is exact, so that the result of each is known.
            for index in tqdm(range(len(x)), desc="fill", leave=False):
                np.multiply(sample, 2 - index % 2 * 3, out=x[index])
            mean, var = bn.running_mean, bn.running_var
            if training:
                pair = np.stack([x[0], x[1]])
                mean, var, _ = reference.batch_norm_stats(pair, channel_axis=axis)
            expected = [
                reference.batch_norm(x[k : k + 1], mean, var, channel_axis=axis)[0] for k in (0, 1)
            ]
            y = bn.train(training)(x, out=x)
            assert y is x
            largest = max(
                np.abs(y[index] - expected[index % 2][0]).max()
                for index in tqdm(range(len(y)), desc="compare", leave=False)
            )
            print(f"{x.size:.3g} values, channel_axis={axis}, {training=}: {largest:.1e} off")
            assert largest < 1e-5
        del x, y


if __name__ == "__main__":
    main()
