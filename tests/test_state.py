"""State dictionaries and state files: whole or not at all, and nothing in a file is trusted."""

import io
import json
import os
import pathlib
import re
import stat
import struct
import time
import tracemalloc
import zipfile
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from norms_table import BATCH, NORMS, OPTIONS, WITH_OPTIONS, filled
from processes import run_python
from refusals import refused

import cbn

C = 2
KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def trained(name="BatchNorm1d", **arguments):
    """A layer whose every array differs from its default."""
    if name.startswith("BatchNorm"):
        return filled(getattr(cbn, name)(C, **arguments))
    return filled(NORMS[name].layer(C=4, groups=2, row=(4, 6), **arguments))


def assert_same_layer(actual, expected):
    assert type(actual) is type(expected)
    assert repr(actual) == repr(expected)
    assert actual.training is expected.training
    for name in ("num_features", "eps", "momentum", "affine", "dtype", "channel_axis"):
        assert getattr(actual, name, None) == getattr(expected, name, None), name
    for name in ("correction", "nonfinite", "track_running_stats", "frozen", "normalized_shape"):
        assert getattr(actual, name, None) == getattr(expected, name, None), name
    assert_same_state(actual, expected.state_dict())


def assert_same_state(bn, expected):
    actual = bn.state_dict()
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        np.testing.assert_array_equal(actual[key], value, err_msg=key)


# ------------------------------------------------------------------------------ state dictionaries


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        ({}, []),
        ({"bias": False}, ["bias"]),
        ({"affine": False}, ["weight", "bias"]),
        ({"track_running_stats": False}, KEYS[2:]),
        ({"affine": False, "track_running_stats": False}, KEYS),
    ],
    ids=str,
)
def test_state_dict_keys(arguments, absent):
    bn = trained(**arguments)
    assert list(bn.state_dict()) == [key for key in KEYS if key not in absent]


def test_state_dict_is_a_copy():
    bn = trained()
    state = bn.state_dict()
    for key, value in state.items():
        np.testing.assert_array_equal(value, getattr(bn, key))
        value[...] = 99
        assert (getattr(bn, key) != 99).all()


def test_load_state_dict():
    bn = cbn.BatchNorm1d(C)
    arrays = [getattr(bn, key) for key in KEYS]
    state = trained().state_dict()
    assert bn.load_state_dict(state) == ([], [])
    assert_same_state(bn, trained().state_dict())
    assert all(getattr(bn, key) is array for key, array in zip(KEYS, arrays, strict=True))
    state["weight"][:] = 99
    assert_same_state(bn, trained().state_dict())


def test_load_state_dict_casts_to_the_dtype_of_the_layer():
    state = trained(dtype=np.float64).state_dict()
    state["num_batches_tracked"] = state["num_batches_tracked"].astype(np.int32)
    bn = cbn.BatchNorm1d(C)
    bn.load_state_dict(state)
    assert_same_state(bn, trained().state_dict())


def test_load_state_dict_takes_lists():
    bn = cbn.BatchNorm1d(C)
    bn.load_state_dict({"weight": [2.5, 3.5], "num_batches_tracked": 4}, strict=False)
    assert bn.weight.tolist() == [2.5, 3.5]
    assert bn.num_batches_tracked == 4


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "element",
    ["f2", "f4", ">f8", "g", "i1", "u8", "O", Fraction, Decimal, "bfloat16", "float8_e5m2", "int4"],
)
def test_load_state_dict_takes_real_numbers_of_any_type(element, dtype):
    numbers = [3, 4]
    if element in ("bfloat16", "float8_e5m2", "int4"):
        element = np.dtype(getattr(pytest.importorskip("ml_dtypes"), element))
    if isinstance(element, type):
        numbers = [element(number) for number in numbers]
    elif element != "O":
        numbers = np.array(numbers, element)
    bn = cbn.BatchNorm1d(C, dtype=dtype)
    bn.load_state_dict({**dict.fromkeys(KEYS[:4], numbers), "num_batches_tracked": numbers[0]})
    for key in KEYS[:4]:
        assert getattr(bn, key).tolist() == [3, 4]
        assert getattr(bn, key).dtype == dtype
    assert bn.num_batches_tracked == 3
    assert bn.num_batches_tracked.dtype == np.int64


