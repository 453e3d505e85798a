"""Images from requests: whatever the bytes are, an image to predict or an error that says why not.

400 means that the body cannot be read as what it claims to be, 422 that it is not an 8x8 image.
"""

import json
import reprlib
from io import BytesIO
from typing import Any

import numpy as np
from digits_network import Array
from PIL import Image, PngImagePlugin
from starlette.exceptions import HTTPException

SIDE = 8
WHITE = 16  # in scikit-learn's digits, and in JSON
WHITE_PNG = 255
# Opening an image unpacks the texts and the colour profile in it: by default, 60 MB from 64 KB.
PngImagePlugin.MAX_TEXT_CHUNK = 4_096
PngImagePlugin.MAX_TEXT_MEMORY = 65_536


def from_json(body: bytes) -> Array:
    """Read ``{"image": rows}``.

    Parameters
    ----------
    body : bytes
        JSON; ``rows`` is a list of 8 lists of 8 numbers from 0 to 16, bright on dark.

    Returns
    -------
    ndarray of float32, shape (8, 8)
        Grey values in [0, 1].

    Raises
    ------
    HTTPException
        With status 400 or 422, if it is not that.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:  # lists may be nested deeper than Python's stack
        raise HTTPException(400, f"expected JSON, got {type(error).__name__}: {error}") from error
    if not (isinstance(content, dict) and content.keys() == {"image"}):
        raise HTTPException(422, f'expected {{"image": [[...], ...]}}, got {reprlib.repr(content)}')
    rows = content["image"]
    if not (_has_length(SIDE, rows) and all(_has_length(SIDE, row) for row in rows)):
        raise HTTPException(422, f"expected {SIDE} lists of {SIDE} numbers, got {_outline(rows)}")
    for row in rows:
        for value in row:
            # NaN is not in the range either. A bool is an int, but no grey value.
            if type(value) not in (int, float) or not 0 <= value <= WHITE:
                got = reprlib.repr(value)
                raise HTTPException(422, f"expected numbers from 0 to {WHITE}, got {got}")
    return np.array(rows, np.float32) / np.float32(WHITE)


def _has_length(length: int, value: Any) -> bool:
    return isinstance(value, list) and len(value) == length


def _outline(rows: Any) -> str:
    if not isinstance(rows, list):
        return reprlib.repr(rows)
    lengths = {len(row) if isinstance(row, list) else reprlib.repr(row) for row in rows}
    return f"{len(rows)} of {reprlib.repr(sorted(lengths, key=str))}"


def from_png(body: bytes) -> Array:
    """Read a PNG image.

    Parameters
    ----------
    body : bytes
        An 8x8 PNG file of 8-bit grey values without transparency or animation, bright on dark.

    Returns
    -------
    ndarray of float32, shape (8, 8)
        Grey values in [0, 1].

    Raises
    ------
    HTTPException
        With status 400 or 422, if it is not that.
    """
    try:
        with _open_png(body) as image:  # has read the header and decoded nothing
            size, mode = image.size, image.tile[0][3]  # image.mode calls 4 bits L, too
            plain = "transparency" not in image.info and image.get_format_mimetype() == "image/png"
        if size == (SIDE, SIDE) and mode == "L" and plain:
            with _open_png(body) as image:
                image.verify()  # the checksums, which decoding passes over
            with _open_png(body) as image:
                pixels = np.asarray(image, np.float32)
    except Exception as error:  # Pillow has many for a damaged file, SyntaxError among them
        got = f"{len(body)} bytes that cannot be read as one ({type(error).__name__})"
        raise HTTPException(400, f"expected a PNG image, got {got}") from error
    if size != (SIDE, SIDE):
        got = "x".join(map(str, size))
        raise HTTPException(422, f"expected {SIDE}x{SIDE} pixels, got {got}")
    if mode != "L":
        raise HTTPException(422, f"expected 8-bit grey values (Pillow's mode L), got mode {mode}")
    if not plain:
        raise HTTPException(422, "expected one opaque image, got transparency or an animation")
    return pixels / np.float32(WHITE_PNG)


def _open_png(body: bytes) -> Image.Image:
    return Image.open(BytesIO(body), formats=["PNG"])


DECODERS = {"application/json": from_json, "image/png": from_png}
