"""The policy of a layer towards NaN and infinity in training."""

import numpy as np
import pytest

import cbn
from cbn import functional

# By row, by plane, and by plane with few values; each with five channels.
CASES = [("batch", shape) for shape in [(40, 5), (3, 5, 700), (1, 5, 9, 9)]]
CASES += [("instance", shape) for shape in [(3, 5, 700), (4, 5, 9, 9), (1, 5, 9, 9)]]
POISONED = [1, 3]
POISON = pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "-inf"])
WAYS = pytest.mark.parametrize("way", ["fresh", "in place", "out", "strided"])


@pytest.fixture(params=[1, -1], ids=["first", "last"])
def channel_axis(request):
    return request.param


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


@pytest.fixture
def x(case, rng, channel_axis):
    x = rng.normal(3, 2, case[1]).astype(np.float32)
    return np.ascontiguousarray(np.moveaxis(x, 1, channel_axis))


@pytest.fixture
def groups(case):
    """The samples whose statistics a value that is not finite spoils: all, or its own."""
    return case[1][0] if case[0] == "instance" else 1


@pytest.fixture
def make(case, channel_axis):
    """A function that makes a layer for x which has all that the norm can have."""
    layers = {
        ("batch", 2): cbn.BatchNorm1d,
        ("batch", 3): cbn.BatchNorm1d,
        ("batch", 4): cbn.BatchNorm2d,
        ("instance", 3): cbn.InstanceNorm1d,
        ("instance", 4): cbn.InstanceNorm2d,
    }
    layer = layers[case[0], len(case[1])]

    def make(**options):
        has = {"affine": True, "track_running_stats": True, "channel_axis": channel_axis}
        return layer(5, **has | options)

    return make


def poisoned(x, channel_axis, poison, channels=POISONED):
    x = x.copy()
    for channel in channels:
        np.moveaxis(x, channel_axis, 0)[channel].flat[-1] = poison
    return x


def arguments(x, way):
    """A copy of the input, and an output."""
    if way == "strided":
        wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2], None
    x = x.copy()
    return x, {"fresh": None, "in place": x, "out": np.full_like(x, 7)}[way]


def same(a, b):
    return a.keys() == b.keys() and all(a[key].tobytes() == b[key].tobytes() for key in a)


@POISON
@WAYS
def test_propagate_lets_it_into_the_running_statistics(make, x, channel_axis, poison, way):
    bn = make()
    bn(*arguments(poisoned(x, channel_axis, poison), way))
    finite = np.isfinite(bn.running_mean) & np.isfinite(bn.running_var)
    assert np.flatnonzero(~finite).tolist() == POISONED
    assert bn.num_batches_tracked == 1


@POISON
@WAYS
@pytest.mark.parametrize("momentum", [0.1, None])
def test_skip_keeps_the_statistics_of_these_channels(
    make, x, channel_axis, poison, way, momentum, groups
):
    bn, clean = (make(nonfinite="skip", momentum=momentum) for _ in range(2))
    bn(x)
    clean(x)
    before = bn.state_dict()
    y = bn(*arguments(poisoned(x, channel_axis, poison), way))
    expected = clean(x)
    others = [channel for channel in range(5) if channel not in POISONED]
    for name in ("running_mean", "running_var"):
        after = getattr(bn, name)
        assert after[POISONED].tolist() == before[name][POISONED].tolist()
        assert after[others].tolist() == getattr(clean, name)[others].tolist()
    assert bn.num_batches_tracked == 2
    y, expected = (np.moveaxis(array, channel_axis, 0) for array in (y, expected))
    assert y[others].tolist() == expected[others].tolist()
    assert (~np.isfinite(y[POISONED])).sum() == y[POISONED].size // groups


