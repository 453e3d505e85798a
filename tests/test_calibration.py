"""Running statistics measured anew: exact, whatever the batches, and all or nothing."""

import copy
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from norms_table import STATISTICS, filled, statistics
from refusals import refused

import cbn

C = 3


def norm(**arguments):
    return cbn.BatchNorm1d(C, dtype=np.float64, **arguments)


def assert_population(bn, x, calls, correction=1.0):
    """The running statistics are those of x, of shape (n, C), to 1e-12."""
    exact = x.astype(np.longdouble)
    np.testing.assert_allclose(bn.running_mean, exact.mean(0).astype(float), rtol=1e-12)
    var = exact.var(0) * len(x) / (len(x) - correction)
    np.testing.assert_allclose(bn.running_var, var.astype(float), rtol=1e-12)
    assert bn.num_batches_tracked == calls


# ------------------------------------------------------------------------------------- exact values

# In each, the difference between batches is another one: none, some, or all there is; and the last
# has means so large that a mean in one part would miss the variance by 1e-8.
DATA = {
    "plain": lambda rng, n: rng.normal(1, 2, (n, C)),
    "drifting": lambda rng, n: rng.normal(1, 2, (n, C)) + np.linspace(0, 100, n)[:, None],
    "steps": lambda rng, n: np.repeat(np.arange(n // 50 + 1.0), 50)[:n, None] * [1, -2, 3],
    "far": lambda rng, n: rng.normal(1e8, 1, (n, C)),
}


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("correction", [0, 1, 2.5])
def test_batches_of_any_sizes_give_the_statistics_of_all_values(kind, correction, rng):
    x = DATA[kind](rng, 700)
    bn = norm(running_mean=5, running_var=6, correction=correction)
    cuts = [50, 52, 57, 300, 301, 650]
    assert cbn.recalibrate(bn, np.split(x, cuts), bn) == [""]
    assert_population(bn, x, len(cuts) + 1, correction)


@given(st.lists(st.sampled_from([0, 1, 3, 5, 40]), min_size=1, max_size=12), st.integers(0, 99))
def test_the_cut_into_batches_does_not_matter(sizes, seed):
    if sum(sizes) < 2:
        return
    x = np.random.default_rng(seed).normal(3, 2, (sum(sizes), C))
    bn = norm()
    cbn.recalibrate(bn, np.split(x, np.cumsum(sizes)[:-1]), bn)
    assert_population(bn, x, np.count_nonzero(sizes))


def test_a_batch_of_one_value_is_normalised_to_the_bias(rng):
    bn, outputs = norm(), []
    bn.bias[:] = [1, 2, 3]
    x = rng.normal(size=(3, C))
    cbn.recalibrate(bn, np.split(x, 3), lambda batch: outputs.append(bn(batch)))
    assert np.concatenate(outputs).tolist() == [[1, 2, 3]] * 3
    assert_population(bn, x, 3)
    with pytest.raises(ValueError, match=r"^x: expected more than 1 value per channel when train"):
        bn(x[:1])


def test_many_batches(rng):
    x = rng.normal(1, 2, (20_000, C))
    bn = norm()
    cbn.recalibrate(bn, x.reshape(-1, 2, C), bn)
    assert_population(bn, x, 10_000)


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_images(channel_axis, rng):
    x = rng.normal(1, 2, (10, 4, 5, C))
    bn = cbn.BatchNorm2d(C, dtype=np.float64, channel_axis=channel_axis)
    given = x if channel_axis == -1 else np.moveaxis(x, -1, 1)
    cbn.recalibrate(bn, [given[:1], given[1:4], given[4], given[5:]], bn)
    assert_population(bn, x.reshape(-1, C), 4)


def test_float32_is_rounded_once(rng):
    x = rng.normal(100, 2, (300, C)).astype(np.float32)
    bn = cbn.BatchNorm1d(C)
    cbn.recalibrate(bn, np.array_split(x, 7), bn)
    exact = x.astype(np.longdouble)
    np.testing.assert_array_equal(bn.running_mean, exact.mean(0).astype(np.float32))
    np.testing.assert_array_equal(bn.running_var, exact.var(0, ddof=1).astype(np.float32))


# ------------------------------------------------------------------------------- models and streams


class Network:
    """Two norm layers behind each other, one that is used twice, one never, one frozen."""

    def __init__(self):
        self.first, self.second, self.twice = norm(), norm(), norm()
        self.never, self.frozen = norm(running_mean=5, running_var=6), norm(running_mean=7)
        self.without = norm(track_running_stats=False)
        self.untracked = norm(running_mean=8)
        self.untracked.track_running_stats = False
        cbn.freeze(self.frozen)
        self.inputs = {}

    def __call__(self, x):
        for name in ("first", "second", "twice", "without", "twice", "frozen", "untracked"):
            self.inputs.setdefault(name, []).append(x)
            x = np.maximum(getattr(self, name)(x), 0) * [1, 2, 3] + x
        return x


def test_a_network(rng):
    model = Network()
    kept = statistics(model.never, model.frozen, model.untracked)
    x = rng.normal(1, 2, (60, C))
    names = cbn.recalibrate(model, np.split(x, [10, 40]), model)
    assert names == ["first", "second", "twice"]
    for name, calls in {"first": 3, "second": 3, "twice": 6}.items():
        inputs = np.concatenate(model.inputs[name])
        assert len(inputs) == 60 * calls // 3
        assert_population(getattr(model, name), inputs, calls)
    assert statistics(model.never, model.frozen, model.untracked) == kept


def test_layers_normalise_by_their_batches_on_the_way(rng):
    x = rng.normal(5, 3, (8, C))
    outputs, bn = [], norm(running_mean=100).eval()
    cbn.recalibrate(bn, [x, x + 1], lambda batch: outputs.append(bn(batch)))
    expected = norm()
    for output, batch in zip(outputs, [x, x + 1], strict=True):
        np.testing.assert_array_equal(output, expected(batch))


def test_a_stream_is_run_through_once(rng):
    x = rng.normal(1, 2, (20, C))
    bn, asked = norm(), []

    def stream():
        for batch in np.split(x, 4):
            asked.append(len(batch))
            yield {"x": batch}

    cbn.recalibrate([bn], stream(), lambda batch: bn(batch["x"]))
    assert asked == [5] * 4
    assert_population(bn, x, 4)


class Dataset:
    """A sequence that has no __iter__, as map-style data sets have none."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def test_whatever_a_loop_takes(rng):
    x, bn = rng.normal(1, 2, (20, C)), norm()
    cbn.recalibrate(bn, Dataset(np.split(x, 4)), bn)
    assert_population(bn, x, 4)


def test_the_order_of_threads_loses_no_batch(rng):
    x = rng.normal(1, 2, (400, C))
    bn = norm()
    with ThreadPoolExecutor(4) as pool:
        cbn.recalibrate(bn, [x], lambda batch: list(pool.map(bn, np.split(batch, 100))))
    assert_population(bn, x, 100)


def test_as_update_bn_of_torch(torch, rng):
    """One batch, where averaging the variances and merging them are the same."""
    torch_model = torch.nn.Sequential(*[torch.nn.BatchNorm1d(C, dtype=torch.float64)] * 1)
    torch_model.append(torch.nn.ReLU()).append(torch.nn.BatchNorm1d(C, dtype=torch.float64))
    x = rng.normal(1, 2, (30, C))
    torch.optim.swa_utils.update_bn([torch.tensor(x)], torch_model)
    model = [norm(), norm()]
    cbn.recalibrate(model, [x], lambda x: model[1](np.maximum(model[0](x), 0)))
    for bn, theirs in ((model[0], torch_model[0]), (model[1], torch_model[2])):
        np.testing.assert_allclose(bn.running_mean, theirs.running_mean.numpy(), rtol=1e-12)
        np.testing.assert_allclose(bn.running_var, theirs.running_var.numpy(), rtol=1e-12)
        assert bn.num_batches_tracked == theirs.num_batches_tracked.item() == 1


# ----------------------------------------------------------------------------- what is given back


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, None])
def test_modes_and_the_last_forward_call_are_given_back(error, training, rng):
    x = rng.normal(1, 2, (8, C))
    model = [norm().train(training), norm(momentum=None).train(not training)]
    model[0](x)
    expected = copy.deepcopy(model[0])
    expected(x)
    before = statistics(*model)

    def forward(batch):
        model[0](batch)
        model[1](batch)
        if error and len(batch) == 2:
            raise error("in the middle")

    if error:
        with pytest.raises(error, match="in the middle"):
            cbn.recalibrate(model, [x, x[:2]], forward)
        assert statistics(*model) == before
    else:
        cbn.recalibrate(model, [x, x[:2]], forward)
    assert [bn.training for bn in model] == [training, not training]
    np.testing.assert_array_equal(model[0].backward(x), expected.backward(x))
    after = statistics(*model)
    for bn in model:
        bn.train()(x)
    assert statistics(*model) != after  # they learn again


def test_a_batch_that_is_refused_leaves_all_as_it_was(rng):
    x = rng.normal(1, 2, (8, C))
    bn = norm(running_mean=3).eval()
    before = statistics(bn)
    with pytest.raises(ValueError, match=r"^x: expected 3 channels on axis 1, got 2"):
        cbn.recalibrate(bn, [x, x[:, :2]], bn)
    assert statistics(bn) == before
    assert not bn.training


def test_copies_made_on_the_way_are_layers_of_their_own(rng):
    x, copies = rng.normal(1, 2, (8, C)), []
    bn = norm()
    cbn.recalibrate(bn, [x], lambda batch: (bn(batch), copies.append(copy.deepcopy(bn))))
    copies[0](x)
    assert_population(bn, x, 1)
    np.testing.assert_allclose(copies[0].running_mean, 0.1 * x.mean(0))


def test_the_arrays_stay_the_very_arrays(rng):
    bn = norm()
    arrays = [getattr(bn, name) for name in STATISTICS]
    cbn.recalibrate(bn, [rng.normal(size=(8, C))], bn)
    assert all(getattr(bn, name) is array for name, array in zip(STATISTICS, arrays, strict=True))


# ------------------------------------------------------------------------------- not finite


def with_nan(rng):
    x = rng.normal(1, 2, (30, C))
    x[12, 1] = np.nan
    return x


def test_nan_is_let_in_where_it_is_to_propagate(rng):
    bn, x = norm(), with_nan(rng)
    cbn.recalibrate(bn, np.split(x, 3), bn)
    assert np.isnan(bn.running_mean).tolist() == [False, True, False]
    assert np.isnan(bn.running_var).tolist() == [False, True, False]
    np.testing.assert_allclose(bn.running_var[[0, 2]], x.var(0, ddof=1)[[0, 2]], rtol=1e-12)


def test_nan_is_passed_over_where_it_is_to_be_skipped(rng):
    bn, x = norm(nonfinite="skip"), with_nan(rng)
    cbn.recalibrate(bn, np.split(x, 3), bn)
    finite = np.concatenate([x[:10], x[20:]])
    expected = np.where([False, True, False], finite.var(0, ddof=1), x.var(0, ddof=1))
    np.testing.assert_allclose(bn.running_var, expected, rtol=1e-12)
    np.testing.assert_allclose(bn.running_mean[1], finite.mean(0)[1], rtol=1e-12)
    assert bn.num_batches_tracked == 3


def test_a_channel_of_nan_only_is_left_as_it_was(rng):
    bn, x = norm(nonfinite="skip", running_mean=5, running_var=6), rng.normal(size=(30, C))
    x[:, 1] = np.inf
    cbn.recalibrate(bn, np.split(x, 3), bn)
    assert (bn.running_mean[1], bn.running_var[1]) == (5, 6)
    np.testing.assert_allclose(bn.running_mean[[0, 2]], x.mean(0)[[0, 2]], rtol=1e-12)


def test_nan_raises_where_it_is_to_raise(rng):
    bn = norm(nonfinite="raise")
    before = statistics(bn)
    with pytest.raises(FloatingPointError, match=r"in 1 of them \(1\); nothing has been changed"):
        cbn.recalibrate(bn, np.split(with_nan(rng), 3), bn)
    assert statistics(bn) == before


@pytest.mark.parametrize("nonfinite", ["propagate", "raise", "skip"])
def test_more_than_the_statistics_can_hold(nonfinite):
    """Each batch has a variance of zero; that of all is beyond float32."""
    bn = cbn.BatchNorm1d(1, nonfinite=nonfinite)
    batches = [np.full((2, 1), value, np.float32) for value in (-1e25, 1e25)]
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match=r"in 1 of them \(0\)"):
            cbn.recalibrate(bn, batches, bn)
        assert statistics(bn) == [[0], [1], 0]
    else:
        cbn.recalibrate(bn, batches, bn)
        assert bn.running_var == (np.inf if nonfinite == "propagate" else 1)


# ----------------------------------------------------------------------------------- instance norm


def instance_norm(**options):
    """A layer whose every array differs from its default."""
    return filled(cbn.InstanceNorm1d(C, track_running_stats=True, **options))


def test_instance_norm_learns_the_averages_over_all_samples(rng):
    batches = [rng.normal(1, 3, (n, C, 6)) for n in (1, 4, 2)]
    layer = instance_norm(dtype="float64", correction=2)
    others = [cbn.GroupNorm(1, C, dtype="float64"), cbn.LayerNorm((C, 6), dtype="float64")]

    def forward(x):
        return others[1](others[0](layer(x)))

    assert cbn.recalibrate([layer, *others], batches, forward) == ["0"]
    everything = np.concatenate(batches)
    np.testing.assert_allclose(layer.running_mean, everything.mean((0, 2)), rtol=1e-12)
    var = everything.var(axis=2, ddof=2).mean(axis=0)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-12)
    assert layer.num_batches_tracked == 3
    cbn.reinitialize_norm_stats(layer, batches[0])
    np.testing.assert_allclose(layer.running_mean, batches[0].mean((0, 2)), rtol=1e-12)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("correction", [2, 2.5])
def test_instance_norm_refuses_samples_that_are_too_small(correction):
    layer = instance_norm(correction=correction)
    before = layer.state_dict()
    batches = [np.ones((1, C, 9), np.float32), np.ones((1, C, 2), np.float32)]
    text = f"x: expected more than {correction:g} values per channel of a sample, got 2 in shape "
    with pytest.raises(ValueError, match=re.escape(text)):
        cbn.recalibrate(layer, batches, layer)
    np.testing.assert_equal(layer.state_dict(), before)
    assert layer.training


def test_instance_norm_takes_what_is_not_finite_or_too_large():
    layer = instance_norm()
    x = np.ones((2, C, 3), np.float32)
    x[0, 0, 0], x[1, 0, 0], x[0, 1] = np.inf, -np.inf, [1e25, -1e25, 0]
    assert cbn.recalibrate(layer, [x], layer) == [""]
    assert np.isnan(layer.running_mean[0])
    assert layer.running_mean[1:].tolist() == [0.5, 1]
    assert layer.running_var[1:].tolist() == [np.inf, 0]


def test_a_pending_backward_pass_of_instance_norm_stays_as_it_was(rng):
    layer = instance_norm(affine=True, dtype="float64").eval()
    x, grad_output = rng.normal(1, 2, (2, 3, C, 6))
    layer(x)
    expected = layer.backward(grad_output)
    layer(x)
    cbn.recalibrate(layer, [2 * x], layer)
    np.testing.assert_array_equal(layer.backward(grad_output), expected)


# ---------------------------------------------------------------------------------------- refusals

NO_DATA = (
    "expected data that reach a norm layer in training mode, got none; a generator gives its "
    "batches only once, and forward must not switch to eval mode"
)


@pytest.mark.parametrize(
    "batches", [[], iter(()), [np.ones((0, C))]], ids=["none", "exhausted", "empty"]
)
def test_no_data(batches):
    bn = norm(running_mean=5)
    before = statistics(bn)
    with refused(f"batches: {NO_DATA}"):
        cbn.recalibrate(bn, batches, bn)
    assert statistics(bn) == before


def test_forward_in_eval_mode(rng):
    bn = norm()
    with refused(f"batches: {NO_DATA}"):
        cbn.recalibrate(bn, [rng.normal(size=(8, C))], lambda batch: (bn.eval()(batch), bn.train()))
    assert bn.training


@pytest.mark.parametrize(
    ("switch", "seen"), [(cbn.BatchNorm1d.eval, "eval mode"), (cbn.freeze, "frozen")]
)
def test_forward_that_switches_would_measure_the_first_batch_only(switch, seen, rng):
    model = {"norm": norm(), "other": norm()}
    before = statistics(*model.values())

    def forward(batch):
        model["norm"](batch)
        switch(model["norm"])
        model["other"](batch)

    with refused(
        "norm: expected to stay in training mode and not frozen until the last batch, got "
        f"{seen} after a call of forward; switch after recalibrate"
    ):
        cbn.recalibrate(model, rng.normal(size=(2, 8, C)), forward)
    assert statistics(*model.values()) == before
    assert model["norm"].training


@pytest.mark.parametrize(
    ("correction", "shape", "text"),
    [
        (4, (2, 2, C), "more than 4 values per channel in all, got 4"),
        (1, (1, 1, C), "more than 1 value per channel in all, got 1"),
        (0, (1, 1, C), "more than 1 value per channel in all, got 1"),
    ],
)
def test_too_few_values_in_all(correction, shape, text, rng):
    model = {"norm": norm(correction=correction)}
    before = statistics(model["norm"])
    with refused(f"norm: expected {text}; give more data"):
        cbn.recalibrate(model, rng.normal(size=shape), model["norm"])
    assert statistics(model["norm"]) == before


def test_read_only_statistics_are_refused_before_the_pass():
    bn = norm()
    bn.running_mean.flags.writeable = False
    with refused("running_mean: expected a writable array, got a read-only one"):
        cbn.recalibrate(bn, [None], pytest.fail)


def test_statistics_that_forward_makes_read_only(rng):
    model = {"a": norm(), "b": norm()}
    before = statistics(*model.values())

    def forward(batch):
        model["b"](model["a"](batch))
        model["b"].running_var.flags.writeable = False

    with refused("b.running_var: expected a writable array, got a read-only one"):
        cbn.recalibrate(model, [rng.normal(size=(8, C))], forward)
    assert statistics(*model.values()) == before


FOUND = "layers are found in dicts, lists, tuples and attributes"


def untracked():
    bn = norm()
    bn.track_running_stats = False
    return bn


@pytest.mark.parametrize(
    ("layers", "which"),
    [
        ([], "with running statistics, got list with none among 0"),
        ([norm(track_running_stats=False)], "with running statistics, got list with none among 1"),
        ([cbn.freeze(norm())], "that is not frozen, got list with none among 1"),
        ([untracked()], "with track_running_stats=True, got list with none among 1"),
    ],
    ids=["none", "without", "frozen", "untracked"],
)
def test_nothing_to_recalibrate(layers, which):
    remedy = "call cbn.unfreeze(model) first" if "frozen" in which else FOUND
    with refused(f"model: expected at least one norm layer {which}; {remedy}"):
        cbn.recalibrate(layers, [None], pytest.fail)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((3, pytest.fail), "batches: expected an iterable of batches, got int"),
        (([], "forward"), "forward: expected a function of one batch, got str"),
        (([], pytest.fail, 1), "progress: expected True or False, got 1"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments, text):
    with refused(text, TypeError):
        cbn.recalibrate(norm(), *arguments)


# ---------------------------------------------------------------------------------------- progress


def test_progress(capsys, rng):
    pytest.importorskip("tqdm")
    bn, x = norm(), rng.normal(size=(8, C))
    cbn.recalibrate(bn, [x, x], bn, progress=True)
    shown = capsys.readouterr().err
    assert "recalibrate: 100%" in shown
    assert "2/2" in shown
    cbn.recalibrate(bn, [x, x], bn)
    assert capsys.readouterr().err == ""


def test_progress_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    text = (
        "progress: expected tqdm to be installed for progress=True, got none; "
        "install it with: pip install tqdm"
    )
    with refused(text, ImportError):
        cbn.recalibrate(norm(), [None], pytest.fail, progress=True)


# ------------------------------------------------------------------------------------- one batch


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("correction", [0, 1, 1.5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_batch_is_a_call_with_momentum_1(dtype, correction, training, rng):
    x = rng.normal(1, 2, (7, C)).astype(dtype)
    expected = cbn.BatchNorm1d(C, momentum=1, correction=correction, dtype=dtype)
    expected(x)
    bn = cbn.BatchNorm1d(C, momentum=None, correction=correction, dtype=dtype, running_mean=9)
    bn.train(training)(x)
    for _ in range(2):
        assert cbn.reinitialize_norm_stats(bn, x) is None
        assert statistics(bn) == statistics(expected)
    assert bn.training is training
    assert bn.momentum is None


def test_one_batch_takes_the_place_of_nan(rng):
    bn = norm(running_mean=np.nan, running_var=np.inf)
    x = rng.normal(size=(8, C))
    cbn.reinitialize_norm_stats(bn, x.tolist())
    assert_population(bn, x, 1)


def test_one_batch_of_a_layer_that_tracks_no_more(rng):
    bn, x = untracked(), rng.normal(size=(8, C))
    cbn.reinitialize_norm_stats(bn, x)
    assert_population(bn, x, 1)
    assert not bn.track_running_stats


WITHOUT = norm(track_running_stats=False)
FROZEN = cbn.freeze(norm())


@pytest.mark.parametrize(
    ("layer", "batch", "error", "text"),
    [
        ([norm()], np.ones((4, C)), TypeError, "layer: expected a norm layer of cbn, got list"),
        (
            WITHOUT,
            np.ones((4, C)),
            ValueError,
            f"layer: expected one with running statistics, got {WITHOUT!r}; "
            "set layer.track_running_stats = True",
        ),
        (
            FROZEN,
            np.ones((4, C)),
            ValueError,
            f"layer: expected one that is not frozen, got {FROZEN!r}; "
            "call cbn.unfreeze(layer) first",
        ),
        (
            norm(),
            np.ones((0, C)),
            ValueError,
            "batch: expected at least one value per channel, got an empty batch",
        ),
    ],
    ids=["model", "without", "frozen", "empty"],
)
def test_one_batch_refused(layer, batch, error, text):
    with refused(text, error):
        cbn.reinitialize_norm_stats(layer, batch)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(4, C + 1), (1, C), (4,)])
def test_one_batch_that_does_not_fit(shape, training):
    bn = norm(running_mean=5).train(training)
    before = statistics(bn)
    with pytest.raises(ValueError, match=r"^(x|layer): expected"):
        cbn.reinitialize_norm_stats(bn, np.ones(shape))
    assert statistics(bn) == before
    assert bn.training is training
