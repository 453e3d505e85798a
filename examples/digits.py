"""Train a small network on real handwritten digits, with and without batch normalisation.

Both networks start from the same weights and see the same mini-batches at the same learning rate.
Then a fresh process loads the one with batch normalisation and has to compute the same logits.

    python examples/digits.py

needs scikit-learn (for its 1,797 scans), matplotlib and tqdm beside cbn. `digits_network.py` holds
the network itself, which needs only NumPy and cbn.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from digits_network import Array, DigitsNetwork
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

Labels = NDArray[np.int64]

BATCH_SIZE = 64
# Of 0.02, 0.05, 0.1 and 0.2 the best for the network without batch normalisation, averaged over
# three seeds: the comparison is fair to it. The network with it is the better one at all four.
LEARNING_RATE = 0.1
MOMENTUM = 0.9
REQUIRED_ACCURACY = 0.97

NETWORK_FILE = "network.npz"
LOGITS_FILE = "test_logits.npy"
FIGURE_FILE = "loss_curves.png"


def load_scans() -> tuple[Array, Array, Labels, Labels]:
    """Load the scans, split into four fifths for training and one fifth for the test.

    Returns
    -------
    train_images, test_images : ndarray of float32, shape (N, 1, 8, 8)
        Grey values in [0, 1].
    train_labels, test_labels : ndarray of int64, shape (N,)
        The digits they show.
    """
    scans = load_digits()
    images = (scans.images[:, np.newaxis] / 16).astype(np.float32)
    # The split does not follow --seed: the verifying process must find the same test set.
    return train_test_split(
        images, scans.target, test_size=0.2, stratify=scans.target, random_state=0
    )


def softmax_cross_entropy(logits: Array, labels: Labels) -> tuple[float, Array]:
    """Compute the mean cross-entropy of a batch, and its gradient.

    Parameters
    ----------
    logits : ndarray of float32, shape (N, 10)
        Output of the network.
    labels : ndarray of int64, shape (N,)
        The right digits.

    Returns
    -------
    loss : float
        Mean of -log(probability of the right digit).
    grad_logits : ndarray of float32, shape (N, 10)
        Gradient of `loss` with respect to `logits`.
    """
    N = len(labels)
    shifted = logits - logits.max(axis=1, keepdims=True)  # exp() of a large logit overflows
    log_probability = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    right = np.arange(N), labels
    grad_logits = np.exp(log_probability)
    grad_logits[right] -= 1
    return -float(log_probability[right].mean()), grad_logits / N


def train(
    network: DigitsNetwork, images: Array, labels: Labels, epochs: int, seed: int, title: str
) -> NDArray[np.float64]:
    """Train by stochastic gradient descent with momentum.

    Parameters
    ----------
    network : DigitsNetwork
        Is changed in place.
    images : ndarray of float32, shape (N, 1, 8, 8)
        Training images.
    labels : ndarray of int64, shape (N,)
        Their digits.
    epochs : int
        Passes over the training images.
    seed : int
        Seed of the order in which they are seen.
    title : str
        Name of the progress bar.

    Returns
    -------
    ndarray of float64, shape (epochs, batches)
        Loss of each mini-batch.
    """
    generator = np.random.default_rng(seed)
    # The images left over at the end of an epoch are too few for statistics as good as the rest,
    # yet would weigh as much in the running averages. They sit out; the next epoch draws others.
    batches = len(images) // BATCH_SIZE
    losses = np.empty((epochs, batches))
    velocities = [np.zeros_like(parameter) for parameter in network.parameters()]
    network.train()
    with tqdm(total=epochs * batches, desc=title, unit="batch") as progress:
        for epoch in range(epochs):
            order = generator.permutation(len(images))[: batches * BATCH_SIZE]
            for batch, chosen in enumerate(order.reshape(batches, BATCH_SIZE)):
                logits = network.forward(images[chosen])
                losses[epoch, batch], grad_logits = softmax_cross_entropy(logits, labels[chosen])
                network.backward(grad_logits)
                # The rate falls linearly to zero, so that the weights come to rest and the
                # running statistics, which trail behind them, catch up.
                rate = LEARNING_RATE * (1 - progress.n / progress.total)
                for parameter, gradient, velocity in zip(
                    network.parameters(), network.gradients(), velocities, strict=True
                ):
                    velocity *= MOMENTUM
                    velocity += gradient
                    parameter -= rate * velocity
                progress.set_postfix(
                    epoch=epoch + 1, loss=f"{losses[epoch, : batch + 1].mean():.4f}", refresh=False
                )
                progress.update()
    return losses


def draw_losses(losses: dict[str, NDArray[np.float64]], path: Path) -> None:
    """Draw the training losses, one curve for each network.

    Parameters
    ----------
    losses : dict
        Losses of shape (epochs, batches) by the name that the legend shows.
    path : Path
        File to write.
    """
    plt.switch_backend("Agg")  # the figure goes to a file and needs no display
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    colours = "tab:blue", "tab:orange"
    for colour, (name, loss) in zip(colours, losses.items(), strict=True):
        epochs, batches = loss.shape
        position = np.arange(1, loss.size + 1) / batches
        axes.plot(position, loss.ravel(), color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(np.arange(epochs) + 0.5, loss.mean(axis=1), "o-", color=colour, label=name)
    axes.set(
        title=f"Handwritten digits: same start, same batches, same learning rate {LEARNING_RATE}",
        xlabel="epoch",
        ylabel="training loss (cross-entropy)",
        yscale="log",
        xlim=(0, epochs),
    )
    axes.grid(alpha=0.3)
    axes.legend(title="thin: each batch, dots: mean of the epoch")
    figure.savefig(path, dpi=150)


def verify(folder: Path) -> bool:
    """Load a saved network and compare its test logits, bit for bit, with those saved beside it.

    Parameters
    ----------
    folder : Path
        Folder that an earlier run has written.

    Returns
    -------
    bool
        Whether all logits are the same.
    """
    _, test_images, _, _ = load_scans()
    logits = DigitsNetwork.load(folder / NETWORK_FILE).forward(test_images)
    expected = np.load(folder / LOGITS_FILE, allow_pickle=False)
    same = logits.tobytes() == expected.tobytes()
    outcome = "bit-identical to" if same else "DIFFERENT from"
    print(f"Fresh process: the logits of {len(logits)} test images are {outcome} the saved ones.")
    return same


def compare(epochs: int, seed: int, folder: Path) -> None:
    """Train both networks, save the one with batch normalisation and have it verified.

    Parameters
    ----------
    epochs : int
        Passes over the training images.
    seed : int
        Seed of the initial weights and of the mini-batches.
    folder : Path
        Folder for the files; it is made if need be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train_images, test_images, train_labels, test_labels = load_scans()
    print(f"{len(train_images)} scans to learn from, {len(test_images)} to be tested on.")
    networks = {
        "with batch norm": DigitsNetwork(normalised=True, seed=seed),
        "without": DigitsNetwork(normalised=False, seed=seed),
    }
    losses, accuracies = {}, {}
    for name, network in networks.items():
        losses[name] = train(network, train_images, train_labels, epochs, seed, f"{name:15}")
        accuracies[name] = float(np.mean(network.predict(test_images) == test_labels))

    print("\nTest accuracy")
    for name, accuracy in accuracies.items():
        print(f"  {name:15}  {accuracy:.2%}")

    network = networks["with batch norm"]
    network.save(folder / NETWORK_FILE)
    np.save(folder / LOGITS_FILE, network.forward(test_images))
    draw_losses(losses, folder / FIGURE_FILE)
    print("\nWritten")
    print(f"  {folder / NETWORK_FILE}: the network with batch norm")
    print(f"  {folder / LOGITS_FILE}: its logits for the test images")
    print(f"  {folder / FIGURE_FILE}: the training losses of both")

    print(flush=True)  # before the other process writes to the same place
    fresh = subprocess.run([sys.executable, __file__, "--verify", folder], check=False)
    if fresh.returncode:
        sys.exit("The saved network does not compute the same in a fresh process.")
    if accuracies["with batch norm"] < REQUIRED_ACCURACY:
        sys.exit(
            f"Test accuracy with batch norm is {accuracies['with batch norm']:.2%}, "
            f"below the required {REQUIRED_ACCURACY:.0%}; more epochs may help."
        )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("--epochs", type=int, default=15, help="default: %(default)s")
    option("--seed", type=int, default=0, help="of weights and batches; default: %(default)s")
    option("--output", type=Path, default="digits_output", help="folder; default: %(default)s")
    option("--verify", type=Path, metavar="DIR", help="train nothing, check the files in DIR")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    if arguments.verify:
        sys.exit(0 if verify(arguments.verify) else 1)
    compare(arguments.epochs, arguments.seed, arguments.output)


if __name__ == "__main__":
    main()
