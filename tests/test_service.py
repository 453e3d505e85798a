"""The service in examples/service: right answers, clear refusals, and an orderly stop."""

import asyncio
import importlib
import io
import json
import os
import re
import socket
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
from processes import run_python

if os.environ.get("CBN_REQUIRE_SERVICE") == "1":  # in CI a missing package is an error
    importlib.import_module("uvicorn_worker")  # imports gunicorn; all others are imported below
else:
    EXTRAS = ("aiohttp", "gunicorn", "matplotlib", "PIL", "sklearn", "starlette", "tqdm")
    for name in (*EXTRAS, "uvicorn_worker"):
        pytest.importorskip(name, reason=f'{name} is missing: pip install ".[examples,service]"')

from digits import load_scans, train
from digits_network import DigitsNetwork
from PIL import Image
from service import app, images
from service.load import Tally, as_json, as_png, is_right
from service.server import HOST, get_health, serve
from starlette.exceptions import HTTPException
from starlette.requests import Request

LOAD = Path(__file__).parents[1] / "examples" / "service" / "load.py"
JSON, PNG = "application/json", "image/png"
ROWS = [[0] * 8] * 8


@pytest.fixture(scope="module")
def scans():
    return load_scans()


@pytest.fixture(scope="module")
def network_file(scans, tmp_path_factory):
    train_images, _, train_labels, _ = scans
    network = DigitsNetwork()
    train(network, train_images, train_labels, epochs=1, seed=0, title="digits")
    path = tmp_path_factory.mktemp("network") / "network.npz"
    network.save(path)
    return path


@pytest.fixture(scope="module")
def network(network_file):
    return DigitsNetwork.load(network_file)


