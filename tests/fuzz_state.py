"""Mutated state files: load() must refuse each with StateFileError, or return a whole layer.

    python tests/fuzz_state.py --count 1000000

counts what was refused and why, and measures the memory that loading took. Mutant n is the same at
every run: --first n --count 1 repeats it.
"""

import argparse
import ast
import io
import json
import os
import re
import resource
import struct
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import cache, partial
from random import Random
from typing import NamedTuple
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import numpy as np
from tqdm import tqdm

import cbn

CHUNK = 1000
TRACED = 40  # the memory of one load in so many is traced, which is slow
OVERHEAD = 2**20  # bytes: of zipfile, json and the parser of headers, whatever the file
FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # in memory, where there is that

LAYERS = [
    cbn.BatchNorm1d(3),
    cbn.BatchNorm2d(5, affine=False, track_running_stats=False),
    cbn.BatchNorm2d(1, momentum=None, channel_axis=-1, dtype=np.float64).eval(),
    cbn.BatchNorm3d(70, bias=False, correction=0, nonfinite="skip"),
    cbn.BatchNorm1d(2000, affine=False),
]
NUMBERS = [0, 1, 2, 0x7F, 0xFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
NUMBERS += [8, 45, 64, 99, 8192, 2**20, 2**40]  # methods, versions, plausible sizes
VALUES = [None, True, False, -1, 0, 1, 2, 3, 5, 70, 2000, 0.5, 1e308, float("nan"), float("inf")]
VALUES += [10**12, 10**18, 2**63, 10**400, 10**4000, -(10**30), "", "float64", "f4", "O", "f4,f4"]
VALUES += ["(2,)f4", "U9", "skip", "BatchNorm2d", "\ud800", "\0", "x" * 9000, [], [3], {}, {"a": 1}]
DTYPES = ["<f4", ">f4", "<f8", "<i8", ">i8", "|O", "<U9", "<U0", "|S0", "|V0", "|V2147483647"]
DTYPES += ["f4,O", "(2,)<f4", "(60000,60000)<f4", "<M8[ns]", "<U4000000000", "<f4" * 99]
DTYPES += [[("a", "<f4")], [("a", "|O")], [("a", "<f4", (2**31, 2**31))], ("<f4", (3,)), 7]
DTYPES += [None, {}, "\ud800"]
SHAPES = [(), (0,), (1,), (3,), (70,), (2000,), (3, 1), (True,), (-1,), (-1, -3), (3.0,), [3], 3]
SHAPES += [(2**40,), (2**62, 2**62), (2**64,), (10**400,), (10**4200,) * 2, (1,) * 99, (0, 2**62)]
SHAPES += ["3", None, ((3,),), {}]
NESTS = ["[", "(", "{", '{"a":', "-", "not ", "[[],", "~", "1+(", "lambda:", "'a' if 1 else "]


class Original(NamedTuple):
    """A file that save() wrote, and what is in it."""

    layer: type
    content: bytes
    members: dict


# ------------------------------------------------------------------------------- bytes of any kind


def position(random, content):
    return random.randrange(len(content) + 1)


def flip(random, content):
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)


def change(random, content):
    content[random.randrange(len(content))] = random.randrange(256)


def truncate(random, content):
    del content[position(random, content) :]


def insert(random, content):
    at = position(random, content)
    content[at:at] = random.randbytes(random.choice([1, 2, 8, 64, 4096]))


def delete(random, content):
    at = position(random, content)
    del content[at : at + random.choice([1, 2, 8, 64, 4096])]


def repeat(random, content):
    at, start = position(random, content), position(random, content)
    content[at:at] = content[start : start + random.choice([1, 8, 64, 1024])]


def splice(random, content):
    other = random.choice(originals()).content
    content[position(random, content) :] = other[position(random, other) :]


def put_number(random, content, at=None):
    width = random.choice("HIQ")
    number = random.choice(NUMBERS) & (2 ** (8 * struct.calcsize(width)) - 1)
    at = random.randrange(len(content)) if at is None else at
    content[at : at + struct.calcsize(width)] = struct.pack("<" + width, number)


