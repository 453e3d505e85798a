"""Where state is saved to and loaded from beside paths, and by which classes of layers."""

import inspect
import io
import os

import numpy as np
import pytest
from refusals import refused

import cbn

SAVE = {
    "layer": lambda file: cbn.BatchNorm1d(2, running_mean=5).save(file),
    "model": lambda file: cbn.save([cbn.BatchNorm1d(2, running_mean=5)], file),
}


def load_model(file):
    model = [cbn.BatchNorm1d(2)]
    cbn.load(model, file)
    return model[0]


LOAD = {"layer": cbn.BatchNorm1d.load, "model": load_model}
WHOSE = pytest.mark.parametrize("whose", SAVE)


class Trickle(io.BytesIO):
    """It takes a little at a time, as a raw file may."""

    def write(self, data):
        return super().write(bytes(data)[:100])


# ------------------------------------------------------------------------------------- open files


@WHOSE
@pytest.mark.parametrize("kind", [io.BytesIO, Trickle])
def test_memory(kind, whose):
    file = kind()
    SAVE[whose](file)
    file.seek(0)
    assert LOAD[whose](file).running_mean.tolist() == [5, 5]
    assert not file.closed


@WHOSE
@pytest.mark.parametrize("buffering", [0, -1])
def test_an_open_file(buffering, whose, tmp_path):
    with open(tmp_path / "a", "w+b", buffering) as file:
        SAVE[whose](file)
        file.seek(0)
        assert LOAD[whose](file).running_mean.tolist() == [5, 5]
        assert not file.closed
    SAVE[whose](tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@WHOSE
def test_after_something_else(whose):
    file = io.BytesIO(b"head")
    file.seek(4)
    SAVE[whose](file)
    assert file.getvalue().startswith(b"headPK")
    file.seek(4)
    assert LOAD[whose](file).running_mean.tolist() == [5, 5]


@WHOSE
def test_a_damaged_one(whose):
    file = io.BytesIO(b"nonsense")
    text = "^BytesIO: expected a state file of cbn, got one that is damaged or foreign: "
    with pytest.raises(cbn.StateFileError, match=text):
        LOAD[whose](file)


@WHOSE
@pytest.mark.parametrize("how", ["save", "load"])
def test_a_descriptor_is_refused_and_stays_open(how, whose, tmp_path):
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    text = "path: expected a path or an open binary file, got int"
    with pytest.raises(TypeError, match=f"^{text}$"):
        {"save": SAVE, "load": LOAD}[how][whose](descriptor)
    assert os.fstat(descriptor).st_size == 0
    os.close(descriptor)


@WHOSE
@pytest.mark.parametrize("how", ["save", "load"])
@pytest.mark.parametrize("value", [None, True, io.StringIO("text")], ids=repr)
def test_what_is_neither(value, how, whose):
    text = f"path: expected a path or an open binary file, got {type(value).__name__}"
    with pytest.raises(TypeError, match=f"^{text}$"):
        {"save": SAVE, "load": LOAD}[how][whose](value)


class Texts:
    def read(self):
        return "text"


@WHOSE
def test_what_reads_text(whose):
    text = "path: expected a path or an open binary file, got one that reads str"
    with pytest.raises(TypeError, match=f"^{text}$"):
        LOAD[whose](Texts())


# ----------------------------------------------------------------------------------- classes


class Same(cbn.BatchNorm1d):
    """With the constructor of its base."""


class Passes(cbn.BatchNorm1d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Fixed(cbn.BatchNorm1d):
    def __init__(self):
        super().__init__(2)


class Part(cbn.BatchNorm1d):
    def __init__(self, num_features, eps=1e-3):
        super().__init__(num_features, eps)


class More(cbn.BatchNorm1d):
    def __init__(self, *args, act=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.act = act


class Hidden(More):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Groups(cbn.GroupNorm):
    def __init__(self, act=False):
        super().__init__(1, 2)


class Rows(cbn.LayerNorm):
    def __init__(self):
        super().__init__(2)


@pytest.mark.parametrize("cls", [Same, Passes])
def test_a_class_with_the_same_arguments_is_restored(cls, tmp_path):
    cls(2, 0.5, running_mean=3).eval().save(tmp_path / "file")
    again = cls.load(tmp_path / "file")
    assert (type(again), again.eps, again.training) == (cls, 0.5, False)
    assert again.running_mean.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (Fixed, Fixed),
        (lambda: Part(2), Part),
        (lambda: More(2, act=True), More),
        (lambda: Hidden(2, act=True), More),
        (Groups, Groups),
        (Rows, Rows),
    ],
    ids=["fixed", "part", "more", "hidden", "group", "row"],
)
def test_a_class_with_other_arguments_is_saved_as_a_model(make, culprit, tmp_path):
    layer, path = make(), tmp_path / "file"
    text = (
        f"class: expected one made with the arguments of {culprit.__mro__[1].__name__}, which a "
        f"file keeps, got {culprit.__name__}{inspect.signature(culprit.__init__)}; use "
        "cbn.save(layer, path), and cbn.load(layer, path) on a layer that the program has made"
    )
    for call in (layer.save, type(layer).load):
        with refused(text, TypeError):
            call(path)
    assert os.listdir(tmp_path) == []
    layer.weight[:] = 7
    cbn.save(layer, path)
    again = make()
    cbn.load(again, path)
    np.testing.assert_array_equal(again.weight, layer.weight)