@pytest.fixture(scope="module")
def server(network_file, tmp_path_factory):
    """A server for all tests here: none may bring down a worker or be answered with a 500."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("wb") as file, serve(network_file, file) as server:
        yield server
    text = log.read_text()
    assert "Traceback" not in text
    assert text.count("Booting worker") == 2


def post(server, body, content_type=JSON, path="/predict", method="POST"):
    connection = HTTPConnection(HOST, server.port, timeout=30)
    try:
        connection.request(method, path, body, {"content-type": content_type})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def exchange(server, request, until=b""):
    """Send bytes and return what comes back, up to these bytes or to the end."""
    with socket.create_connection((HOST, server.port), timeout=30) as connection:
        connection.sendall(request)
        return receive(connection, until)


def receive(connection, until=b""):
    answer = b""
    while not (until and until in answer):
        chunk = connection.recv(65_536)
        if not chunk:
            break
        answer += chunk
    return answer


def head(length, content_type=JSON, *more):
    lines = [
        "POST /predict HTTP/1.1",
        "Host: test",
        f"Content-Type: {content_type}",
        f"Content-Length: {length}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def png(size=(8, 8), mode="L", **options):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG", **options)
    return file.getvalue()


def chunk(kind, data):
    return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)


def png_header(width, height, bits=8):
    return chunk(b"IHDR", width.to_bytes(4) + height.to_bytes(4) + bytes([bits, 0, 0, 0, 0]))


def raw_png(*chunks, data=bytes(72)):
    chunks = (*chunks, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png_that_claims(width, height):
    """A header alone, as a decompression bomb has it."""
    return raw_png(png_header(width, height), data=bytes(60_000))


def text_bomb(name, start):
    """A PNG image with a megabyte packed into each of 60 chunks."""
    packed = zlib.compress(bytes(2**20 - 1))
    return raw_png(png_header(8, 8), *(chunk(name, start + packed) for _ in range(60)))


def damaged(file, position):
    return file[:position] + bytes([file[position] ^ 1]) + file[position + 1 :]


def image(rows):
    return json.dumps({"image": rows}).encode()


def with_first(value):
    return b'{"image": [[%s' % value + image(ROWS)[len(b'{"image": [[0') :]


# ------------------------------------------------------------------------------------ answers


def test_healthz(server):
    assert post(server, None, path="/healthz", method="GET") == (200, b'{"status":"ok"}')
    assert int(get_health(server.port)) > 0


@pytest.mark.parametrize("question", [as_json, as_png])
def test_answers_are_those_of_the_network_here(server, network, scans, question):
    for scan in scans[1][:20, 0]:
        asked = question(network, scan)
        status, body = post(server, asked.body, asked.content_type)
        assert is_right(asked, status, body)
        assert json.loads(body)["digit"] == network.predict(scan[np.newaxis, np.newaxis])[0]


def test_load_would_notice_a_wrong_answer(network, scans):
    first, second = (as_json(network, scan) for scan in scans[1][:2, 0])
    right = json.dumps(first.answer)
    assert is_right(first, 200, right)
    assert not is_right(first, 500, right)
    assert not is_right(second, 200, right)


def test_load_would_notice_a_worker_that_does_not_come_back():
    tally = Tally(ends=[1, 2, 4, 5], workers=[7, 8, 8, 9], killed=7, kill_time=3)
    assert tally.recovery_time() == 5
    tally.workers = [7, 8, 8, 7]
    assert tally.recovery_time() is None


def test_threads_share_a_network(network, scans):
    test_images = scans[1][:, 0]
    expected = [app.answer(network, scan) for scan in test_images]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda scan: app.answer(network, scan), test_images))
    assert answers == expected


def test_content_type_may_have_parameters_and_capitals(server):
    assert post(server, image(ROWS), "Application/JSON; charset=utf-8")[0] == 200


# ------------------------------------------------------------------------------------ refusals

REFUSED = {
    "nothing": (JSON, b"", 400, "expected JSON, got JSONDecodeError"),
    "not JSON": (JSON, b"{", 400, "expected JSON, got JSONDecodeError"),
    "not UTF-8": (JSON, b'"\xff"', 400, "expected JSON, got UnicodeDecodeError"),
    "deep": (JSON, b"[" * 60_000, 400, "expected JSON, got RecursionError"),
    "digits": (JSON, with_first(b"9" * 5_000), 400, "expected JSON, got ValueError"),
    "no object": (JSON, b"[]", 422, 'expected {"image": [[...], ...]}, got []'),
    "other keys": (JSON, b'{"scan": 1}', 422, "got {'scan': 1}"),
    "null": (JSON, image(None), 422, "expected 8 lists of 8 numbers, got None"),
    "flat": (JSON, image([0] * 64), 422, "expected 8 lists of 8 numbers, got 64 of ['0']"),
    "7 rows": (JSON, image(ROWS[:7]), 422, "expected 8 lists of 8 numbers, got 7 of [8]"),
    "9 columns": (JSON, image([[0] * 9] * 8), 422, "got 8 of [9]"),
    "ragged": (JSON, image([*ROWS[:7], [0]]), 422, "got 8 of [1, 8]"),
    "too deep": (JSON, with_first(b"[0]"), 422, "expected numbers from 0 to 16, got [0]"),
    "string": (JSON, with_first(b'"1"'), 422, "expected numbers from 0 to 16, got '1'"),
    "bool": (JSON, with_first(b"true"), 422, "expected numbers from 0 to 16, got True"),
    "NaN": (JSON, with_first(b"NaN"), 422, "expected numbers from 0 to 16, got nan"),
    "infinity": (JSON, with_first(b"1e999"), 422, "expected numbers from 0 to 16, got inf"),
    "negative": (JSON, with_first(b"-1"), 422, "expected numbers from 0 to 16, got -1"),
    "bright": (JSON, with_first(b"16.5"), 422, "expected numbers from 0 to 16, got 16.5"),
    "huge": (JSON, with_first(b"9" * 999), 422, "expected numbers from 0 to 16, got 9999"),
    "no PNG": (PNG, b"GIF89a", 400, "expected a PNG image, got 6 bytes that cannot be read as one"),
    "empty PNG": (PNG, b"", 400, "expected a PNG image, got 0 bytes"),
    "half a PNG": (PNG, png()[:50], 400, "expected a PNG image, got 50 bytes"),
    "checksum": (PNG, damaged(png(), 45), 400, "expected a PNG image, got"),
    "7x8": (PNG, png((7, 8)), 422, "expected 8x8 pixels, got 7x8"),
    "large": (PNG, png((1000, 1000)), 422, "expected 8x8 pixels, got 1000x1000"),
    "bomb": (PNG, png_that_claims(12_000, 12_000), 422, "expected 8x8 pixels, got 12000x12000"),
    "bigger bomb": (PNG, png_that_claims(2**31 - 1, 2**31 - 1), 400, "DecompressionBombError"),
    "another header": (
        PNG,
        raw_png(png_header(8, 8), png_header(9_000, 9_000)),
        422,
        "got 9000x9000",
    ),
    "text bomb": (PNG, text_bomb(b"zTXt", b"k\0\0"), 400, "expected a PNG image, got"),
    "text bomb in Unicode": (PNG, text_bomb(b"iTXt", b"k\0\1\0\0\0"), 400, "expected a PNG image"),
    "profile bomb": (PNG, text_bomb(b"iCCP", b"k\0\0"), 400, "expected a PNG image, got"),
    "4 bits": (PNG, raw_png(png_header(8, 8, bits=4), data=bytes(40)), 422, "got mode L;4"),
    "transparency": (
        PNG,
        png(transparency=7),
        422,
        "expected one opaque image, got transparency or an animation",
    ),
    "animation": (
        PNG,
        png(save_all=True, append_images=[Image.new("L", (8, 8), 9)]),
        422,
        "expected one opaque image",
    ),
    "colours": (
        PNG,
        png(mode="RGB"),
        422,
        "expected 8-bit grey values (Pillow's mode L), got mode",
    ),
    "16 bits": (PNG, png(mode="I;16"), 422, "got mode I;16"),
    "alpha": (PNG, png(mode="LA"), 422, "got mode LA"),
    "form": (
        "multipart/form-data",
        b"x",
        415,
        "expected content type application/json or image/png",
    ),
    "no type": ("", image(ROWS), 415, "got ''"),
}


@pytest.mark.parametrize(("content_type", "body", "status", "text"), REFUSED.values(), ids=REFUSED)
def test_bad_image_is_refused(server, content_type, body, status, text):
    got, answer = post(server, body, content_type)
    error = json.loads(answer)["error"]
    assert (got, text in error) == (status, True), error
    assert len(error) < 250


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/predict", 405), ("POST", "/", 404)]
)
def test_other_routes_are_refused_in_json(server, method, path, status):
    got, answer = post(server, None, path=path, method=method)
    assert (got, list(json.loads(answer))) == (status, ["error"])


def test_body_announced_as_too_large_is_refused_unread(server):
    answer = exchange(server, head(10**12))
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"expected at most 65536 bytes, got 1000000000000 or more" in answer


def test_body_that_turns_out_too_large_is_refused_before_its_end(server):
    request = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    chunks = b"2000\r\n" + b" " * 0x2000 + b"\r\n"
    answer = exchange(server, request + chunks * 9, until=b"more")
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"expected at most 65536 bytes, got" in answer


ENDLESS = ["Content-Length: 1000000000000", "Transfer-Encoding: chunked"]


@pytest.mark.parametrize("length", ENDLESS)
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/healthz", 200), ("POST", "/nowhere", 404), ("PUT", "/predict", 405)],
)
def test_body_that_nobody_reads_ends_the_connection(server, method, path, status, length):
    request = f"{method} {path} HTTP/1.1\r\nHost: test\r\n{length}\r\n\r\n".encode()
    answer = exchange(server, request)  # up to the end: the server closes
    assert answer.startswith(b"HTTP/1.1 %d" % status)
    assert b"\r\nconnection: close\r\n" in answer


@pytest.mark.parametrize("status", [200, 422])
def test_body_that_is_read_keeps_the_connection(server, status):
    connection = HTTPConnection(HOST, server.port, timeout=30)
    with closing(connection):
        for _ in range(2):
            connection.request(
                "POST", "/predict", image(ROWS if status == 200 else None), {"content-type": JSON}
            )
            response = connection.getresponse()
            assert (response.status, response.headers["connection"]) == (status, None)
            response.read()
            assert connection.sock is not None


def test_what_is_no_http_is_refused_in_plain_text(server):
    answer = exchange(server, b"nonsense\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"content-type: text/plain" in answer.lower()


def test_largest_body_is_read(server):
    assert post(server, image(ROWS).ljust(app.MAX_BODY))[0] == 200
    assert exchange(server, head(app.MAX_BODY + 1)).startswith(b"HTTP/1.1 413")


def test_client_that_hangs_up_harms_nobody(server):
    for _ in range(4):
        request = head(1000, JSON, "Expect: 100-continue")
        assert b"100 Continue" in exchange(server, request, until=b"\r\n\r\n")
    assert post(server, image(ROWS))[0] == 200


def test_body_that_does_not_come_is_not_waited_for(monkeypatch):
    async def receive():
        await asyncio.Event().wait()

    monkeypatch.setattr(app, "BODY_SECONDS", 0.01)
    request = Request({"type": "http", "headers": []}, receive)
    with pytest.raises(HTTPException, match=r"expected the body within 0\.01 s, got 0") as refusal:
        asyncio.run(app.read_body(request))
    assert refusal.value.status_code == 408


@pytest.mark.parametrize(
    ("content_type", "file"), [(JSON, image(ROWS)), (PNG, png())], ids=["json", "png"]
)
def test_any_bytes_are_an_image_or_refused(rng, content_type, file):
    decode = images.DECODERS[content_type]
    refused = set()
    for _ in range(2000):
        changed = bytearray(file)
        for position in rng.integers(len(file), size=rng.integers(1, 4)):
            changed[position] = rng.choice([0, 0xFF, rng.integers(256), changed[position] ^ 1])
        try:
            values = decode(bytes(changed))
        except HTTPException as refusal:
            refused.add(refusal.status_code)
        else:
            assert (values.shape, values.dtype) == ((8, 8), np.float32)
            assert ((values >= 0) & (values <= 1)).all()
    assert refused <= {400, 422}


# ------------------------------------------------------------------------------------ processes


def test_load_with_a_worker_killed(network_file, tmp_path):
    figure = tmp_path / "latency.png"
    options = ["--seconds", "4", "--network", network_file, "--figure", figure]
    run = run_python(LOAD, *options)
    assert run.returncode == 0, run.stderr
    assert re.search(r"^wrong +0 of \d{2,}$", run.stdout, re.MULTILINE)
    assert re.search(r"^recovered .* s after a worker was killed$", run.stdout, re.MULTILINE)
    assert run.stderr.count("Booting worker") == 3
    with Image.open(figure) as drawn:
        drawn.verify()


def test_stop_finishes_what_has_begun(network_file, network, scans, tmp_path):
    asked = as_png(network, scans[1][0, 0])
    with (tmp_path / "log.txt").open("wb") as log, serve(network_file, log) as server:
        with socket.create_connection((HOST, server.port), timeout=30) as connection:
            connection.sendall(head(len(asked.body), PNG, "Expect: 100-continue"))
            receive(connection, until=b"\r\n\r\n")  # "100 Continue": the request has begun
            server.master.terminate()
            wait_until_refused(server)
            connection.sendall(asked.body)
            answer, _, body = receive(connection).partition(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200")
        assert is_right(asked, 200, body)
        assert server.master.wait(30) == 0


def wait_until_refused(server):
    while True:
        try:
            socket.create_connection((HOST, server.port), timeout=30).close()
        except ConnectionRefusedError:
            return
        except ConnectionResetError:  # it was waiting when the socket was closed
            pass


def test_network_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        app.create_app(tmp_path / "network.npz")
