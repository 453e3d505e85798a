"""A forward of one's own: reached by a call, in classes and on layers, as in PyTorch."""

import copy
import pickle
import warnings

import numpy as np
import pytest
from norms_table import pickled
from processes import printed_by

import cbn

LAYERS = {
    cbn.BatchNorm1d: (2,),
    cbn.BatchNorm2d: (2,),
    cbn.BatchNorm3d: (2,),
    cbn.InstanceNorm1d: (2,),
    cbn.InstanceNorm2d: (2,),
    cbn.InstanceNorm3d: (2,),
    cbn.GroupNorm: (1, 2),
    cbn.LayerNorm: (5,),
    cbn.RMSNorm: (5,),
}
ALL = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)


def input_of(layer):
    axes = {"2": 1, "3": 2}.get(layer.__name__[-2], 0)
    return np.random.default_rng(0).normal(size=(6, 2, *[4] * axes, 5)).astype(np.float32)


def relu(y):
    return np.maximum(y, 0, out=y)


class Relu:
    """To be mixed into a layer."""

    def forward(self, x, out=None):
        return relu(super().forward(x, out))


class Doubled:
    """To be mixed in as well: what a call does around forward."""

    def __call__(self, x, out=None):
        y = super().__call__(x, out)
        return np.multiply(y, 2, out=y)


def derived(*bases, **attributes):
    return type("Derived", bases, attributes)


def forward_and_call(layer):
    class Both(layer):
        def forward(self, x, out=None):
            return relu(super().forward(x, out))

        def __call__(self, x, out=None):
            return 2 * super().__call__(x, out)

    return Both


WAYS = {
    "forward": (lambda layer: derived(Relu, layer), relu),
    "forward-further-down": (lambda layer: derived(derived(Relu, layer)), relu),
    "call": (lambda layer: derived(Doubled, layer), lambda y: 2 * y),
    "both": (forward_and_call, lambda y: 2 * relu(y)),
    "forward-of-call": (
        lambda layer: derived(Relu, derived(Doubled, layer)),
        lambda y: 2 * relu(y),
    ),
    "call-of-forward": (
        lambda layer: derived(Doubled, derived(Relu, layer)),
        lambda y: 2 * relu(y),
    ),
    "side-by-side": (
        lambda layer: derived(derived(Relu, layer), derived(Doubled, layer)),
        lambda y: 2 * relu(y),
    ),
    "one-name-for-both": (
        lambda layer: derived(
            layer,
            __call__=(call := lambda self, x, out=None: 2 * layer.__call__(self, x, out)),
            forward=call,
        ),
        lambda y: 2 * y,
    ),
    "other-arguments": (
        lambda layer: derived(layer, forward=lambda self, x, out=None: layer.forward(self, x) + 1),
        lambda y: y + 1,
    ),
}


@ALL
@pytest.mark.parametrize("way", WAYS)
def test_a_call_reaches_it(way, layer):
    derive, expected = WAYS[way]
    x = input_of(layer)
    norm = derive(layer)(*LAYERS[layer])
    y = expected(layer(*LAYERS[layer])(x))
    np.testing.assert_array_equal(norm(x), y)
    out = np.empty_like(x)
    np.testing.assert_array_equal(norm(x, out=out), y)
    # What else is derived from this norm is as it was.
    np.testing.assert_array_equal(layer(*LAYERS[layer])(x), layer(*LAYERS[layer]).forward(x))