def test_load_state_dict_takes_what_json_makes_of_a_state():
    state = {key: value.tolist() for key, value in trained().state_dict().items()}
    state["weight"] = [1, 2.5]
    bn = cbn.BatchNorm1d(C)
    bn.load_state_dict(json.loads(json.dumps(state)))
    assert_same_state(bn, {**trained().state_dict(), "weight": np.array([1, 2.5], np.float32)})


def test_load_state_dict_keeps_nan_and_infinity():
    bn = cbn.BatchNorm1d(C)
    for values in ([np.nan, -np.inf], np.array([np.nan, -np.inf], object)):
        bn.load_state_dict({"running_mean": values}, strict=False)
        np.testing.assert_array_equal(bn.running_mean, [np.nan, -np.inf])


@pytest.mark.parametrize("count", [0, 2**62 + 1, 2**63 - 1, 7.0, np.float32(7)])
def test_load_state_dict_takes_a_whole_counter_exactly(count):
    bn = cbn.BatchNorm1d(C)
    bn.load_state_dict({"num_batches_tracked": count}, strict=False)
    assert int(bn.num_batches_tracked) == count


def test_load_state_dict_not_strict():
    bn = trained()
    kept = bn.state_dict()
    result = bn.load_state_dict({"bias": np.array([8.0, 9.0]), "gamma": 1}, strict=False)
    assert result.missing_keys == ["weight", "running_mean", "running_var", "num_batches_tracked"]
    assert result.unexpected_keys == ["gamma"]
    missing, unexpected = result
    assert (missing, unexpected) == (result.missing_keys, result.unexpected_keys)
    assert_same_state(bn, {**kept, "bias": np.array([8, 9], np.float32)})


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
@pytest.mark.parametrize("bad", KEYS)
def test_load_state_dict_is_all_or_nothing(bad, strict):
    bn = trained()
    before = bn.state_dict()
    state = {key: np.full_like(value, 99) for key, value in before.items() if key != bad}
    state[bad] = np.ones((3, 3), before[bad].dtype)
    with pytest.raises(ValueError, match=bad):
        bn.load_state_dict(state, strict=strict)
    assert_same_state(bn, before)


def test_load_state_dict_is_all_or_nothing_when_a_cast_raises():
    bn = trained()
    before = bn.state_dict()
    state = {key: np.full(value.shape, 99, value.dtype) for key, value in before.items()}
    state["running_var"] = np.full(C, 1e300)
    with np.errstate(over="raise"), pytest.raises((ValueError, FloatingPointError)):
        bn.load_state_dict(state)
    assert_same_state(bn, before)


def test_load_state_dict_of_its_own_arrays():
    bn = trained()
    weight, bias = bn.weight.copy(), bn.bias.copy()
    bn.load_state_dict({"weight": bn.bias, "bias": bn.weight}, strict=False)
    assert (bn.weight.tolist(), bn.bias.tolist()) == (bias.tolist(), weight.tolist())


# ------------------------------------------------------------------------------------ round trips


@pytest.fixture
def path(tmp_path):
    return tmp_path / "layer.npz"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("name", "options"),
    [*WITH_OPTIONS, *((norm.name, some) for norm in BATCH[1:] for some in OPTIONS["BatchNorm1d"])],
    ids=str,
)
def test_round_trip(name, options, training, path):
    layer = trained(name, **options).train(training)
    layer.save(path)
    assert_same_layer(type(layer).load(path), layer)


@pytest.mark.parametrize("built_with", [True, False], ids=["on-off", "off-on"])
def test_round_trip_with_tracking_switched_live(built_with, path):
    bn = trained(track_running_stats=built_with)
    bn.track_running_stats = not built_with
    bn.save(path)
    again = cbn.BatchNorm1d.load(path)
    assert_same_layer(again, bn)
    assert again.num_batches_tracked is not None


