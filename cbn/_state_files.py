"""State files: one .npz archive of plain arrays, one of which holds the configuration as JSON.

Reading trusts nothing. Names, dtypes and shapes are checked from the headers, and every size
against the size of the file, before any data is read: memory stays within a few times that size.
Writing is whole or not at all, also when the power fails: a temporary file in the same folder is
written, flushed to the disk and renamed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO, TextIOBase
from typing import IO, Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np

from cbn._schema import OfAnotherClass, OfAnotherModel
from cbn._types import Array, Config, Expected, Path, Shape, Target
from cbn.exceptions import StateFileError

# The dtype and the shape of a member, and where its data starts.
Header = tuple[np.dtype[Any], Shape, int]

CONFIG = "config"
LONGEST_CONFIG = 16_384  # characters; a layer needs about 300
LONGEST_HEADER = 1_000  # characters; an array needs 118. Parsing takes 400 bytes for each.


def save(path: Target, config: Config, arrays: Mapping[str, Array]) -> None:
    """Write a state file, or leave what was there; to an open file, write all of it at once."""
    if _is_path(path, "write"):
        _replace(path, config, arrays)  # type: ignore[arg-type]
        return
    whole = BytesIO()
    _write(whole, config, arrays)
    rest = whole.getbuffer()
    while rest:
        written = path.write(rest)  # type: ignore[union-attr]
        rest = rest[len(rest) if written is None else written :]  # a raw file may take a part


def _write(file: IO[bytes], config: Config, arrays: Mapping[str, Array]) -> None:
    with ZipFile(file, "w", ZIP_STORED) as archive:
        for name, array in {CONFIG: np.array(json.dumps(config)), **arrays}.items():
            # ZipInfo's fixed date: equal states make equal files.
            with archive.open(ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, (1, 0), allow_pickle=False)


def _replace(path: Path, config: Config, arrays: Mapping[str, Array]) -> None:
    target = os.path.realpath(os.fsdecode(path))  # a link stays a link
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            # Before the content, which whoever may not read the old file must never see.
            with suppress(FileNotFoundError):
                shutil.copymode(target, temporary)
            _write(file, config, arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    # The file is in place; where its folder cannot be opened, its name is flushed in due course.
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load(
    path: Target, expected: Callable[[Config], Expected], longest_config: int = LONGEST_CONFIG
) -> tuple[Config, dict[str, Array]]:
    """Read a state file; an open one from where it is to its end.

    Given the configuration, of at most longest_config characters, expected tells the dtype and the
    shape of each array, or raises TypeError or ValueError. A StateFileError says that the file is
    not what save() writes, an OSError that it cannot be opened.
    """
    with _opened(path) as file, damage_named(path), ZipFile(file) as archive:
        size = file.seek(0, os.SEEK_END)
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise ValueError("expected every name once, got duplicates")
        if CONFIG not in members:
            raise ValueError(f"expected a member {CONFIG}.npy, got {sorted(members)[:8]}")
        headers = {name: _header(archive, info, size) for name, info in members.items()}
        dtype, shape, _ = headers[CONFIG]
        if dtype.kind != "U" or shape != () or dtype.itemsize > 4 * longest_config:
            raise ValueError(f"{CONFIG}: expected a short string, got {dtype} of shape {shape}")
        config = json.loads(str(_array(archive, members[CONFIG], *headers[CONFIG])))
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG}: expected a JSON object, got {type(config).__name__}")

        wanted = expected(config)
        if wanted.keys() != members.keys() - {CONFIG}:
            raise ValueError(
                f"expected the arrays {sorted(wanted)}, got {sorted(members.keys() - {CONFIG})[:8]}"
            )
        for name, (dtype, shape) in wanted.items():
            seen_dtype, seen_shape, _ = headers[name]
            if seen_shape != shape or seen_dtype.newbyteorder("=") != dtype:
                raise ValueError(
                    f"{name}: expected {dtype} of shape {shape}, "
                    f"got {seen_dtype} of shape {seen_shape}"
                )
        return config, {name: _array(archive, members[name], *headers[name]) for name in wanted}


def _opened(path: Target) -> IO[bytes]:
    if _is_path(path, "read"):
        return open(path, "rb")  # type: ignore[arg-type]
    content = path.read()  # type: ignore[union-attr]
    if not isinstance(content, bytes):
        raise TypeError(
            f"path: expected a path or an open binary file, got one that reads "
            f"{type(content).__name__}"
        )
    return BytesIO(content)


def _is_path(value: Any, method: str) -> bool:
    """Whether it is a path; else it is a file that has this method."""
    if isinstance(value, (str, bytes, os.PathLike)):
        return True
    if isinstance(value, TextIOBase) or not callable(getattr(value, method, None)):
        raise TypeError(f"path: expected a path or an open binary file, got {type(value).__name__}")
    return False


@contextmanager
def damage_named(path: Target) -> Iterator[None]:
    """Turn every complaint about the content of a file into one kind of error."""
    try:
        yield
    except MemoryError:  # of a machine that is short of it: the file asks for no more than its size
        raise
    except Exception as error:  # zipfile, numpy.lib.format and json each have several
        # A damaged offset makes the archive seek to where no file goes; other faults of the
        # system are not the file's.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        file = path if isinstance(path, (str, bytes, os.PathLike)) else type(path).__name__
        what = "expected a state file of cbn, got one that is damaged or foreign: "
        if isinstance(error, OfAnotherModel):
            what = "expected a state file of this model, got one of another: "
        elif isinstance(error, OfAnotherClass):
            what = ""  # the message is whole
        what += str(error) or type(error).__name__
        raise StateFileError(f"{os.fsdecode(file)}: {what}") from error


def _header(archive: ZipFile, info: ZipInfo, size: int) -> Header:
    """What a member promises, if it has the bytes to keep the promise."""
    name = info.filename
    if not name.endswith(".npy"):
        raise ValueError(f"expected members named *.npy, got {name!r}")
    if info.compress_type != ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name}: expected an uncompressed member, got a compressed one")
    if info.file_size > size:
        raise ValueError(
            f"{name}: expected at most {size} bytes, the size of the file, got {info.file_size}"
        )
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version != (1, 0):
            raise ValueError(f"expected version 1.0 of the .npy format, got {version}")
        shape, _, dtype = np.lib.format.read_array_header_1_0(member, LONGEST_HEADER)
        start = member.tell()
    if dtype.hasobject:
        raise ValueError("expected plain numbers, got pickled objects")
    needed, length = dtype.itemsize * int(np.prod(shape, dtype=object)), info.file_size - start
    if needed != length:
        raise ValueError(f"{name}: expected {needed} bytes of {dtype} {shape}, got {length}")
    return dtype, shape, start


def _array(
    archive: ZipFile, info: ZipInfo, dtype: np.dtype[Any], shape: Shape, start: int
) -> Array:
    # All of it, because the archive compares its checksum at the end.
    return np.frombuffer(archive.read(info), dtype, offset=start).reshape(shape)