@ALL
@pytest.mark.parametrize("on", ["class", "layer"])
def test_arguments_are_its_own(on, layer):
    x, norm = input_of(layer), layer(*LAYERS[layer])
    y = norm(x)
    if on == "class":
        forward = lambda self, x, *, scale=1: layer.forward(self, x) * scale  # noqa: E731
        norm = derived(layer, forward=forward)(*LAYERS[layer])
    else:
        inner = norm.forward
        norm.forward = lambda x, *, scale=1: inner(x) * scale
    np.testing.assert_array_equal(norm(x), y)
    np.testing.assert_array_equal(norm(x, scale=2), y * 2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'out'"):
        norm(x, out=x)


@ALL
def test_out_goes_through(layer):
    x, norm = input_of(layer), derived(Relu, layer)(*LAYERS[layer])
    out = np.empty_like(x)
    assert norm(x, out=out) is out
    np.testing.assert_array_equal(out, norm(x))


@ALL
def test_the_gradient_is_that_of_the_norm(layer):
    x, plain, norm = input_of(layer), layer(*LAYERS[layer]), derived(Relu, layer)(*LAYERS[layer])
    plain(x), norm(x)
    np.testing.assert_array_equal(norm.backward(x), plain.backward(x))


@ALL
def test_on_one_layer(layer):
    x, norm, other = input_of(layer), layer(*LAYERS[layer]), layer(*LAYERS[layer])
    y, inner = norm(x), norm.forward
    norm.forward = lambda x, out=None: relu(inner(x, out))
    np.testing.assert_array_equal(norm(x), relu(y.copy()))
    np.testing.assert_array_equal(other(x), y)
    np.testing.assert_array_equal(copy.deepcopy(norm)(x), relu(y.copy()))
    del norm.forward
    np.testing.assert_array_equal(norm(x), y)


@ALL
@pytest.mark.parametrize("mixin", [Relu, Doubled])
def test_on_a_layer_of_a_derived_class(layer, mixin):
    x, norm = input_of(layer), derived(mixin, layer)(*LAYERS[layer])
    y, inner = norm(x), norm.forward
    norm.forward = lambda x, out=None: -inner(x, out)
    np.testing.assert_array_equal(norm(x), -y)


def negative(x, out=None):
    return -x


class Own(Relu, cbn.BatchNorm1d):
    pass


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
def test_copies_have_it(duplicate):
    x, given = input_of(cbn.BatchNorm1d), cbn.BatchNorm1d(2)
    given.forward = negative
    np.testing.assert_array_equal(duplicate(given)(x), -x)
    assert duplicate(Own(2))(x).min() == 0


def test_a_pickle_has_it_in_another_process(tmp_path):
    norm = cbn.BatchNorm1d(2)
    norm.forward = np.negative
    path = tmp_path / "norm.pickle"
    path.write_bytes(pickle.dumps(norm))
    code = (
        f"import pickle; norm = pickle.load(open({str(path)!r}, 'rb'))\n"
        "print(norm([[1.0, 2.0]], None).tolist())"
    )
    assert printed_by(code) == "[[-1.0, -2.0]]\n"


def test_recalibration_goes_through_it():
    x, norm = input_of(cbn.BatchNorm1d), Own(2)
    cbn.recalibrate([norm], [x], norm)
    np.testing.assert_allclose(norm.running_mean, x.mean(axis=(0, 2)), rtol=1e-5)


@pytest.mark.parametrize("norm", [cbn.BatchNorm1d, cbn.InstanceNorm1d])
def test_a_warning_names_the_line_that_calls_the_norm(norm):
    """However the call comes there."""
    mixed = derived(derived(Relu, norm), derived(Doubled, norm))  # calls go by forward from now on
    for layer in (norm(2), mixed(2)):
        for call in (layer, norm(2).forward):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                call(np.random.default_rng(0).random((1, 2, 3), np.float32))
            assert [warning.filename for warning in caught] == [__file__]


@ALL
def test_a_plain_layer_is_called_without_a_detour(layer):
    """Also where its class has been extended, by a forward or by a __call__."""
    code = (
        "import cbn\n"
        f"norm = cbn.{layer.__name__}\n"
        "class Called(norm):\n"
        "    def __call__(self, x, out=None): return super().__call__(x, out)\n"
        "class Forward(norm):\n"
        "    def forward(self, x, out=None): return super().forward(x, out)\n"
        "assert norm.__call__ is norm._normalise\n"
    )
    printed_by(code)
