"""Time cbn in company: beside busy processes, between other libraries' calls, and after they leave.

    python benchmarks/company.py
    python benchmarks/company.py --situations "1 neighbour" matmul --niceness 5 --seconds 2
    python benchmarks/company.py --json company.json --figure company.png

Each situation is a process of its own, so that no other library's threads are there:

- alone, back to back and with other work on the calling thread between the calls;
- beside neighbours, busy processes each in a login session of its own: Linux shares the CPUs out
  among sessions, as it does among containers;
- after neighbours: they leave in the middle, and the time until ten calls in a row are fast again;
- pairs, a call of another library and one of cbn in alternation: NumPy's matmul (OpenBLAS),
  scikit-learn's KMeans.predict (an OpenMP of its own), PyTorch's conv2d (cbn's OpenMP), and ONNX
  Runtime's convolution (a pool of its own). What is not installed is left out.

cbn by default, cbn on one thread and PyTorch take turns of 0.3 s; the first turn of each is not
counted. Every call is a sample. Outputs are allocated by the call, with a warm heap.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from compare import HEAP, start_with
from tqdm import tqdm

import cbn

SHAPES = {"10^5": (1, 32, 56, 56), "10^6": (8, 160, 28, 28), "10^7": (32, 100, 56, 56)}
SMALL = (1, 64, 56, 56)
PASSES = ("inference", "training", "backward")
TURN = 0.3
BUSY = "while True: pass"
Call = Callable[[], object]


def main() -> None:
    """Measure every situation in a process of its own, print a table and draw a figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--situations", choices=SITUATIONS, nargs="+", default=list(SITUATIONS))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each library and pass")
    parser.add_argument("--niceness", type=int, default=0, help="of the neighbours")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--figure", type=Path, help="draw them to this file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    start_with(HEAP)
    if arguments.here:  # one situation, in this process
        rows = SITUATIONS[arguments.situations[0]](arguments)
        print(json.dumps(list(rows)))
        return
    versions = {"cbn": cbn.__version__, "NumPy": np.__version__, "Python": sys.version.split()[0]}
    print(
        f"{cpus()} CPUs, kernels {cbn.show_config('dicts')['instruction set']['active']}", versions
    )
    rows = []
    for name in tqdm(arguments.situations, unit="situation", file=sys.stderr):
        options = ["--seconds", str(arguments.seconds), "--niceness", str(arguments.niceness)]
        done = subprocess.run(
            [sys.executable, __file__, "--here", "--situations", name, *options],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        for row in json.loads(done.stdout):
            rows.append({"situation": name, **row})
            print_row(rows[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    if arguments.figure:
        draw(rows, arguments.figure)


def print_row(row: dict[str, Any]) -> None:
    """Print the medians and 99th percentiles in microseconds, or one number of seconds."""
    times = "  ".join(
        f"{name} {median:.0f} ({p99:.0f})" for name, (median, p99) in row["times"].items()
    )
    notes = "  ".join(f"{name} {value:.2f}" for name, value in row.get("numbers", {}).items())
    print(f"{row['situation']:22} {row['work']:22} {times}  {notes}", flush=True)


# ------------------------------------------------------------------------------------ what is timed


def calls_of(pass_: str, shape: tuple[int, ...]) -> dict[str, Call]:
    """The same pass of cbn, of cbn on one thread, and of PyTorch, if that is installed."""
    x, grad = np.random.default_rng(0).standard_normal((2, *shape), dtype=np.float32)
    layer = cbn.BatchNorm2d(shape[1]).train(pass_ != "inference")
    layer(x)
    call: Call = (lambda: layer.backward(grad)) if pass_ == "backward" else (lambda: layer(x))
    calls = {"cbn": call, "cbn, one thread": on_one_thread(call)}
    if find_spec("torch"):
        calls["PyTorch"] = torch_call(pass_, x, grad)
    return calls


def on_one_thread(call: Call) -> Call:
    """The call with ``cbn.num_threads(1)``."""

    def alone() -> None:
        with cbn.num_threads(1):
            call()

    return alone


def torch_call(pass_: str, x: Any, grad: Any) -> Call:
    """The pass in PyTorch, without a graph where none is needed."""
    import torch

    layer = torch.nn.BatchNorm2d(x.shape[1]).train(pass_ != "inference")
    tensor, gradient = torch.from_numpy(x), torch.from_numpy(grad)
    if pass_ == "backward":
        tensor.requires_grad_()
        output, inputs = layer(tensor), [tensor, *layer.parameters()]
        return lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True)

    def call() -> None:
        with torch.no_grad():
            layer(tensor)

    return call


def time_turns(
    calls: dict[str, Call], seconds: float, between: Call | None = None
) -> dict[str, list[float]]:
    """Seconds of every call, in turns; ``between`` runs untimed before each."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(1 + max(1, round(seconds / TURN))):
        for name, call in calls.items():
            end = perf_counter() + TURN
            while (start := perf_counter()) < end:
                if between:
                    between()
                    start = perf_counter()
                call()
                if turn:
                    samples[name].append(perf_counter() - start)
    return samples


def summary(samples: dict[str, list[float]]) -> dict[str, list[float]]:
    """Median and 99th percentile in microseconds, by name."""
    return {
        name: [float(q) * 1e6 for q in np.quantile(times, (0.5, 0.99))]
        for name, times in samples.items()
    }


def busy_for(seconds: float) -> Call:
    """Work on the calling thread that takes so long."""

    def work() -> None:
        end = perf_counter() + seconds
        while perf_counter() < end:
            pass

    return work


# --------------------------------------------------------------------------------------- situations


def alone(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """No neighbours: back to back, and with pauses."""
    for pass_ in PASSES:
        for size, shape in SHAPES.items():
            yield row(f"{pass_} {size}", calls_of(pass_, shape), arguments.seconds)
    for gap in (0, 1e-4, 3e-4, 1e-3):
        between = busy_for(gap) if gap else None
        calls = calls_of("inference", SMALL)
        yield row(f"1x64x56x56 each {gap * 1e3:g} ms", calls, arguments.seconds, between)


def row(
    work: str, calls: dict[str, Call], seconds: float, between: Call | None = None
) -> dict[str, Any]:
    """One line of the table."""
    return {"work": work, "times": summary(time_turns(calls, seconds, between))}


@contextmanager
def neighbours(number: int, niceness: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many busy processes, each in a session of its own, on all CPUs."""
    busy = [
        subprocess.Popen(
            ["nice", "-n", str(niceness), sys.executable, "-c", BUSY], start_new_session=True
        )
        for _ in range(number)
    ]
    try:
        yield busy
    finally:
        for process in busy:
            process.kill()
            process.wait()


def beside(number: int) -> Callable[[argparse.Namespace], Iterator[dict[str, Any]]]:
    """The situation of so many neighbours."""

    def situation(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
        with neighbours(number, arguments.niceness):
            for pass_ in PASSES:
                for size, shape in SHAPES.items():
                    yield row(f"{pass_} {size}", calls_of(pass_, shape), arguments.seconds)

    return situation


def afterwards(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """How long it takes to be fast again once the neighbours have left."""
    for pass_ in PASSES:
        calls = calls_of(pass_, SHAPES["10^6"])
        usual = float(np.median(time_turns({"cbn": calls["cbn"]}, 1)["cbn"]))
        with neighbours(cpus(), arguments.niceness):
            time_turns({"cbn": calls["cbn"]}, 2)
        left, fast = perf_counter(), 0
        while fast < 10 and perf_counter() < left + 10:
            start = perf_counter()
            calls["cbn"]()
            fast = fast + 1 if perf_counter() - start < 1.3 * usual else 0
        seconds = perf_counter() - left
        yield {
            "work": f"{pass_} 10^6",
            "times": {"cbn before": [usual * 1e6, usual * 1e6]},
            "numbers": {"seconds until fast": seconds},
        }


def cpus() -> int:
    """The CPUs of this process."""
    return len(os.sched_getaffinity(0))


def pairs(
    make: Callable[[], Iterator[tuple[str, Call, tuple[int, ...]]]],
) -> Callable[[argparse.Namespace], Iterator[dict[str, Any]]]:
    """The situation of alternating with another library."""

    def situation(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
        for work, partner, shape in make():
            yield pair(work, partner, shape, arguments.seconds)

    return situation


def pair(work: str, partner: Call, shape: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """Partner and cbn (training, then backward) apart and together."""
    x, grad = np.random.default_rng(0).standard_normal((2, *shape), dtype=np.float32)
    layer = cbn.BatchNorm2d(shape[1])

    def train() -> None:
        layer(x)
        layer.backward(grad)

    def both() -> None:
        partner()
        train()

    # One after the other, not in turns: the threads of either must be asleep when apart.
    samples = {}
    apart = {"partner": partner, "cbn": train, "cbn, one thread": on_one_thread(train)}
    together = {"together": both, "together, one thread": on_one_thread(both)}
    for name, call in {**apart, **together}.items():
        samples |= time_turns({name: call}, seconds)
    times = summary(samples)
    bound = times["partner"][0] + times["cbn, one thread"][0]
    mean = float(np.mean(samples["together"])) * 1e6
    numbers = {"over the sum": times["together"][0] / bound, "mean over the sum": mean / bound}
    return {"work": work, "times": times, "numbers": numbers}


def matmul() -> Iterator[tuple[str, Call, tuple[int, ...]]]:
    """Layers of a small and of a larger network."""
    sizes = {
        (64, 64, 8, 8): ((4096, 144), (144, 64)),
        (16, 128, 28, 28): ((2048, 512), (512, 512)),
    }
    for shape, (left, right) in sizes.items():
        a, b = (np.random.default_rng(0).random(s, dtype=np.float32) for s in (left, right))
        yield "x".join(map(str, shape)), lambda a=a, b=b: a @ b, shape


def k_means() -> Iterator[tuple[str, Call, tuple[int, ...]]]:
    """Prediction of clusters."""
    from sklearn.cluster import KMeans

    data = np.random.default_rng(0).random((4096, 16), dtype=np.float32)
    model = KMeans(8, n_init=1).fit(data)
    yield "64x64x8x8", lambda: model.predict(data), (64, 64, 8, 8)


def conv2d() -> Iterator[tuple[str, Call, tuple[int, ...]]]:
    """A convolution and its activation in PyTorch."""
    import torch

    images, kernel = torch.rand(64, 16, 8, 8), torch.rand(64, 16, 3, 3)

    def call() -> None:
        with torch.no_grad():
            torch.nn.functional.conv2d(images, kernel, padding=1).relu_()

    yield "64x64x8x8", call, (64, 64, 8, 8)


def onnx_conv() -> Iterator[tuple[str, Call, tuple[int, ...]]]:
    """A convolution in ONNX Runtime."""
    import onnxruntime
    from onnx import TensorProto, helper

    kernel = np.random.default_rng(0).random((64, 16, 3, 3), dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (64, 16, 8, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (64, 64, 8, 8))],
        [helper.make_tensor("w", TensorProto.FLOAT, kernel.shape, kernel.ravel())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    images = {"x": np.random.default_rng(0).random((64, 16, 8, 8), dtype=np.float32)}
    yield "64x64x8x8", lambda: session.run(None, images), (64, 64, 8, 8)


PAIRS = {
    "matmul": (matmul, "numpy"),
    "KMeans.predict": (k_means, "sklearn"),
    "PyTorch conv2d": (conv2d, "torch"),
    "ONNX Runtime Conv": (onnx_conv, "onnxruntime"),
}
SITUATIONS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "alone": alone,
    "1 neighbour": beside(1),
    "a neighbour per CPU": beside(cpus()),
    "afterwards": afterwards,
    **{name: pairs(make) for name, (make, package) in PAIRS.items() if find_spec(package)},
}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw medians, with a line up to the 99th percentiles, as multiples of cbn on one thread.

    Of a pair: as multiples of the partner apart and cbn apart on one thread, added up.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if row["situation"] != "afterwards"]
    colours = {"cbn": "tab:blue", "cbn, one thread": "tab:gray", "PyTorch": "tab:orange"}
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.26 * len(shown)), layout="constrained")
    for place, row in enumerate(shown):
        times = row["times"]
        unit = times["cbn, one thread"][0] + times.get("partner", [0])[0]
        if "partner" in times:
            names = {"cbn": "together", "cbn, one thread": "together, one thread"}
        else:
            names = {name: name for name in colours if name in times}
        for offset, (name, key) in zip((-0.25, 0, 0.25), names.items(), strict=False):
            median, p99 = (value / unit for value in times[key])
            axes.plot([median, p99], [place + offset] * 2, color=colours[name], linewidth=1)
            axes.plot(median, place + offset, "o", color=colours[name], markersize=4)
    for name, colour in colours.items():
        axes.plot([], [], "o-", color=colour, label=name)
    axes.set(
        xscale="log",
        xlabel="time as a multiple of cbn's on one thread (pairs: of both apart); median to p99",
        yticks=range(len(shown)),
        yticklabels=[f"{row['situation']}: {row['work']}" for row in shown],
    )
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