@POISON
@WAYS
@pytest.mark.parametrize("tracks", [True, False])
def test_raise_refuses_and_changes_nothing(make, x, channel_axis, poison, way, tracks):
    bn = make(nonfinite="raise", track_running_stats=tracks)
    bn(x)
    gradient = bn.backward(x)
    before = bn.state_dict()
    given, out = arguments(poisoned(x, channel_axis, poison), way)
    given_before, out_before = given.tobytes(), None if out is None else out.tobytes()
    with pytest.raises(FloatingPointError, match=r" in 2 of them \(1, 3\); nothing"):
        bn(given, out)
    assert same(bn.state_dict(), before)
    assert given.tobytes() == given_before
    assert out is None or out.tobytes() == out_before
    assert bn.backward(x).tobytes() == gradient.tobytes()


@WAYS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_finite_batches_give_the_same_bits(make, x, channel_axis, way, nonfinite, dtype):
    x = x.astype(dtype)
    plain = make(dtype=dtype)
    careful = make(dtype=dtype, nonfinite=nonfinite)
    y, expected = careful(*arguments(x, way)), plain(*arguments(x, way))
    assert y.tobytes() == expected.tobytes()
    assert same(careful.state_dict(), plain.state_dict())
    if way != "in place":
        assert careful.backward(x).tobytes() == plain.backward(x).tobytes()


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_variance_beyond_the_dtype_of_the_statistics_counts(nonfinite):
    x = np.array([[1e25, 1], [-1e25, 2]] * 2, np.float32)
    bn = cbn.BatchNorm1d(2, nonfinite=nonfinite)
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match=r"1 of them \(0\)"):
            bn(x)
    else:
        np.testing.assert_allclose(bn(x)[:, 0], [1, -1, 1, -1], rtol=1e-6)
        assert bn.running_var[0] == 1
        assert bn.running_var[1] != 1
    # Where nothing is kept, nothing is beyond it.
    cbn.BatchNorm1d(2, nonfinite=nonfinite, track_running_stats=False)(x)


@pytest.mark.parametrize(
    ("x", "dtype", "options"),
    [
        # The unbiased variance, 4/3 of the variance of four values, is beyond float32.
        (np.array([[1.7e19], [-1.7e19]] * 2), "float32", {}),
        (np.array([[1e19], [-1e19]] * 2), "float32", {"correction": 3.5}),
        # The mean is, and the variance is zero.
        (np.full((4, 1), 1e300), "float64", {}),
    ],
    ids=["unbiased", "correction", "mean"],
)
def test_what_counts_is_what_would_be_kept(x, dtype, options):
    bn = cbn.BatchNorm1d(1, dtype=dtype, nonfinite="skip", **options)
    bn.running_mean, bn.running_var = np.zeros(1, np.float32), np.ones(1, np.float32)
    bn(x.astype(dtype))
    assert (bn.running_mean, bn.running_var, bn.num_batches_tracked) == (0, 1, 1)
    bn.nonfinite = "raise"
    with pytest.raises(FloatingPointError):
        bn(x.astype(dtype))


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise"])
def test_samples_whose_average_is_not_finite(nonfinite):
    """Averaged over the samples, infinities of both signs are NaN, and large means are infinite."""
    x = np.ones((2, 3, 4))
    x[:, 0] = [[np.inf], [-np.inf]]
    x[:, 1] = 1e308
    norm = cbn.InstanceNorm1d(
        3, dtype="float64", momentum=0.5, track_running_stats=True, nonfinite=nonfinite
    )
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match=r" in 2 of them \(0, 1\); nothing"):
            norm(x)
        assert norm.num_batches_tracked == 0
    else:
        norm(x)
        learnt = [np.nan, np.inf, 0.5] if nonfinite == "propagate" else [0, 0, 0.5]
        np.testing.assert_array_equal(norm.running_mean, learnt)


@WAYS
@pytest.mark.parametrize("scale", [1e-20, 1e-40, 0.0])
def test_tiny_batches_give_the_same_bits(make, x, channel_axis, way, scale):
    x = x * np.float32(scale)
    layers = [make(nonfinite=policy) for policy in ("propagate", "skip", "raise")]
    for layer in layers:
        layer.running_mean, layer.running_var = np.zeros(5), np.zeros(5)  # float64 shows more
    y = [layer(*arguments(x, way)).tobytes() for layer in layers]
    assert y[0] == y[1] == y[2]
    for layer in layers[1:]:
        assert same(layer.state_dict(), layers[0].state_dict())


