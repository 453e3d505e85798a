"""Start the service on a free port of this machine, as it runs for real, and stop it again."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import IO, NamedTuple

CONFIG = Path(__file__).with_name("gunicorn.conf.py")
HOST = "127.0.0.1"
WORKERS = 2
PATIENCE = 60  # seconds to start, and to stop


class Server(NamedTuple):
    """A running service: the master process of gunicorn and the port it listens on."""

    master: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{HOST}:{self.port}"

    def stop(self) -> None:
        """Ask it to finish what it has begun and to exit; raise an error if it does not."""
        self.master.terminate()
        if code := self.master.wait(PATIENCE):
            raise RuntimeError(f"expected gunicorn to exit with code 0, got {code}")


@contextmanager
def serve(network: Path, log: IO[bytes] | None = None) -> Iterator[Server]:
    """Run the service for the duration of a ``with`` block.

    Parameters
    ----------
    network : Path
        File of the network.
    log : file, optional
        Where the server writes what it has to say, instead of standard error.

    Yields
    ------
    Server
        It is ready to answer.
    """
    # The socket is passed on, so that nobody can take the port between finding and binding it, and
    # the first request simply waits in its queue until the first worker is there.
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
        options = [f"--config={CONFIG}", f"--workers={WORKERS}", f"--bind=fd://{listener.fileno()}"]
        master = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", *options],
            env=os.environ | {"DIGITS_NETWORK": str(network)},
            pass_fds=[listener.fileno()],
            start_new_session=True,  # Ctrl-C is for load.py alone, which then stops the server
            stderr=log,
        )
    try:
        server = Server(master, port)
        try:
            get_health(port)
        except OSError as error:
            got = f"{error!r}; its log may say why"
            raise RuntimeError(f"expected the service to start, got {got}") from error
        yield server
        if master.poll() is None:
            server.stop()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(master.pid, signal.SIGKILL)  # the workers too, if it came to that
        master.wait()


def get_health(port: int) -> str:
    """Ask for /healthz on a new connection and return which worker has answered."""
    connection = HTTPConnection(HOST, port, timeout=PATIENCE)
    try:
        connection.request("GET", "/healthz")
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"expected /healthz to answer 200, got {response.status}")
        return response.headers["x-worker"]
    finally:
        connection.close()
