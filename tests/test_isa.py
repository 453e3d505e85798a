"""Every instruction set that this CPU has: the same bits, for every pass, layout and dtype."""

from collections import defaultdict
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from processes import printed_by

import cbn
from cbn import _dispatch, functional, reference

SHAPES = [
    (4, 3),
    (1000, 3),
    (33, 600),
    (33, 2100),
    (700, 30),
    (2, 5, 3, 3),
    (1, 64, 7, 7),
    (1, 7, 15, 15),
    (20, 11, 7, 7),
    (9, 5, 14, 14),
    (3, 2, 57, 57),
    (2, 1, 300, 300),
]


def results(shape, dtype, channel_axis):
    rng = np.random.default_rng(7)
    x = np.moveaxis(rng.normal(3, 2, shape).astype(dtype), 1, channel_axis).copy()
    x[0].flat[0] = 1e4
    grad_output = rng.normal(size=x.shape).astype(dtype)
    layer = {2: cbn.BatchNorm1d, 4: cbn.BatchNorm2d}[len(shape)]
    bn = layer(shape[1], dtype=dtype, channel_axis=channel_axis)
    bn.weight[...] = rng.normal(size=shape[1])
    found = {}
    for mode in (True, False):
        found[f"y training={mode}"] = bn.train(mode)(x)
        found[f"grad_input training={mode}"] = bn.backward(grad_output)
        found[f"weight_grad training={mode}"] = bn.weight_grad
        found[f"bias_grad training={mode}"] = bn.bias_grad
    return found | bn.state_dict()