def test_the_policy_is_for_training(make, x, channel_axis, groups):
    bn = make(nonfinite="raise").eval()
    assert np.isnan(bn(poisoned(x, channel_axis, np.nan))).sum() == len(POISONED)
    bn = make(nonfinite="raise", track_running_stats=False).eval()
    y = bn(poisoned(x, channel_axis, np.nan))
    assert np.isnan(y).sum() == len(POISONED) * y.size // 5 // groups


def test_it_can_be_changed_and_a_wrong_one_is_refused_by_name(make, x, channel_axis):
    bn = make()
    bn.nonfinite = "raise"
    with pytest.raises(FloatingPointError):
        bn(poisoned(x, channel_axis, np.nan))
    bn.nonfinite = "ignore"
    with pytest.raises(ValueError, match="nonfinite: expected one of"):
        bn(x)
    assert bn.num_batches_tracked == 0


def test_the_element_type_is_refused_first(make, x, channel_axis):
    wrong = poisoned(x, channel_axis, np.nan).astype(np.float64)
    with pytest.raises(TypeError, match=r"x: expected float32, .* got float64"):
        make(nonfinite="raise")(wrong, np.empty_like(wrong))


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise"])
def test_statistics_measured_anew(make, x, channel_axis, nonfinite):
    layer, clean = make(nonfinite=nonfinite), make()
    batches = [x, poisoned(x, channel_axis, np.nan), x + 1]
    if nonfinite == "raise":
        before = layer.state_dict()
        with pytest.raises(FloatingPointError, match=r" in 2 of them \(1, 3\); nothing"):
            cbn.recalibrate(layer, batches, layer)
        assert same(layer.state_dict(), before)
        return
    cbn.recalibrate(layer, batches, layer)
    cbn.recalibrate(clean, batches[::2], clean)
    for name in ("running_mean", "running_var"):
        found = getattr(layer, name)[POISONED]
        if nonfinite == "skip":
            assert found.tolist() == getattr(clean, name)[POISONED].tolist()
        else:
            assert np.isnan(found).all()
    assert layer.num_batches_tracked == 3


def test_many_channels_are_not_all_listed():
    x = np.full((4, 100), np.nan, np.float32)
    with pytest.raises(
        FloatingPointError, match=r" in 100 of them \(0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\)"
    ):
        cbn.BatchNorm1d(100, nonfinite="raise")(x)


@POISON
@pytest.mark.parametrize("case", CASES[:3], indirect=True, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("where", ["x", "grad_output"])
def test_gradients_of_other_channels_keep_their_bits(x, channel_axis, poison, training, where):
    mean, var, _ = functional.batch_norm_stats(x, channel_axis=channel_axis)
    options = {"training": training, "channel_axis": channel_axis}
    clean = functional.batch_norm_backward(x, x, mean, var, **options)
    bad = poisoned(x, channel_axis, poison)
    inputs = (x, bad) if where == "x" else (bad, x)
    grads = functional.batch_norm_backward(*inputs, mean, var, **options)
    others = [channel for channel in range(5) if channel not in POISONED]
    for grad, expected in zip(grads, clean, strict=True):
        axis = channel_axis if grad.ndim > 1 else 0
        assert grad.take(others, axis).tobytes() == expected.take(others, axis).tobytes()


@pytest.mark.parametrize(
    ("row", "value"), [(150, np.nan), (150, np.inf), (150, 1e25), (0, 0)], ids=str
)
@pytest.mark.parametrize("threads", [1, 2])
def test_statistics_of_other_channels_keep_their_bits(rng, row, value, threads):
    x = rng.normal(3, 2, (191, 600)).astype(np.float32)  # two blocks of rows
    bad = x.copy()
    bad[row:, 7] = value
    with cbn.num_threads(threads):
        clean, found = (np.delete(functional.batch_norm_stats(a)[:2], 7, 1) for a in (x, bad))
    assert found.tobytes() == clean.tobytes()