def test_loaded_layer_works_and_is_independent_of_the_file(path, rng):
    bn = trained()
    bn.save(path)
    again = cbn.BatchNorm1d.load(path)
    path.unlink()
    x = rng.random((5, C), np.float32)
    np.testing.assert_array_equal(again(x), bn(x))
    np.testing.assert_array_equal(again.backward(x), bn.backward(x))
    assert_same_state(again, bn.state_dict())


def test_equal_states_make_equal_files_at_any_time(tmp_path, monkeypatch):
    for name, now in (("a", 1e9), ("b", 1.5e9)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        trained(eps=0.5).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_file_is_an_npz_without_pickle(path):
    bn = trained()
    bn.save(path)
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file.files) == sorted([*KEYS, "config"])
        np.testing.assert_array_equal(file["weight"], bn.weight)
        assert json.loads(str(file["config"]))["num_features"] == C


# ---------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    "as_given", [str, lambda path: path, os.fsencode], ids=["str", "path", "bytes"]
)
@pytest.mark.parametrize("name", ["layer", "layer.npz", "layer.bin", "größe 1"])
def test_saved_under_the_very_name(name, as_given, tmp_path):
    trained().save(as_given(tmp_path / name))
    assert os.listdir(tmp_path) == [name]
    assert_same_layer(cbn.BatchNorm1d.load(as_given(tmp_path / name)), trained())


def test_saved_to_a_relative_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained().save("layer")
    assert os.listdir(tmp_path) == ["layer"]


