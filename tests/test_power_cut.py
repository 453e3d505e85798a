"""A process killed while it saves leaves the old file or the new one, whole.

SIGKILL shows what a process had asked of the system by then. It cannot show what a power cut adds:
the disk may have forgotten whatever was not flushed to it, and kept the rest in any order. Against
that stands the order of the requests, which the last test asserts: the content is written and
flushed, then renamed, then the folder is flushed. Before the rename nothing has touched the old
file; after it the new name leads to content that is on the disk.

    python tests/test_power_cut.py --kills 10000 --stride 1

kills at more moments.
"""

import argparse
import os
import re
import signal
import stat
import sys
import tempfile
import time
from contextlib import suppress
from itertools import count, cycle
from pathlib import Path
from random import Random

from processes import run_python

import cbn

TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")


def layer_of(value):
    """A layer whose every array is full of one value, and whose file has 64 KiB."""
    bn = cbn.BatchNorm1d(4096, running_mean=value, running_var=value)
    for array in (bn.weight, bn.bias, bn.num_batches_tracked):
        array[...] = value
    return bn


def content_of(layer, folder):
    layer.save(folder / "only")
    content = (folder / "only").read_bytes()
    (folder / "only").unlink()
    return content


def start(work):
    """Begin to work in a child process and return its number."""
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    return child


def was_killed(child):
    """Wait for the end of a child process: killed, or done."""
    end = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert end in (0, -signal.SIGKILL), end
    return end != 0


def kill_at_random(folder, kills):
    """Kill a process that saves two states in turn; return how many temporary files are left."""
    path, random, seen, left = folder / "layer.npz", Random(0), set(), 0
    layers = [layer_of(1), layer_of(2)]
    contents = [content_of(layer, folder) for layer in layers]
    for _ in range(kills):
        ready, saved = os.pipe()

        def save_for_ever(saved=saved):
            for layer in cycle(layers):
                layer.save(path)
                os.write(saved, b".")

        child = start(save_for_ever)
        os.close(saved)
        assert os.read(ready, 1), "the child process failed"
        time.sleep(random.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        assert was_killed(child)
        os.close(ready)

        cbn.BatchNorm1d.load(path)
        seen.add(contents.index(path.read_bytes()))  # either, to the last byte
        names = set(os.listdir(folder)) - {path.name}
        assert all(TEMPORARY.fullmatch(name) for name in names), names
        assert len(names) - left in (0, 1), names
        left = len(names)
    assert seen == {0, 1}
    assert left > 0, "no kill came in the middle of a save"
    return left


def kill_at_every_call(folder, stride):
    """Kill a process at each function call of one save, and each return; return how many."""
    path, new = folder / "layer.npz", layer_of(2)
    contents = [content_of(layer, folder) for layer in (layer_of(1), new)]
    found = []
    for events in count(0, stride):
        path.write_bytes(contents[0])

        def save(left=events):
            def count_down(*_):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.setprofile(count_down)
            new.save(path)

        killed = was_killed(start(save))
        found.append(contents.index(path.read_bytes()))
        if not killed:
            break
    # Old up to one moment, new from there.
    assert found == sorted(found)
    assert (found[0], found[-1]) == (0, 1)
    return len(found) - 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="at random moments")
    parser.add_argument("--stride", type=int, default=10, help="at every so manieth function call")
    arguments = parser.parse_args()
    for kill, number in (kill_at_random, arguments.kills), (kill_at_every_call, arguments.stride):
        with tempfile.TemporaryDirectory() as folder:
            print(f"{kill.__name__}({number}):", kill(Path(folder), number))


def test_killed_while_saving():
    """In a process of its own, because one with threads had better not fork."""
    run = run_python(__file__, "--kills", "40", "--stride", "37")
    assert run.returncode == 0, run.stderr


def test_content_is_flushed_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    layer, steps = layer_of(2), []
    content = content_of(layer, tmp_path)
    layer_of(1).save(tmp_path / "layer.npz")
    flush, rename = os.fsync, os.replace

    def written():
        """What a reader sees in the temporary file."""
        [path] = (path for path in tmp_path.iterdir() if TEMPORARY.fullmatch(path.name))
        return "all" if path.read_bytes() == content else "a part"

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            assert os.path.samestat(os.fstat(descriptor), tmp_path.stat())
            steps.append("flush the folder")
        else:
            steps.append(f"flush {written()}")
        flush(descriptor)

    def replace(source, target):
        steps.append(f"rename {written()} to {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    layer.save(tmp_path / "layer.npz")
    assert steps == ["flush all", "rename all to layer.npz", "flush the folder"]


if __name__ == "__main__":
    main()