def edit_directory(random, content):
    """A number in one of the archive's own records."""
    records = [found.start() for found in re.finditer(b"PK[\1\3\5\6]", content)]
    if records:
        put_number(random, content, random.choice(records) + random.randrange(4, 46))


BYTES = [flip, change, truncate, insert, delete, repeat, splice, put_number, edit_directory]


def mutate_bytes(random, content):
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        if content:
            random.choice(BYTES)(random, content)


# ---------------------------------------------- members, in an archive whose checksums are right


def npy(header, data, version=b"\1\0"):
    text = header.encode("utf-8", "surrogatepass") + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", min(len(text), 0xFFFF)) + text + data


def nest(random):
    depth = random.choice([10, 90, 300, 1000, 3000, 9000])
    return random.choice(NESTS) * depth + random.choice(["", "1", ")" * depth, "]" * depth])


def edit_member(random, members):
    content = bytearray(members[name := random.choice(list(members))])
    mutate_bytes(random, content)
    members[name] = bytes(content)


def edit_data(random, members):
    """As many bytes as before: NaN, the largest, the least."""
    content = members[name := random.choice(list(members))]
    end = content.find(b"\n") + 1
    word = random.choice([b"\xff", b"\0", b"\x7f\x80\0\0", b"\0\0\x80\x7f", random.randbytes(8)])
    members[name] = content[:end] + (word * len(content))[: len(content) - end]