@pytest.mark.parametrize("isa", _dispatch.supported()[:-1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_as_the_baseline(isa, dtype, channel_axis, shape, use_isa):
    use_isa("baseline")
    expected = results(shape, dtype, channel_axis)
    use_isa(isa)
    actual = results(shape, dtype, channel_axis)
    for name, array in expected.items():
        assert actual[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("shape", [(9, 1001, 31, 31), (30, 31, 97, 97), (2557, 67, 7, 7)], ids=str)
def test_same_bits_when_written_past_the_cache(channel_axis, shape, use_isa):
    rng = np.random.default_rng(8)
    C = shape[1]
    shape = shape if channel_axis == 1 else (shape[0], *shape[2:], C)
    x = np.resize(rng.normal(size=10_007).astype(np.float32), shape)
    assert x.nbytes >= 1 << 25
    mean, var = np.linspace(-1, 1, C), np.linspace(1, 2, C)
    found = {}
    for isa in _dispatch.supported():
        use_isa(isa)
        for offset in (0, 3):
            memory = np.empty(x.size + 16, np.float32)
            out = memory[offset : offset + x.size].reshape(shape)
            functional.batch_norm(x, mean, var, channel_axis=channel_axis, out=out)
            found[isa, offset] = hash(out.tobytes())
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("shape", [(1501, 61, 7, 7), (301, 61, 16, 16)], ids=str)
def test_training_on_arrays_that_no_cache_holds(channel_axis, shape, use_isa, assert_close):
    """Rows in the order of the memory, and short planes that are streamed: as the formulas say."""
    rng = np.random.default_rng(9)
    x, grad_output = (
        np.ascontiguousarray(np.moveaxis(array, 1, channel_axis))
        for array in rng.standard_normal((2, *shape), np.float32)
    )
    x += 3
    assert x.nbytes >= 1 << 24
    mean, var, _ = reference.batch_norm_stats(x, channel_axis=channel_axis)
    y, _, _ = reference.batch_norm(x, None, None, training=True, channel_axis=channel_axis)
    grads = reference.batch_norm_backward(grad_output, x, mean, var, channel_axis=channel_axis)
    found = set()
    for isa in _dispatch.supported():
        use_isa(isa)
        for threads in (1, 3):
            with cbn.num_threads(threads):
                actual, saved = functional.batch_norm_forward(
                    x, None, None, training=True, channel_axis=channel_axis
                )
                actual_grads = functional.norm_backward(grad_output, saved)
            found.add(hash(b"".join(array.tobytes() for array in (actual, *actual_grads[:3]))))
    assert len(found) == 1
    assert_close("y", actual, y, np.float32)
    assert_close("grad_input", actual_grads[0], grads[0], np.float32)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("length", [3, 64, 511])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "group_norm"])
def test_rows_written_past_the_cache(norm, length, dtype, use_isa):
    """Lines of which rows are parts are streamed whole: the bits are those of a pass in place."""
    rng = np.random.default_rng(11)
    groups = 4 if norm == "group_norm" else 1
    rows = (1 << 23) // (groups * length * np.dtype(dtype).itemsize) + 7
    x, grad_output = rng.standard_normal((2, rows, groups * length), np.float32).astype(dtype)
    assert 2 * x.nbytes >= 1 << 24
    parameter = np.result_type(dtype, np.float32)
    weight = np.linspace(-1, 2, groups * length, dtype=parameter)
    size = groups if norm == "group_norm" else length
    forward = partial(getattr(functional, f"{norm}_forward"), weight=weight)
    memory, found = np.empty(x.size + 64, dtype), defaultdict(set)

    def check(name, function, into, offset):
        """That it gives the same bits into memory of its own, and touches no other."""
        memory.fill(7)
        in_place, end = into.copy(), offset + into.size
        function(in_place, out=in_place)
        function(into, out=memory[offset:end].reshape(into.shape))
        assert memory[offset:end].tobytes() == in_place.tobytes()
        assert (memory[:offset] == 7).all()
        assert (memory[end:] == 7).all()
        found[name].add(hash(in_place.tobytes()))

    for isa in _dispatch.supported():
        use_isa(isa)
        _, saved = forward(x, size)
        for threads, offset in (1, 0), (3, 5):
            with cbn.num_threads(threads):
                check("y", lambda array, out: forward(array, size, out=out), x, offset)
                for wanted in ("all", "input"):
                    backward = partial(
                        functional.norm_backward, saved=saved, weight=weight, wanted=wanted
                    )
                    check(wanted, backward, grad_output, offset)
    assert all(len(bits) == 1 for bits in found.values())


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_planes_of_every_length(dtype, use_isa):
    """The shortest are written in vectors that overlap: as channels last are, and in place too."""
    rng = np.random.default_rng(10)
    of_channels = np.linspace([-1, 1], [1, 2], 9, dtype=np.result_type(dtype, np.float32), axis=1)
    mean, var = of_channels
    lengths = (*range(1, 71), 81, 100, 144, 196, 225, 289, 299, 300, 301)
    planes = [rng.standard_normal((2, 3, 9, S)).astype(dtype) for S in lengths]
    found = set()
    for isa in _dispatch.supported():
        use_isa(isa)
        results = []
        for x, grad_output in planes:
            y = functional.batch_norm(x, mean, var)
            last = functional.batch_norm(np.moveaxis(x, 1, -1), mean, var, channel_axis=-1)
            np.testing.assert_array_equal(y, np.moveaxis(last, -1, 1))
            of_groups = functional.group_norm(x, 3, *of_channels)
            grad_input, *_ = functional.group_norm_backward(grad_output, x, 3, mean)
            results += [y, of_groups, grad_input]
            for function, into, expected in (
                (partial(functional.batch_norm, running_mean=mean, running_var=var), x, y),
                (partial(functional.group_norm, num_groups=3, weight=mean, bias=var), x, of_groups),
                (
                    partial(functional.group_norm_backward, x=x, num_groups=3, weight=mean),
                    grad_output,
                    grad_input,
                ),
            ):
                overwritten = into.copy()
                function(overwritten, out=overwritten)
                np.testing.assert_array_equal(overwritten, expected)
        found.add(hash(b"".join(array.tobytes() for array in results)))
    assert len(found) == 1


GUARDED = """
import ctypes
import itertools
import mmap

import ml_dtypes
import numpy as np

import cbn
from cbn import functional

PAGE, C_LIBRARY = mmap.PAGESIZE, ctypes.CDLL(None)
maps = []


def guarded(shape, dtype, at_end):
    "Values between two pages that cannot be read or written, close to one of them."
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    pages = -(-size // PAGE)
    maps.append(mmap.mmap(-1, (pages + 2) * PAGE))
    begin = ctypes.addressof(ctypes.c_char.from_buffer(maps[-1]))
    for page in (0, pages + 1):
        assert C_LIBRARY.mprotect(ctypes.c_void_p(begin + page * PAGE), PAGE, 0) == 0
    offset = (pages + 1) * PAGE - size if at_end else PAGE
    values = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    array = np.frombuffer(maps[-1], dtype, values.size, offset).reshape(shape)
    array[...] = values
    return array


dtypes = np.float32, np.float64, np.float16, ml_dtypes.bfloat16
planes = (1, 1), (1, 3), (3, 1), (2, 2), (4, 3)
lengths = 1, 7, 15, 16, 17, 31, 33, 49, 64, 65, 81, 100, 255, 300, 301, 600
for dtype, plane, length, at_end in itertools.product(dtypes, planes, lengths, (False, True)):
    shape, of_parameters = (*plane, length), np.result_type(dtype, np.float32)
    x, residual, grad_output, out = (guarded(shape, dtype, at_end) for _ in range(4))
    C = shape[1]
    mean, var = np.zeros(C, of_parameters), np.ones(C, of_parameters)
    functional.batch_norm(x, mean, var, out=out)
    functional.batch_norm(x.reshape(-1, C), mean, var, out=out.reshape(-1, C))
    options = {"dtype": of_parameters}
    for layer in (
        cbn.GroupNorm(1, C, **options),
        cbn.GroupNorm(C, C, **options),
        cbn.GroupNorm(1, C, activation="relu", **options),
        cbn.LayerNorm(length, **options),
        cbn.LayerNorm(shape[1:], **options),
    ):
        steps = {"residual": residual} if getattr(layer, "activation", None) else {}
        layer(x, out=out, **steps)
        layer.backward(grad_output, out=out)
    maps.clear()
print("nothing beyond")
"""


@pytest.mark.parametrize("isa", _dispatch.supported())
def test_nothing_beyond_an_array_is_read_or_written(isa):
    assert printed_by(GUARDED, CBN_ISA=isa) == "nothing beyond\n"


@pytest.mark.parametrize("isa", _dispatch.supported())
def test_the_forced_one_is_the_active_one(isa):
    code = "import cbn; print(cbn.show_config(mode='dicts')['instruction set'])"
    assert f"'active': '{isa}', 'because': 'CBN_ISA={isa}'" in printed_by(code, CBN_ISA=isa)


def test_only_the_active_micro_kernels_are_imported():
    code = "import cbn, sys; print([name for name in sys.modules if 'cbn._micro_' in name])"
    imported = printed_by(code, without=["CBN_ISA"])
    assert imported.strip() == f"['cbn._micro_{_dispatch.supported()[0]}']"


def test_what_this_cpu_lacks_is_refused():
    with pytest.raises(ValueError, match="CBN_ISA: expected an instruction set of this CPU"):
        cbn._dispatch.check_isa("CBN_ISA", "b", ["a", "b"], ["a", "b"], ["a"])


def test_what_was_not_built_is_refused():
    with pytest.raises(ValueError, match="expected an instruction set that this installation was"):
        cbn._dispatch.check_isa("CBN_ISA", "b", ["a", "b"], ["a"], ["a"])


def test_show_config_prints(capsys):
    cbn.show_config()
    printed = capsys.readouterr().out
    for word in ("built", "active", "openmp", "number", "because"):
        assert word in printed
