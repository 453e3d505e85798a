"""Statistics that are given can be normalised by where var + eps > 0: one rule at every use."""

from functools import partial

import numpy as np
import pytest
from refusals import check_refused, unusable

import cbn
from cbn import functional

C = 3
SHAPE = (4, C, 2)


def norm(kind, var, eps):
    """A layer that normalises by given statistics, with these."""
    layer = {
        "batch-eval": partial(cbn.BatchNorm1d, C),
        "batch-frozen": partial(cbn.BatchNorm1d, C),
        "batch-untracked": partial(cbn.BatchNorm1d, C),
        "instance-eval": partial(cbn.InstanceNorm1d, C, track_running_stats=True),
        "instance-frozen": partial(cbn.InstanceNorm1d, C, track_running_stats=True),
    }[kind](eps=eps, dtype=var.dtype)
    layer.running_var[...] = var
    if kind.endswith("frozen"):
        return cbn.freeze(layer)
    layer.track_running_stats = kind != "batch-untracked"
    return layer.eval()


LAYERS = ["batch-eval", "batch-frozen", "batch-untracked", "instance-eval", "instance-frozen"]


def folded(fold, x, var, eps):
    bn = cbn.BatchNorm1d(C, eps=eps, dtype=var.dtype).eval()
    bn.running_var = var
    return fold(np.ones((C, 1, 1)[: 3 if fold is cbn.fold_conv else 2], x.dtype), None, bn)


# Every way to normalise by given statistics: the name in its error, and the call.
USES = {
    **{
        kind: ("running_var", lambda x, var, eps, out, kind=kind: norm(kind, var, eps)(x, out))
        for kind in LAYERS
    },
    "batch_norm": (
        "running_var",
        lambda x, var, eps, out: functional.batch_norm(x, np.zeros(C), var, eps=eps, out=out),
    ),
    "instance_norm": (
        "running_var",
        lambda x, var, eps, out: functional.instance_norm(
            x, np.zeros(C), var, use_input_stats=False, eps=eps, out=out
        ),
    ),
    "batch_norm_backward": (
        "var",
        lambda x, var, eps, out: functional.batch_norm_backward(
            x, x, np.zeros(C), var, training=False, eps=eps, out=out
        ),
    ),
    "batch_norm_backward-training": (
        "var",
        lambda x, var, eps, out: functional.batch_norm_backward(
            x, x, np.zeros(C), var, eps=eps, out=out
        ),
    ),
    "fold_conv": ("bn.running_var", lambda x, var, eps, out: folded(cbn.fold_conv, x, var, eps)),
    "fold_linear": (
        "bn.running_var",
        lambda x, var, eps, out: folded(cbn.fold_linear, x, var, eps),
    ),
}
EACH = pytest.mark.parametrize(("name", "use"), USES.values(), ids=USES)
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


def slow(x):
    """The same values in a layout that has to be copied."""
    return np.asfortranarray(x)


@EACH
@DTYPES
@pytest.mark.parametrize("layout", [np.copy, slow])
@pytest.mark.parametrize(
    ("var", "eps", "seen"),
    [(-1, 1e-5, "-1"), (0, 0.0, "0"), (-np.inf, 1e-5, "-inf"), (-0.25, 0.25, "-0.25")],
)
def test_what_cannot_be_normalised_by(var, eps, seen, layout, dtype, name, use):
    x, out = layout(np.ones(SHAPE, dtype)), np.full(SHAPE, 7, dtype)
    variances = np.array([1, 2, var], dtype)
    check_refused(partial(use, x, variances, eps, out), ValueError, unusable(seen, eps, name=name))
    variances[0] = var
    text = unusable(seen, eps, "0 and 1 more", name)
    check_refused(partial(use, x, variances, eps, out), ValueError, text)


@EACH
@pytest.mark.parametrize("layout", [np.copy, slow])
def test_a_negative_variance_within_eps(layout, name, use):
    """By as much as rounding makes: in float64, and where float32 holds a little more than -eps."""
    for dtype, var in (("float64", -9.9e-6), ("float32", -1e-5)):
        x = layout(np.ones(SHAPE, dtype))
        found = use(x, np.array([1, 2, var], dtype), 1e-5, np.empty(SHAPE, dtype))
        assert all(np.isfinite(array).all() for array in found)


@pytest.mark.parametrize("layout", [np.copy, slow])
@pytest.mark.parametrize("use", [use for _, use in list(USES.values())[:-2]], ids=list(USES)[:-2])
def test_a_nan_stays_one(layout, use):
    y = use(layout(np.ones(SHAPE)), np.array([1, np.nan, 2]), 1e-5, None)
    y = y[0] if isinstance(y, tuple) else y
    assert np.isnan(y).any((0, 2)).tolist() == [False, True, False]


def test_it_is_met_at_use_and_not_before(tmp_path):
    """Loading takes what eps may yet make usable; training does not need it and learns on."""
    bn, x = cbn.BatchNorm1d(C, eps=0), np.ones(SHAPE, np.float32)
    bn.load_state_dict({"running_var": [1.0, 2.0, -1e-3]}, strict=False)
    bn.eval().save(tmp_path / "bn.npz")
    for layer in (bn, cbn.BatchNorm1d.load(tmp_path / "bn.npz")):
        check_refused(partial(layer, x), ValueError, unusable("-0.001", 0))
        layer.eps = 0.01
        assert np.isfinite(layer(x)).all()
        layer.eps = 0
        layer.train()(x)
        assert layer.running_var[2] < 0


def test_the_constructor_takes_what_is_usable():
    bn = cbn.BatchNorm1d(C, running_var=-9.9e-6).eval()
    assert np.isfinite(bn(np.ones(SHAPE, np.float32))).all()
    assert cbn.BatchNorm1d(C, running_var=-1e-5).running_var[0] == np.float32(-1e-5)


def test_one_in_many_channels():
    """Wherever it stands beside the vectors of the check."""
    for channels in (1, 7, 64, 65):
        for where in range(channels):
            var = np.ones(channels, np.float32)
            var[where] = -1
            call = partial(functional.batch_norm, np.ones((2, channels)), np.zeros(channels), var)
            check_refused(call, ValueError, unusable("-1", channel=where))
