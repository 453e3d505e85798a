"""A service that reads handwritten digits, with the network that `examples/digits.py` trains.

    pip install -e ".[examples,service]"
    python examples/digits.py
    gunicorn --config examples/service/gunicorn.conf.py --bind 127.0.0.1:8000

POST /predict takes an image of 8x8 grey values, bright on dark: as JSON, ``{"image": rows}`` with
numbers from 0 to 16, or as an 8-bit PNG. The answer is JSON: the digit, and the probabilities of
all ten. GET /healthz answers when a worker is ready. Errors are ``{"error": "expected ..."}``, but
what is no HTTP never gets here: uvicorn refuses it in plain text.

The service belongs behind a proxy, such as nginx, that passes on whole requests only and closes
idle connections. By itself it closes none that has not brought a request yet: with enough of them a
worker has no file descriptor left for the next.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from anyio.to_thread import current_default_thread_limiter
from digits_network import Array, DigitsNetwork
from service.images import DECODERS, SIDE
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

NETWORK_FILE = Path(os.environ.get("DIGITS_NETWORK", "digits_output/network.npz"))
THREADS = 4  # that compute in each worker: enough to keep a core busy while others wait for the GIL
MAX_BODY = 65_536  # bytes; an image takes 1 KB
BODY_SECONDS = 10


def answer(network: DigitsNetwork, image: Array) -> dict[str, Any]:
    """Predict which digit an image shows; many threads may do so with one network.

    Parameters
    ----------
    network : DigitsNetwork
        In eval mode.
    image : ndarray of float32, shape (8, 8)
        Grey values in [0, 1].

    Returns
    -------
    dict
        The ``digit``, and the ``probabilities`` of all ten.
    """
    logits = network.forward(image[np.newaxis, np.newaxis])[0]
    likelihoods = np.exp(logits - logits.max())
    probabilities = likelihoods / likelihoods.sum()
    return {"digit": int(logits.argmax()), "probabilities": probabilities.tolist()}


async def read_body(request: Request) -> bytes:
    """Read the body of a request, and no more of it than an image may take.

    Parameters
    ----------
    request : Request
        Its body has not been read.

    Returns
    -------
    bytes
        The body.

    Raises
    ------
    HTTPException
        With status 413 if it is too large, 408 if it does not arrive in time.
    """
    body = bytearray()
    # A header that announces too much saves the reading; one that lies or is missing saves nothing.
    size = int(request.headers.get("content-length", 0))
    try:
        async with asyncio.timeout(BODY_SECONDS):
            if size <= MAX_BODY:
                async for chunk in request.stream():
                    body += chunk
                    if (size := len(body)) > MAX_BODY:
                        break
    except TimeoutError as error:
        got = f"{len(body)} bytes of it"
        raise HTTPException(408, f"expected the body within {BODY_SECONDS} s, got {got}") from error
    if size > MAX_BODY:
        raise HTTPException(413, f"expected at most {MAX_BODY} bytes, got {size} or more")
    return bytes(body)


class HangUp:
    """Close the connection after an answer that has not waited for the whole body of its request.

    Without that the server would go on reading what the client goes on sending.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request as the application does, with a header more where needed."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"

        async def receive_some() -> Message:
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)
            return message

        async def send_some(message: Message) -> None:
            if unread and message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        return await self.app(scope, receive_some, send_some)


async def predict(request: Request) -> Response:
    """Answer POST /predict."""
    body = await read_body(request)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    decode = DECODERS.get(content_type)
    if decode is None:
        expected = " or ".join(DECODERS)
        raise HTTPException(415, f"expected content type {expected}, got {content_type[:99]!r}")
    network = request.app.state.network
    # In a thread, so that the event loop stays free to read the next request.
    content = await run_in_threadpool(lambda: answer(network, decode(body)))
    return JSONResponse(content, headers=_worker())


async def healthz(request: Request) -> Response:
    """Answer GET /healthz."""
    return JSONResponse({"status": "ok"}, headers=_worker())


def _worker() -> dict[str, str]:
    return {"x-worker": str(os.getpid())}  # which one answered: load.py kills it


async def explain(request: Request, error: Exception) -> Response:
    """Answer a request that is refused."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def give_up(request: Request, error: Exception) -> Response:
    """Answer nobody: the client has gone before its request was complete."""
    return Response(status_code=400)


def create_app(path: Path = NETWORK_FILE) -> Starlette:
    """Load the network and make the application; with gunicorn's --preload, in the master.

    Parameters
    ----------
    path : Path
        A network saved by `examples/digits.py`.

    Returns
    -------
    Starlette
        The ASGI application.
    """
    network = DigitsNetwork.load(path)
    # A batch large enough for all threads of cbn, which are then there when the master forks.
    batch = np.random.default_rng(0).random((64, 1, SIDE, SIDE), dtype=np.float32)
    logits = network.forward(batch)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # A worker that does not compute what the master did must not answer anybody.
        if network.forward(batch).tobytes() != logits.tobytes():
            raise RuntimeError("expected the logits of the master process, got others")
        current_default_thread_limiter().total_tokens = THREADS
        yield

    app = Starlette(
        routes=[
            Route("/predict", predict, methods=["POST"]),
            Route("/healthz", healthz),
        ],
        middleware=[Middleware(HangUp)],
        exception_handlers={HTTPException: explain, ClientDisconnect: give_up},
        lifespan=lifespan,
    )
    app.state.network = network
    return app
