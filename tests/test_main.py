"""python -m cbn."""

import ctypes
import os
from contextlib import closing

import pytest
from processes import run_python

import cbn
from cbn import _dispatch, _pools, _processors, _self_test, functional
from cbn.__main__ import troubles, troubles_of_pools


def test_it_prints_and_finds_nothing_wrong():
    run = run_python("-m", "cbn", without=["*NUM_THREADS"])
    assert run.returncode == 0, run.stdout + run.stderr
    for isa in _dispatch.supported():
        assert f"  {isa:<16}right\n" in run.stdout
    assert run.stdout.endswith("trouble\n  none found\n")


def test_trouble_is_an_exit_status():
    run = run_python("-m", "cbn", "--no-self-test", "json", CBN_NUM_THREADS="4000")
    assert run.returncode == 1
    assert "  4000 threads (CBN_NUM_THREADS=4000) on " in run.stdout


@pytest.mark.parametrize(
    ("function", "count", "first"),
    [
        ("batch_norm", 32 * len(_self_test.SHAPES), "(9, 5, 1), axis=1, float32, threads=1, "),
        ("layer_norm", 16, "layer_norm, (40, 768), {'normalized_shape': 768}, float32, threads=1"),
        ("instance_norm", 16, "instance_norm, (4, 20, 49), {}, float32, threads=1"),
    ],
)
def test_the_self_test_finds_wrong_results(function, count, first, monkeypatch):
    right = getattr(functional, f"{function}_backward")

    def wrong(*args, **kwargs):
        grad_input, grad_weight, *grad_bias = right(*args, **kwargs)
        return grad_input, grad_weight * 1.0001, *grad_bias

    monkeypatch.setattr(functional, f"{function}_backward", wrong)
    for _, faults in _self_test.self_test():
        assert len(faults) == count
        assert faults[0].startswith(f"grad_weight of {first}")


def test_the_self_test_leaves_the_active_instruction_set(monkeypatch):
    used = []
    monkeypatch.setattr(_dispatch, "use", used.append)
    with closing(_self_test.self_test()) as found:
        next(found)
    assert used == [_dispatch.supported()[0], _dispatch.active]


def test_a_quota_below_the_threads(monkeypatch):
    monkeypatch.setattr(_processors, "quota", lambda: 0.5)
    old = cbn.set_num_threads(2)
    assert any("share a quota of 0.5 CPUs" in trouble for trouble in troubles())
    cbn.set_num_threads(1)
    assert not any("quota" in trouble for trouble in troubles())
    cbn.set_num_threads(old)


def test_subnormals_switched_off(other_library):
    other = ctypes.CDLL(other_library)
    if not hasattr(other, "set_modes"):
        pytest.skip("sets MXCSR")
    assert not any("subnormal" in trouble for trouble in troubles())
    usual = other.get_modes()
    other.set_modes(usual | 0x8040)
    found = list(troubles())
    other.set_modes(usual)
    assert any("subnormal numbers are switched off" in trouble for trouble in found)


def test_packages_are_imported_before_cbn(tmp_path):
    (tmp_path / "early.py").write_text("import sys\nprint('cbn is', 'cbn' in sys.modules)\n")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    run = run_python("-m", "cbn", "--no-self-test", "early", PYTHONPATH=path)
    assert run.stdout.startswith("cbn is False\nversions\n"), run.stderr
    assert "self-test" not in run.stdout


def test_a_runtime_that_cannot_give_up_teams(monkeypatch):
    assert not any("forked child" in trouble for trouble in troubles())
    monkeypatch.setattr(_dispatch.kernels, "forks", lambda: False)
    assert any("a forked child runs on one thread" in trouble for trouble in troubles())


GNU, LLVM, INTEL, BLAS = (
    _pools.Pool(*kind, 2)
    for kind in (("OpenMP", "GNU"), ("OpenMP", "LLVM"), ("OpenMP", "Intel"), ("BLAS", "OpenBLAS"))
)


def test_several_pools_are_no_trouble():
    assert list(troubles_of_pools({"/a/libgomp.so.1": GNU, "/b/libgomp.so.1": GNU})) == []
    assert list(troubles_of_pools({"/a": GNU, "/b": LLVM, "/c": BLAS, "/d": LLVM})) == []


def test_runtimes_that_may_end_the_process():
    assert list(troubles_of_pools({"/a/libomp.so": LLVM, "/b": GNU, "/c/libiomp5.so": INTEL})) == [
        "the OpenMP runtimes of Intel and LLVM in one process, which may end or hang it: "
        "/a/libomp.so, /c/libiomp5.so; import only packages with the same"
    ]


@pytest.mark.parametrize("told", ["OMP_WAIT_POLICY=ACTIVE", "GOMP_SPINCOUNT=infinity"])
def test_threads_that_never_sleep_are_trouble_beside_others(told, monkeypatch):
    monkeypatch.setattr(_dispatch.kernels, "openmp", lambda: ("/a/libgomp.so.1", 201511))
    monkeypatch.setattr(_pools, "waiting", lambda file: told)
    assert list(troubles_of_pools({"/a/libgomp.so.1": GNU})) == []
    assert list(troubles_of_pools({"/a/libgomp.so.1": GNU, "/b": BLAS})) == [
        f"{told} lets the threads of cbn's OpenMP spin all the time, which keeps CPUs from the "
        "threads of other libraries: leave it unset"
    ]


@pytest.mark.parametrize("told", ["OMP_WAIT_POLICY=passive", "GOMP_SPINCOUNT=1000", "(default)"])
def test_threads_that_sleep_are_not(told, monkeypatch):
    monkeypatch.setattr(_pools, "waiting", lambda file: told)
    assert list(troubles_of_pools({"/a": GNU, "/b": BLAS})) == []