def edit_header(random, members):
    content = members[name := random.choice(list(members))]
    end = content.find(b"\n") + 1
    fields = {"descr": random.choice(DTYPES), "fortran_order": random.choice([False, True, 1])}
    fields["shape"] = random.choice(SHAPES)
    with suppress(Exception):  # what is there, where it is still readable
        there = ast.literal_eval(content[10:end].decode())
        fields.update({key: value for key, value in there.items() if random.random() < 0.5})
    header = repr(fields)
    if random.random() < 0.2:
        header = header.replace(repr(fields["shape"]), random.choice([nest(random), "(3L,)"]))
    version = random.choice([b"\1\0", b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\0\0"])
    members[name] = npy(header, content[end:], version)


def edit_config(random, members):
    config = {"num_features": 3, "class": "BatchNorm1d"}
    with suppress(Exception):  # what is there, where it is still readable
        content = members["config.npy"]
        config |= json.loads(content[content.index(b"\n") + 1 :].decode("utf-32-le"))
    key = random.choice(list(config))
    how = random.randrange(8)
    if how == 0:
        del config[key]
    elif how == 1:
        config[random.choice(["", "gamma", "num_features "])] = random.choice(VALUES)
    else:
        config[key] = random.choice(VALUES)
    text = json.dumps(config)
    if how == 2:
        text = text.replace("{", nest(random), 1)
    elif how == 3:
        text = text[: position(random, text)] + random.choice(["", nest(random), "\0", "9" * 5000])
    elif how == 4:
        text = text.replace("}", f', "{key}": {json.dumps(random.choice(VALUES))}}}')
    header = f"{{'descr': '<U{len(text)}', 'fortran_order': False, 'shape': ()}}"
    members["config.npy"] = npy(header, text.encode("utf-32-le", "surrogatepass"))


def edit_names(random, members):
    one, other = random.choices(list(members), k=2)
    how = random.randrange(4)
    if how == 0:
        members[one], members[other] = members[other], members[one]
    elif how == 1:
        name = random.choice(["gamma.npy", "weight.npy", "a.txt", ".npy", "/", "a" * 999])
        members[name] = members[one]
    elif how == 2 and len(members) > 1:
        del members[one]
    else:
        members[one] = random.choice(originals()).members.get(one, b"")


MEMBERS = [edit_member, edit_data, edit_header, edit_header, edit_config, edit_config, edit_names]


def archive(random, members):
    file = io.BytesIO()
    with ZipFile(file, "w") as zipped:  # ZipInfo's fixed date: the same bytes at every run
        for name, content in members.items():
            method = ZIP_DEFLATED if random.random() < 0.01 else ZIP_STORED
            zipped.writestr(ZipInfo(name), content, method)
        if random.random() < 0.02:  # a name twice
            zipped.writestr(ZipInfo(random.choice(list(members))), content)
        if random.random() < 0.002:  # 4 MiB in 4 KiB
            zipped.writestr(ZipInfo("bomb.npy"), bytes(2**22), ZIP_DEFLATED)
    return bytearray(file.getvalue())


# ----------------------------------------------------------------------------------------- running


@cache
def originals():
    """What save() writes."""
    found = []
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        for number, layer in enumerate(LAYERS):
            path = os.path.join(folder, str(number))
            layer.save(path)
            with open(path, "rb") as file, ZipFile(file) as zipped:
                members = {name: zipped.read(name) for name in zipped.namelist()}
                file.seek(0)
                found.append(Original(type(layer), file.read(), members))
    return found


def mutant(number):
    """The class to load by, and the bytes to load."""
    random = Random(number)
    layer, content, members = random.choice(originals())
    content = bytearray(content)
    if random.random() < 0.5:
        mutate_bytes(random, content)
        return layer, content
    members = dict(members)
    with warnings.catch_warnings(action="ignore"):  # of a name twice, of a header of Python 2
        for _ in range(random.choice([1, 1, 1, 2, 3])):
            random.choice(MEMBERS)(random, members)
        content = archive(random, members)
    if random.random() < 0.1:
        mutate_bytes(random, content)
    return layer, content


def load(layer, path):
    """What became of a file, in words without its details."""
    try:
        loaded = layer.load(path)
    except cbn.StateFileError as error:
        reason = str(error).partition("damaged or foreign: ")[2]
        return re.sub(r"\w+\.npy|[\[({].*[\])}]|'.*'|\".*\"|\S*\d\S*", "_", reason, flags=re.S)[:60]
    # What it gave is a layer, down to being saved and loaded again.
    assert type(loaded) is layer
    loaded.save(path)
    again = layer.load(path)
    assert repr(again) == repr(loaded)
    for name, array in loaded.state_dict().items():
        assert getattr(again, name).tobytes() == array.tobytes(), name
    return "LOADED"


def peak_of(call):
    """The result of a call, and the most memory that it had at a time."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(numbers, folder):
    """Load mutants: what became of them, failures, and the worst of time and memory."""
    outcomes, failures, worst, growth = Counter(), [], Counter(), 0
    path = os.path.join(folder, str(os.getpid()))
    warnings.simplefilter("always")
    warnings.showwarning = lambda text, *_: outcomes.update([f"(with a warning) {text!s:.50}"])
    for number in numbers:
        layer, content = mutant(number)
        with open(path, "wb") as file:
            file.write(content)
        attempt, peak = partial(load, layer, path), 0
        start, before = time.process_time(), resident()
        try:
            outcome, peak = (attempt(), 0) if number % TRACED else peak_of(attempt)
            outcomes[outcome] += 1
            assert peak <= 8 * len(content) + OVERHEAD, f"{peak} bytes for a file of {len(content)}"
        except Exception as error:
            failures.append((number, repr(error)))
        growth += resident() - before
        worst |= Counter(seconds=time.process_time() - start, peak=peak, growth=growth)
    return outcomes, failures, worst


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    numbers = range(arguments.first, arguments.first + arguments.count)
    chunks = [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]
    outcomes, failures, worst = Counter(), [], Counter()
    with (
        tempfile.TemporaryDirectory(dir=FOLDER) as folder,
        ProcessPoolExecutor(arguments.workers) as pool,
        tqdm(total=len(numbers), unit=" mutants", smoothing=0) as bar,
    ):
        for done, failed, figures in pool.map(partial(run, folder=folder), chunks):
            outcomes += done
            failures += failed
            worst |= figures
            bar.update(CHUNK)
    for outcome, count in outcomes.most_common():
        print(f"{count:9,}  {outcome}")
    print(
        f"slowest load: {worst['seconds']:.3f} s; most memory of a load: {worst['peak']:,} bytes; "
        f"growth by {CHUNK} loads: {worst['growth']:,} bytes; failures: {len(failures)}"
    )
    for number, error in failures[:20]:
        print(f"mutant {number}: {error}")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
