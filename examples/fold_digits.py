"""Fold the norm layers of the digits network into its convolutions, and compare the two.

In inference batch normalisation is one scale and one shift for each channel, which the convolution
before it can take in. The network without norm layers has to recognise the same digits. How much
time that saves is the share of the norm layers: here little, because convolutions in NumPy are slow
and the bias that they take over is a pass over the data as well.

    python examples/fold_digits.py

needs what `digits.py` needs, whose network it trains.
"""

import argparse
import copy
import sys
import time

import numpy as np
from digits import load_scans, train
from digits_network import Array, DigitsNetwork

import cbn


def fold(network: DigitsNetwork) -> DigitsNetwork:
    """Make a network without norm layers that computes the same.

    Parameters
    ----------
    network : DigitsNetwork
        With norm layers, in eval mode. Is not changed.

    Returns
    -------
    DigitsNetwork
        Of convolutions whose weights and biases do what the norm layers did.
    """
    folded = DigitsNetwork(normalised=False)
    for name, layer in folded.layers.items():
        if name.startswith("relu"):
            continue
        original = network.layers[name]
        if name.startswith("conv"):
            bn = copy.copy(network.layers[name.replace("conv", "norm")])
            bn.activation = None  # a layer of its own here
            layer.weight, layer.bias = cbn.fold_conv(original.weight, original.bias, bn)
        else:
            layer.load_state_dict(original.state_dict())
    return folded


def time_both(
    networks: tuple[DigitsNetwork, DigitsNetwork], images: Array, repeats: int
) -> list[float]:
    """Time the networks on all images in turns, and return the shortest of each in seconds."""
    shortest = [float("inf")] * 2
    # On one thread: those of NumPy's products keep the cores busy for a while after each, and
    # waiting for them would count as time of the norm layers.
    with cbn.num_threads(1):
        for _ in range(repeats):
            for index, network in enumerate(networks):
                start = time.perf_counter()
                network.forward(images)
                shortest[index] = min(shortest[index], time.perf_counter() - start)
    return shortest


def compare(epochs: int, seed: int, repeats: int) -> None:
    """Train a network, fold it, and compare predictions, logits and times.

    Parameters
    ----------
    epochs : int
        Passes over the training images.
    seed : int
        Seed of the initial weights and of the mini-batches.
    repeats : int
        How often each network is timed.
    """
    train_images, test_images, train_labels, test_labels = load_scans()
    network = DigitsNetwork(normalised=True, seed=seed)
    train(network, train_images, train_labels, epochs, seed, "digits")
    folded = fold(network.eval())

    before, after = network.forward(test_images), folded.forward(test_images)
    same = before.argmax(axis=1) == after.argmax(axis=1)
    accuracy = np.mean(after.argmax(axis=1) == test_labels)
    print(f"Layers before: {len(network.layers)}, after: {len(folded.layers)}")
    print(f"Same predictions: {same.sum()} of {len(same)} test images, {accuracy:.2%} right")
    print(f"Largest difference of logits: {np.abs(after - before).max():.1e}")
    print(f"Largest logit: {np.abs(before).max():.1f}")

    slow, fast = time_both((network, folded), test_images, repeats)
    print(f"Time before: {slow * 1e3:.2f} ms, after: {fast * 1e3:.2f} ms (best of {repeats})")
    if not same.all():
        sys.exit("The folded network recognises other digits.")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("--epochs", type=int, default=5, help="default: %(default)s")
    option("--seed", type=int, default=0, help="of weights and batches; default: %(default)s")
    option("--repeats", type=int, default=50, help="of the timing; default: %(default)s")
    arguments = parser.parse_args()
    if arguments.epochs < 1 or arguments.repeats < 1:
        parser.error("--epochs and --repeats must be at least 1")
    compare(arguments.epochs, arguments.seed, arguments.repeats)


if __name__ == "__main__":
    main()
