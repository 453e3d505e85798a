"""Load the service with real digits from many clients, and check every single answer.

    python examples/service/load.py

starts the service and, in the middle, kills the worker that has just answered. The service has to
go on, a new worker has to answer as well, and no answer may be wrong: each is compared with
what the network computes here. A request that dies with its worker counts as interrupted and is
sent again. `app.py` says what to install and how to train the network.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
from bisect import bisect
from dataclasses import dataclass, field
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import aiohttp
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))  # this is a program in a package
from digits import load_scans
from digits_network import Array, DigitsNetwork
from service.app import NETWORK_FILE, answer
from service.images import WHITE, WHITE_PNG
from service.server import WORKERS, serve

# Then a client connects anew, as the next one would: a worker that has accepted many connections at
# once gets rid of some, and a new worker gets its share.
REQUESTS_PER_CONNECTION = 10
PATIENCE = 10  # seconds for one answer, all attempts together, and for the recovery
TOLERANCE = 1e-5  # of a probability: the BLAS of the server's processor may sum in another order


class Question(NamedTuple):
    """A request, and what has to be answered."""

    content_type: str
    body: bytes
    answer: dict[str, Any]


@dataclass
class Tally:
    """What has happened; times are in seconds since the start."""

    start: float = field(default_factory=perf_counter)
    # One entry for each answer.
    ends: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)  # with all attempts
    workers: list[int] = field(default_factory=list)  # who gave it
    wrong: int = 0
    interrupted: int = 0
    killed: int | None = None
    kill_time: float | None = None

    def now(self) -> float:
        """Return the time."""
        return perf_counter() - self.start

    def kill(self) -> None:
        """Kill the worker that has just answered."""
        self.killed = self.workers[-1] if self.workers else 0
        if not self.killed:  # to the system, 0 is this process and all its relatives
            raise RuntimeError("expected a worker to answer before the kill, got none")
        os.kill(self.killed, signal.SIGKILL)
        self.kill_time = self.now()

    def recovery_time(self) -> float | None:
        """Return when, after the kill, all workers had answered: the new one and the others."""
        if self.kill_time is None:
            return None
        first = bisect(self.ends, self.kill_time)
        seen = {self.killed}  # whose last words may still be on their way
        for end, worker in zip(self.ends[first:], self.workers[first:], strict=True):
            seen.add(worker)
            if len(seen) > WORKERS:
                return end
        return None


def make_questions(network: DigitsNetwork) -> list[Question]:
    """Make a request of each test image: half of them JSON, half PNG.

    Parameters
    ----------
    network : DigitsNetwork
        The one that the service has loaded.

    Returns
    -------
    list of Question
        Requests and their answers.
    """
    _, images, _, _ = load_scans()
    return [
        as_png(network, image) if number % 2 else as_json(network, image)
        for number, image in enumerate(images[:, 0])
    ]


def as_json(network: DigitsNetwork, image: Array) -> Question:
    """Put an image of grey values in [0, 1] into a request with JSON."""
    body = json.dumps({"image": (image * WHITE).tolist()}).encode()
    return Question("application/json", body, answer(network, image))


def as_png(network: DigitsNetwork, image: Array) -> Question:
    """Put an image of grey values in [0, 1] into a request with a PNG file."""
    pixels = np.rint(image * WHITE_PNG).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    rounded = pixels / np.float32(WHITE_PNG)
    return Question("image/png", file.getvalue(), answer(network, rounded))


def is_right(question: Question, status: int, body: bytes) -> bool:
    """Compare an answer with the expected one."""
    if status != 200:
        return False
    got = json.loads(body)
    return got["digit"] == question.answer["digit"] and np.allclose(
        got["probabilities"], question.answer["probabilities"], rtol=0, atol=TOLERANCE
    )


async def ask(session: aiohttp.ClientSession, url: str, question: Question, tally: Tally) -> None:
    """Send one request until it is answered, and enter the outcome.

    Parameters
    ----------
    session : aiohttp.ClientSession
        Keeps the connection.
    url : str
        Of the service.
    question : Question
        The request.
    tally : Tally
        Is changed in place.
    """
    start = tally.now()
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                async with session.post(
                    f"{url}/predict",
                    data=question.body,
                    headers={"content-type": question.content_type},
                ) as response:
                    body = await response.read()
                break
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError):
                tally.interrupted += 1
                await asyncio.sleep(0.01)  # a service that is down is not to be hammered
    tally.ends.append(tally.now())
    tally.latencies.append(tally.ends[-1] - start)
    tally.wrong += not is_right(question, response.status, body)
    tally.workers.append(int(response.headers.get("x-worker", 0)))


async def load(
    url: str, questions: list[Question], clients: int, seconds: float, kill: bool
) -> Tally:
    """Send requests from several clients at once.

    Parameters
    ----------
    url : str
        Of the service.
    questions : list of Question
        Each client goes round them, from a place of its own.
    clients : int
        How many.
    seconds : float
        How long; longer if a new worker is yet to answer.
    kill : bool
        Whether to kill a worker in the middle.

    Returns
    -------
    Tally
        What has happened.
    """
    tally = Tally()

    def goes_on() -> bool:
        # A short test on a slow machine may be over before a client has come to the new worker.
        if tally.now() < seconds:
            return True
        return kill and tally.now() < seconds + PATIENCE and tally.recovery_time() is None

    async def client(number: int) -> None:
        first = number * len(questions) // clients
        own = cycle(questions[first:] + questions[:first])
        while goes_on():
            async with aiohttp.ClientSession() as session:
                for question in islice(own, REQUESTS_PER_CONNECTION):
                    if goes_on():
                        await ask(session, url, question, tally)

    async def kill_a_worker() -> None:
        await asyncio.sleep(seconds / 2)
        tally.kill()

    async def show_progress() -> None:
        with tqdm(total=seconds, bar_format="{l_bar}{bar}| {elapsed}{postfix}") as bar:
            while bar.n < seconds:
                await asyncio.sleep(0.1)
                counts = f"{len(tally.ends)} answers, {tally.wrong} wrong"
                bar.set_postfix_str(f"{counts}, {tally.interrupted} interrupted", refresh=False)
                bar.update(min(tally.now(), seconds) - bar.n)

    async with asyncio.TaskGroup() as tasks:
        for number in range(clients):
            tasks.create_task(client(number))
        tasks.create_task(show_progress())
        if kill:
            tasks.create_task(kill_a_worker())
    return tally


def draw_latencies(tally: Tally, path: Path) -> None:
    """Draw how long the answers took: their distribution, and each over time.

    Parameters
    ----------
    tally : Tally
        At least one answer.
    path : Path
        File to write.
    """
    plt.switch_backend("Agg")  # the figure goes to a file and needs no display
    latencies = np.array(tally.latencies) * 1e3
    figure, (left, right) = plt.subplots(ncols=2, figsize=(10, 4.5), layout="constrained")
    left.hist(latencies, np.geomspace(latencies.min(), latencies.max(), 60), color="tab:blue")
    for percent, style in (50, "-"), (99, "--"):
        value = np.percentile(latencies, percent)
        left.axvline(value, color="tab:orange", linestyle=style, label=f"p{percent} {value:.1f} ms")
    left.set(title="Distribution", xlabel="latency (ms)", ylabel="requests", xscale="log")
    left.legend()
    right.plot(tally.ends, latencies, ".", color="tab:blue", markersize=2)
    if tally.kill_time is not None:
        right.axvline(tally.kill_time, color="tab:red", label="a worker is killed")
        right.legend()
    right.set(title="Over time", xlabel="time (s)", ylabel="latency (ms)", yscale="log")
    figure.savefig(path, dpi=150)


def report(tally: Tally) -> bool:
    """Print the figures and return whether the service has done what it has to."""
    p50, p99 = np.percentile(tally.latencies, (50, 99)) * 1e3
    print(f"requests/s   {len(tally.ends) / tally.ends[-1]:.0f}")
    print(f"p50          {p50:.1f} ms")
    print(f"p99          {p99:.1f} ms")
    print(f"wrong        {tally.wrong} of {len(tally.ends)}")
    print(f"interrupted  {tally.interrupted}, answered at another attempt")
    if tally.kill_time is None:
        return tally.wrong == 0
    recovery_time = tally.recovery_time()
    if recovery_time is None:
        print(f"recovered    no: expected {WORKERS} workers to answer after the kill, got fewer")
        return False
    print(f"recovered    {recovery_time - tally.kill_time:.2f} s after a worker was killed")
    return tally.wrong == 0


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("--clients", type=int, default=16, help="default: %(default)s")
    option("--seconds", type=float, default=30, help="default: %(default)s")
    option("--network", type=Path, default=NETWORK_FILE, help="default: %(default)s")
    option(
        "--figure",
        type=Path,
        default=NETWORK_FILE.with_name("latency.png"),
        help="default: %(default)s",
    )
    option("--url", help="of a running service with this network; none of its workers is killed")
    arguments = parser.parse_args()
    if arguments.clients < 1 or arguments.seconds <= 0:
        parser.error("expected at least one client and more than 0 seconds")

    questions = make_questions(DigitsNetwork.load(arguments.network))

    def run(url: str, kill: bool) -> Tally:
        return asyncio.run(load(url, questions, arguments.clients, arguments.seconds, kill))

    if arguments.url:
        tally = run(arguments.url.rstrip("/"), kill=False)
    else:
        with serve(arguments.network) as server:
            tally = run(server.url, kill=True)
    draw_latencies(tally, arguments.figure)
    if not report(tally):
        sys.exit("The service has failed.")


if __name__ == "__main__":
    main()