def test_symbolic_link_stays_one(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    trained().save(link)
    assert link.is_symlink()
    assert not target.is_symlink()
    assert_same_layer(cbn.BatchNorm1d.load(target), trained())


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_mode_of_a_file_is_kept(mode, path):
    path.write_text("old")
    path.chmod(mode)
    trained().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_the_mode_of_a_file_is_there_before_its_content(path, monkeypatch):
    """Who may not read the old file must not read the new one on its way either."""
    path.write_text("old")
    path.chmod(0o640)
    modes, write_array = set(), np.lib.format.write_array

    def write(*arguments, **keywords):
        [temporary] = path.parent.glob(".*.tmp")
        modes.add(stat.S_IMODE(temporary.stat().st_mode))
        write_array(*arguments, **keywords)

    monkeypatch.setattr(np.lib.format, "write_array", write)
    trained().save(path)
    assert modes == {0o640}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("old", [b"what was there", None], ids=["over-a-file", "anew"])
def test_a_failed_write_leaves_what_was_there(old, step, error, path, monkeypatch):
    if old is not None:
        path.write_bytes(old)
    before = os.listdir(path.parent)

    def fail(*_):
        assert len(os.listdir(path.parent)) == len(before) + 1
        raise error("no space left")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(error, match="no space left"):
        trained().save(path)
    assert os.listdir(path.parent) == before
    assert old is None or path.read_bytes() == old


def test_save_into_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        trained().save(tmp_path / "missing" / "layer")
    assert os.listdir(tmp_path) == []


def test_save_over_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        trained().save(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


# ---------------------------------------------------------------------- files that are not state


def test_missing_file(path):
    with pytest.raises(FileNotFoundError, match=r"layer\.npz"):
        cbn.BatchNorm1d.load(path)


def test_folder(tmp_path):
    with pytest.raises(OSError, match=tmp_path.name):
        cbn.BatchNorm1d.load(tmp_path)


def test_short_memory_is_not_the_fault_of_the_file(path, monkeypatch):
    def read(*_):
        raise MemoryError

    trained().save(path)
    monkeypatch.setattr(zipfile.ZipFile, "read", read)
    with pytest.raises(MemoryError):
        cbn.BatchNorm1d.load(path)


def test_a_damaged_file_named_in_bytes(path):
    path.write_bytes(b"nonsense")
    with pytest.raises(cbn.StateFileError, match=f"^{re.escape(str(path))}: expected a state"):
        cbn.BatchNorm1d.load(os.fsencode(path))


def test_state_file_error_is_a_value_error():
    assert issubclass(cbn.StateFileError, ValueError)


def assert_damaged(path, reason="", name="BatchNorm1d"):
    with pytest.raises(cbn.StateFileError) as caught:
        getattr(cbn, name).load(path)
    start = f"{path}: expected a state file of cbn, got one that is damaged or foreign: "
    assert str(caught.value).startswith(start)
    assert str(caught.value) != start
    assert str(caught.value).removeprefix(start).startswith(reason)


@pytest.fixture
def saved(path):
    trained().save(path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "content",
    [b"", b"weight: 1\n", b"PK\x03\x04", b"\x93NUMPY\x01\x00", bytes(999)],
    ids=["empty", "text", "archive-magic", "array-magic", "zeros"],
)
def test_not_an_archive(content, path):
    path.write_bytes(content)
    assert_damaged(path)


def test_array_file(path):
    with path.open("wb") as file:
        np.save(file, np.ones(C))
    assert_damaged(path)


def test_truncated_at_any_point(saved, path):
    for length in [*range(0, len(saved), 17), len(saved) - 1]:
        path.write_bytes(saved[:length])
        assert_damaged(path)


@pytest.mark.parametrize("mask", [0xFF, 0x01], ids=hex)
def test_any_byte_flipped(mask, saved, path):
    """The checksums of the archive cover the data: what still loads is what was saved."""
    expected, wrong = trained(), {}
    with path.open("r+b", buffering=0) as file:
        for position, byte in enumerate(saved):
            os.pwrite(file.fileno(), bytes([byte ^ mask]), position)
            try:
                assert_same_layer(cbn.BatchNorm1d.load(path), expected)
            except cbn.StateFileError:
                pass
            except Exception as error:
                wrong[position] = repr(error)
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert wrong == {}


# ------------------------------------------------------------------------------- hostile members


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_header(text, version=b"\x01\x00"):
    """A member that is a header and eight bytes of data."""
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
    return b"\x93NUMPY" + version + length + text.encode() + bytes(8)


def header_of(shape, descr="'<f4'"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"


def rewrite(path, change, compression=zipfile.ZIP_STORED, extra=(), layer=None):
    """Write a valid file, with some members changed, dropped (None) or added."""
    (layer or trained()).save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members.update(change)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in [*members.items(), *extra]:
            if content is not None:
                archive.writestr(name, content)


def test_rewritten_file_is_valid(path):
    rewrite(path, {})
    assert_same_layer(cbn.BatchNorm1d.load(path), trained())


def test_big_endian_file_is_valid(path):
    rewrite(path, {"weight.npy": npy(trained().weight.astype(">f4"))})
    assert_same_layer(cbn.BatchNorm1d.load(path), trained())


ALL = "['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']"
MEMBERS = {
    "missing": ({"bias.npy": None}, f"expected the arrays {ALL}, got ['num_"),
    "extra": ({"gamma.npy": npy(np.ones(C))}, f"expected the arrays {ALL}, got ['bias', 'gamma'"),
    "no-config": ({"config.npy": None}, "expected a member config.npy, got ['bias', 'num_"),
    "not-npy": ({"readme.txt": b"hello"}, "expected members named *.npy, got 'readme.txt'"),
    "same-name": ({"weight": npy(np.ones(C))}, "expected every name once, got duplicates"),
    "empty-member": ({"bias.npy": b""}, ""),
    "wrong-dtype": (
        {"bias.npy": npy(np.ones(C))},
        "bias: expected float32 of shape (2,), got float64 of shape (2,)",
    ),
    "integers": (
        {"bias.npy": npy(np.ones(C, np.int32))},
        "bias: expected float32 of shape (2,), got int32 of shape (2,)",
    ),
    "structured": ({"bias.npy": npy(np.ones(C, "f4,f4"))}, "bias: expected float32 of shape (2,)"),
    "wrong-shape": (
        {"bias.npy": npy(np.ones(3, np.float32))},
        "bias: expected float32 of shape (2,), got float32 of shape (3,)",
    ),
    "more-axes": (
        {"bias.npy": npy(np.ones((C, 1), np.float32))},
        "bias: expected float32 of shape (2,), got float32 of shape (2, 1)",
    ),
    "counter-shape": (
        {"num_batches_tracked.npy": npy(np.array([1]))},
        "num_batches_tracked: expected int64 of shape (), got int64 of shape (1,)",
    ),
    "counter-below-0": (
        {"num_batches_tracked.npy": npy(np.array(-1))},
        "state['num_batches_tracked']: expected an integer from 0 to 2**63 - 1, got -1",
    ),
    "too-few-bytes": (
        {"bias.npy": npy_header(header_of((3,)))},
        "bias.npy: expected 12 bytes of float32 (3,), got 8",
    ),
    "too-many-bytes": (
        {"bias.npy": npy_header(header_of((1,)))},
        "bias.npy: expected 4 bytes of float32 (1,), got 8",
    ),
    "4-TiB": (
        {"bias.npy": npy_header(header_of((2**40,)))},
        f"bias.npy: expected {2**42} bytes of float32 ({2**40},), got 8",
    ),
    "overflowing-shape": (
        {"bias.npy": npy_header(header_of((2**32, 2**32, 2)))},
        f"bias.npy: expected {2**67} bytes of float32",
    ),
    "negative-shape": ({"bias.npy": npy_header(header_of((-1, -2)))}, "bias: expected float32"),
    "objects": ({"bias.npy": npy_header(header_of((1,), "'|O'"))}, "expected plain numbers"),
    "version": (
        {"bias.npy": npy_header(header_of((C,)), b"\x02\x00")},
        "expected version 1.0 of the .npy format, got (2, 0)",
    ),
    "no-header": ({"bias.npy": npy_header("1")}, ""),
    "unknown-dtype": ({"bias.npy": npy_header(header_of((C,), "'<z9'"))}, ""),
    "call-in-header": ({"bias.npy": npy_header(header_of("__import__('os').getpid()"))}, ""),
    "nested-header": ({"bias.npy": npy_header(header_of("(" * 3000 + ")" * 3000))}, ""),
    "minus-header": ({"bias.npy": npy_header(header_of("-" * 8000 + "1"))}, ""),
    "padded-header": (
        {"bias.npy": npy_header(header_of((C,)) + " " * 1000)},
        "Header info length (10",
    ),
    "long-header": ({"bias.npy": npy_header(header_of((C,)) + " " * 30_000)}, ""),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_members(kind, path):
    change, reason = MEMBERS[kind]
    rewrite(path, change)
    assert_damaged(path, reason)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_member(path):
    rewrite(path, {}, extra=[("weight.npy", npy(np.ones(C, np.float32)))])
    assert_damaged(path, "expected every name once, got duplicates")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.makedirs, (self.folder,)


@pytest.mark.parametrize("name", ["config.npy", "weight.npy", "other.npy"])
def test_pickle_is_not_executed(name, path, tmp_path):
    canary = tmp_path / "executed"
    payload = npy(np.array([Payload(canary)], object))
    rewrite(path, {name: payload})
    assert_damaged(path, "expected plain numbers, got pickled objects")
    assert not canary.exists()
    np.load(io.BytesIO(payload), allow_pickle=True)
    assert canary.exists()  # it would have been


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members(method, path):
    rewrite(path, {}, compression=method)
    assert_damaged(path, "config.npy: expected an uncompressed member, got a compressed one")


def size_in_directory(path, size):
    """Let the archive's directory promise another size of its last member."""
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = struct.pack("<II", size, size)
    path.write_bytes(content)


def test_size_in_the_directory(path):
    rewrite(path, {})
    size_in_directory(path, 2**32 - 2)
    reason = f"num_batches_tracked.npy: expected at most {path.stat().st_size} bytes, "
    assert_damaged(path, reason + f"the size of the file, got {2**32 - 2}")


def peak_of(call, *arguments):
    """The most memory that a call has at a time."""
    tracemalloc.start()
    try:
        call(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["header", "directory", "compressed"])
def test_memory_is_bounded_by_the_size_of_the_file(kind, path):
    if kind == "header":
        rewrite(path, MEMBERS["4-TiB"][0])
    elif kind == "directory":
        rewrite(path, {})
        size_in_directory(path, 2**32 - 2)
    else:
        rewrite(path, {"bias.npy": npy(np.zeros(2**22))}, compression=zipfile.ZIP_DEFLATED)
    assert peak_of(assert_damaged, path) < 2**21


# -------------------------------------------------------------------------- hostile configurations


def config_of(path):
    with np.load(path) as file:
        return json.loads(str(file["config"]))


def text(value):
    return {"config.npy": npy(np.array(value))}


def configured(path, without=(), **changes):
    """The configuration of the layer in a file, after changes."""
    config = {name: value for name, value in config_of(path).items() if name not in without}
    return text(json.dumps(config | changes))


LONG = "config: expected a short string, got "
CONFIGS = {
    "not-json": ("{not json", ""),
    "empty": ("", ""),
    "list": ("[1, 2]", "config: expected a JSON object, got list"),
    "null": ("null", "config: expected a JSON object, got NoneType"),
    "nested": ("[" * 9000, ""),
    "long-number": ('{"num_features": ' + "9" * 9000 + "}", ""),
    "bytes": (b"{}", LONG + "|S2 of shape ()"),
    "number": (1.5, LONG + "float64 of shape ()"),
    "array": (["{}"], LONG + "<U2 of shape (1,)"),
    "long": ("x" * 20_000, LONG + "<U20000 of shape ()"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_config_member(kind, path):
    value, reason = CONFIGS[kind]
    rewrite(path, text(value))
    assert_damaged(path, reason)


@pytest.mark.parametrize(
    "key",
    [
        "num_features",
        "eps",
        "momentum",
        "affine",
        "track_running_stats",
        "dtype",
        "bias",
        "channel_axis",
        "correction",
        "nonfinite",
        "training",
        "frozen",
        "has_running_stats",
    ],
)
def test_missing_key(key, saved, path):
    rewrite(path, configured(path, without=[key]))
    assert_damaged(path, "config: expected the keys ['activation', 'affine', 'bias', ")


def test_unknown_key(saved, path):
    rewrite(path, configured(path, gamma=1))
    assert_damaged(path, "config: expected the keys ['activation', 'affine', 'bias', ")


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("BatchNorm1d", "BatchNorm2d"),
        ("BatchNorm1d", "BatchNorm3d"),
        ("RMSNorm", "LayerNorm"),
        ("GroupNorm", "RMSNorm"),
    ],
)
def test_another_class(name, other, path):
    trained(other).save(path)
    text = f"{path}: expected a state file of {name}, got one of {other}; use {other}.load(path)"
    with refused(text, cbn.StateFileError):
        getattr(cbn, name).load(path)


def test_files_of_instance_norm_that_are_older_than_nonfinite(path):
    layer = trained("InstanceNorm1d", track_running_stats=True)
    layer.save(path)
    rewrite(path, configured(path, without=["nonfinite"]), layer=layer)
    assert_same_layer(cbn.InstanceNorm1d.load(path), layer)


LENGTH = "normalized_shape: expected a positive integer, got "
MISMATCH = "weight: expected float32 of shape {}, got float32 of shape {}"
NO_GROUPS = "num_groups: expected a positive integer, got "
BAD_CONFIGS = {
    "BatchNorm1d": [
        ("class", None, "class: expected 'BatchNorm1d', got 'None'"),
        ("class", "a b", "class: expected 'BatchNorm1d', got 'a b'"),
        ("num_features", 10**18, "weight: expected float32 of shape (1000000000000000000,), got"),
        ("num_features", 3, "weight: expected float32 of shape (3,), got float32 of shape (2,)"),
        ("num_features", 0, "num_features: expected a positive integer, got 0"),
        ("num_features", -2, "num_features: expected a positive integer, got -2"),
        ("num_features", True, "num_features: expected a positive integer, got True"),
        ("num_features", 2.0, "num_features: expected a positive integer, got 2.0"),
        ("num_features", "2", "num_features: expected a positive integer, got '2'"),
        ("num_features", [2], "num_features: expected a positive integer, got [2]"),
        ("eps", float("nan"), "eps: expected a finite number >= 0, got nan"),
        ("eps", float("inf"), "eps: expected a finite number >= 0, got inf"),
        ("eps", -1, "eps: expected a finite number >= 0, got -1"),
        ("eps", "1", "eps: expected a finite number >= 0, got '1'"),
        ("eps", 10**400, ""),
        ("momentum", float("nan"), "momentum: expected a finite number, or None"),
        ("momentum", {}, "momentum: expected a finite number, or None"),
        ("correction", None, "correction: expected a finite number >= 0, got None"),
        ("nonfinite", "stop", "nonfinite: expected one of ('propagate', 'raise', 'skip'), got"),
        ("nonfinite", [], "nonfinite: expected one of ('propagate', 'raise', 'skip'), got []"),
        ("dtype", "int32", "dtype: expected NumPy's float32 or float64, got int32"),
        ("dtype", "O", "dtype: expected NumPy's float32 or float64, got object"),
        ("dtype", "float64", "weight: expected float64 of shape (2,), got float32 of shape (2,)"),
        ("affine", 1, "affine: expected True or False, got 1"),
        ("affine", False, "expected the arrays ['num_batches_tracked', 'running_mean', "),
        ("bias", False, "expected the arrays ['num_batches_tracked', 'running_mean', "),
        ("has_running_stats", "x", "track_running_stats: expected True or False, got 'x'"),
        ("track_running_stats", 1, "track_running_stats: expected True or False, got 1"),
        ("channel_axis", 2, "channel_axis: expected 1 (channels first) or -1"),
        ("training", 1, "mode: expected True or False, got 1"),
        ("frozen", None, "frozen: expected True or False, got None"),
    ],
    "InstanceNorm1d": [
        ("num_features", 2**62, "weight: expected float32 of shape (46116860"),
        ("has_running_stats", True, "expected the arrays ['bias', 'num_batch"),
    ],
    "GroupNorm": [
        ("num_groups", 3, "num_groups: expected a divisor of the 4 channels, got 3"),
        ("num_groups", 0, NO_GROUPS + "0"),
        ("num_groups", "2", NO_GROUPS + "'2'"),
        ("num_channels", 10**18, MISMATCH.format((10**18,), (4,))),
        ("num_channels", -4, "num_channels: expected a positive integer, got -4"),
        ("affine", False, "expected the arrays [], got ['bias', 'weight']"),
    ],
    "LayerNorm": [
        ("normalized_shape", "46", LENGTH + "'46'"),
        ("normalized_shape", [4, -6], LENGTH + "-6"),
        ("normalized_shape", [4, 0], LENGTH + "0"),
        ("normalized_shape", [[4, 6]], LENGTH + "[4, 6]"),
        ("normalized_shape", {"4": 6}, LENGTH + "{'4': 6}"),
        ("normalized_shape", [4, "6"], LENGTH + "'6'"),
        ("normalized_shape", [True], LENGTH + "True"),
        ("normalized_shape", None, LENGTH + "None"),
        ("normalized_shape", [], "normalized_shape: expected at least one length"),
        ("normalized_shape", [24], MISMATCH.format((24,), (4, 6))),
    ],
    "RMSNorm": [
        ("normalized_shape", [6, 4], MISMATCH.format((6, 4), (4, 6))),
        ("normalized_shape", [2**62, 2**62], MISMATCH.format((2**62, 2**62), (4, 6))),
        ("normalized_shape", [1] * 99, "normalized_shape: expected at most 64"),
        ("eps", -1, "eps: expected a finite number >= 0, got -1"),
        ("elementwise_affine", 1, "elementwise_affine: expected True or False, got 1"),
        ("bias", True, "config: expected the keys ['class', 'dtype', "),
    ],
}


@pytest.mark.parametrize(
    ("name", "key", "value", "reason"),
    [(name, *row) for name, rows in BAD_CONFIGS.items() for row in rows],
    ids=lambda value: str(value)[:20],
)
def test_hostile_configurations(name, key, value, reason, path):
    layer = trained(name, **{NORMS[name].affine: True})
    layer.save(path)
    rewrite(path, configured(path, **{key: value}), layer=layer)
    assert_damaged(path, reason, name)


@pytest.mark.parametrize("tracking", [False, True], ids=["untracked", "tracked"])
def test_huge_number_of_channels_without_arrays(tracking, path):
    """Nothing in such a file has the size that it names, and no memory is taken for it."""
    cbn.BatchNorm1d(C, affine=False, track_running_stats=False).save(path)
    config = configured(path, num_features=10**18, track_running_stats=tracking)
    rewrite(path, {f"{key}.npy": None for key in KEYS} | config)
    if tracking:
        assert_damaged(path, "expected the arrays ['num_batches_tracked', 'running_mean', ")
    else:
        assert cbn.BatchNorm1d.load(path).num_features == 10**18


MANY = 2**18  # channels: a file of 4 MiB


def test_memory_of_loading(path):
    cbn.BatchNorm1d(MANY).save(path)
    assert peak_of(cbn.BatchNorm1d.load, path) < 4 * path.stat().st_size


@pytest.mark.parametrize("kind", ["header", "overflow", "config"])
def test_what_promises_terabytes_is_refused_before_any_data_is_read(kind, path):
    bn = cbn.BatchNorm1d(MANY)
    bn.save(path)
    shape = (2**62, 2**62) if kind == "overflow" else (2**40,)
    change = {"weight.npy": npy_header(header_of(shape))}
    if kind == "config":
        change = configured(path, num_features=10**12)
    rewrite(path, change, layer=bn)
    assert peak_of(assert_damaged, path, "weight") < path.stat().st_size / 8


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("InstanceNorm1d", {"num_features": 2**40}, (2**40,)),
        ("GroupNorm", {"num_channels": 2**40}, (2**40,)),
        ("LayerNorm", {"normalized_shape": (2**20, 2**20)}, (2**20, 2**20)),
        ("RMSNorm", {"normalized_shape": (2**20, 2**20)}, (2**20, 2**20)),
    ],
)
def test_what_promises_terabytes_is_refused_from_the_header(name, size, shape, path):
    layer = trained(name, **{NORMS[name].affine: True})
    layer.save(path)
    change = {"weight.npy": npy_header(header_of(shape)), **configured(path, **size)}
    rewrite(path, change, layer=layer)
    reason = f"weight.npy: expected {4 * 2**40} bytes of float32 {shape}, g"
    assert peak_of(assert_damaged, path, reason, name) < 2**20


def test_mutated_files():
    """A million take a quarter of an hour: see CONTRIBUTING.md."""
    script = pathlib.Path(__file__).with_name("fuzz_state.py")
    run = run_python(script, "--count", "1000", "--workers", "1")
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^ +\d+  LOADED$", run.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        (
            {"weight": np.ones(3)},
            "weight: expected float32 of shape (3,) to save, got float64 of shape (3,)",
        ),
        (
            {"num_batches_tracked": np.array(-1)},
            "num_batches_tracked: expected a writable array of shape () with an integer >= 0",
        ),
        ({"running_var": None}, "running_var: expected float32 of shape (3,) to save, got none"),
        (
            {"momentum": np.nan},
            "momentum: expected a finite number, or None for the cumulative average, got nan",
        ),
    ],
    ids=["dtype", "counter", "missing", "momentum"],
)
def test_save_refuses_what_load_would(attributes, text, tmp_path):
    bn = cbn.BatchNorm1d(3)
    for name, value in attributes.items():
        setattr(bn, name, value)
    with pytest.raises(ValueError, match=re.escape(text)):
        bn.save(tmp_path / "norm.npz")
    assert list(tmp_path.iterdir()) == []


def test_save_takes_numbers_of_numpy(tmp_path):
    bn = cbn.BatchNorm1d(3)
    bn.momentum = np.float32(0.5)
    bn.save(tmp_path / "norm.npz")
    assert cbn.BatchNorm1d.load(tmp_path / "norm.npz").momentum == 0.5
