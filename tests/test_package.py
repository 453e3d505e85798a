"""The package: what an import loads and offers, what is shipped, and how it is built."""

import inspect
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from importlib.metadata import distribution
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import printed_by, run_python

import cbn
from cbn import functional, reference

ROOT = Path(__file__).parents[1]
HEAVY = {"asyncio", "concurrent", "doctest", "email", "http", "multiprocessing", "pdb", "pydoc"}
HEAVY |= {"distutils", "setuptools", "sqlite3", "ssl", "unittest", "urllib", "xml", "zipfile"}


def modules_after(statement):
    code = f"{statement}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    return {name.partition(".")[0] for name in json.loads(printed_by(code))}


def test_import_loads_numpy_and_little_else():
    new = modules_after("import cbn") - modules_after("import numpy")
    assert "cbn" in new
    foreign = {name for name in new if name not in sys.stdlib_module_names}
    assert {name for name in foreign if not re.match(r"_?cython", name)} == {"cbn"}
    assert new & HEAVY == set()


def test_the_formulas_are_loaded_when_they_are_asked_for():
    code = """import cbn, sys
assert "cbn.reference" not in sys.modules and "reference" in dir(cbn)
print(cbn.reference.rms_norm([[1.0, 7.0]], 2, eps=0.0).tolist(), hasattr(cbn, "nothing"))"""
    assert printed_by(code) == "[[0.2, 1.4]] False\n"


def test_an_unknown_name_is_an_error_as_of_any_module():
    with pytest.raises(AttributeError, match=r"^module 'cbn' has no attribute 'nothing'$"):
        _ = cbn.nothing


@pytest.mark.parametrize(
    "without",
    ["*.so", "_core.*.so", "_micro_*.so"],
    ids=["nothing", "no_passes", "no_micro_kernels"],
)
def test_an_import_of_what_was_not_built_says_how_to_build(tmp_path, without):
    checkout = shutil.copytree(
        Path(cbn.__file__).parent, tmp_path / "cbn", ignore=shutil.ignore_patterns(without)
    )
    # An editable install would lend its own extensions.
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in f.__module__]"
    )
    run = run_python("-c", f"{code}; import cbn", cwd=tmp_path)
    assert run.stderr.splitlines()[-1] == (
        f"ImportError: cbn: expected extensions built for this Python in {checkout}, got none; "
        "build them with 'pip install -e .' in the checkout, or start Python elsewhere to import "
        "an installed cbn"
    )


@pytest.mark.parametrize("module", ["_core", "_micro_baseline"])
def test_an_import_of_a_broken_build_says_what_is_broken(tmp_path, module):
    checkout = shutil.copytree(Path(cbn.__file__).parent, tmp_path / "cbn")
    broken = Path(find_spec(f"cbn.{module}").origin).name
    (checkout / broken).write_bytes(b"cut short")
    run = run_python("-c", "import cbn", cwd=tmp_path, CBN_ISA="baseline")
    last = run.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert broken in last


def test_public_names():
    layers = ["GroupNorm", "LayerNorm", "RMSNorm"]
    layers += [f"{kind}Norm{d}d" for kind in ("Batch", "Instance") for d in (1, 2, 3)]
    notices = ["SmallBatchWarning", "StateFileError"]
    threads = ["get_num_threads", "num_threads", "set_num_threads"]
    models = ["freeze", "named_norm_layers", "recalibrate", "reinitialize_norm_stats"]
    models += ["reset_norm_stats", "unfreeze", "state_dict", "load_state_dict", "save", "load"]
    models += ["fold_conv", "fold_linear"]
    assert sorted(cbn.__all__) == sorted(
        [*layers, *models, *notices, "functional", "reference", "show_config", *threads]
    )
    assert all(hasattr(cbn, name) for name in cbn.__all__)
    norms = [f"{kind}_norm" for kind in ("batch", "group", "instance", "layer", "rms")]
    functions = [f"{norm}{what}" for norm in norms for what in ("", "_forward", "_backward")]
    functions += ["batch_norm_stats", "norm_backward"]
    assert sorted(cbn.functional.__all__) == sorted(functions)


@pytest.mark.parametrize("name", cbn.__all__)
def test_public_names_are_documented(name):
    assert getattr(cbn, name).__doc__


CALLABLES = [getattr(cbn, name) for name in cbn.__all__]
CALLABLES += [
    getattr(module, name) for module in (functional, reference) for name in module.__all__
]
CALLABLES = [each for each in CALLABLES if callable(each) and not hasattr(each, "with_traceback")]


@pytest.mark.parametrize("public", CALLABLES, ids=lambda each: f"{each.__module__}.{each.__name__}")
def test_help_tells_of_every_argument_in_the_order_of_the_signature(public):
    """Also where the docstring takes it from another."""
    section = re.search(r"\nParameters\n-+\n(.*?)(\n\n|\Z)", inspect.getdoc(public), re.DOTALL)
    entries = re.findall(r"^(\S.*?)(?: : .*)?$", section[1], re.MULTILINE) if section else []
    told = [name for entry in entries for name in entry.split(", ")]
    assert told == list(inspect.signature(public).parameters)


@pytest.mark.parametrize("name", cbn.__all__)
def test_public_names_are_in_the_reference(name):
    needs_sources()
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.rst"))
    assert re.search(rf"^\.\. (auto\w+|module):: (cbn\.)?{name}$", pages, re.MULTILINE)


def test_version_is_that_of_the_metadata():
    assert cbn.__version__ == distribution("cbn").version


def test_only_numpy_is_required():
    required = [r for r in distribution("cbn").requires if "extra ==" not in r]
    assert [re.match(r"[\w.-]+", requirement)[0] for requirement in required] == ["numpy"]


def test_typed():
    assert files("cbn").joinpath("py.typed").is_file()


# ----------------------------------------------------------------------------------------- builds


def needs_sources():
    if not (ROOT / "setup.py").is_file():
        pytest.skip("the tests are not in a checkout")


@pytest.mark.parametrize(
    "flag",
    [
        "-Ofast",
        "-ffast-math",
        "-funsafe-math",
        "-fassociative",
        "-freciprocal",
        "-ffinite",
        "=native",
    ],
)
def test_no_flag_may_change_a_result_or_tie_it_to_this_machine(flag):
    needs_sources()
    made = ("_core.c", "_core.h")  # by Cython
    sources = [file for file in ROOT.glob("src/*") if file.is_file() and file.name not in made]
    assert len(sources) > 10
    for file in (ROOT / "setup.py", ROOT / "pyproject.toml", *sources):
        text = file.read_text()
        assert flag not in text, file
        assert "optimize(" not in text, file  # nor by an attribute, for a function


@pytest.mark.parametrize("word", ["allow_pickle=True", "import pickle", "from pickle"])
def test_nothing_reads_pickles(word):
    modules = list(Path(cbn.__file__).parent.rglob("*.py"))
    assert len(modules) > 10
    assert not [file for file in modules if word in file.read_text()]


def test_no_multiplication_and_addition_become_one():
    needs_sources()
    assert '"-ffp-contract=off"' in (ROOT / "setup.py").read_text()


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A function that builds a copy of the sources with a compiler that has no OpenMP."""
    needs_sources()
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("build")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("cbn", "src"):
        made = shutil.ignore_patterns("_core.c", "_core.h", "*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=made)
    compiler = folder / "compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        'case " $* " in *" -fopenmp "*) echo "no OpenMP here" >&2; exit 1;; esac\n'
        # To build sooner: what comes last counts.
        'exec cc "$@" -O1\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)

    def build(**environment):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("CBN_", "PYTHON"))}
        return subprocess.run(
            # For a processor whose family has one instruction set, to build sooner.
            [
                *(sys.executable, "-c", "import platform; platform.machine = str; import setup"),
                *("build", "--build-base", "made", "--build-lib", "library"),
            ],
            cwd=folder,
            env={**clean, "CC": str(compiler), **environment},
            capture_output=True,
            text=True,
        )

    build.folder = folder
    return build


def test_openmp_can_be_required(build):
    run = build(CBN_REQUIRE_OPENMP="1")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        "error: CBN_REQUIRE_OPENMP=1, but the compiler cannot build with -fopenmp"
    )
    assert list(build.folder.glob("library/cbn/*.so")) == []


def test_build_without_openmp(build):
    run = build()
    assert run.returncode == 0, run.stderr
    warnings = [line for line in run.stderr.splitlines() if "OpenMP and will use one" in line]
    assert len(warnings) == 1
    assert warnings[0].endswith(
        "cbn is built without OpenMP and will use one thread: "
        "the compiler cannot build with -fopenmp"
    )
    assert "Traceback" not in run.stderr

    library = build.folder / "library"
    assert (library / "cbn" / "py.typed").is_file()
    code = (
        "import cbn; print(cbn.__file__); print(cbn.get_num_threads()); cbn.set_num_threads(4); "
        "print(cbn.BatchNorm1d(1, eps=0)([[1.0], [3.0]] * 2).tolist())"
    )
    assert run_python("-c", code, cwd=library, CBN_ISA="baseline").stdout.splitlines() == [
        str(library / "cbn" / "__init__.py"),
        "1",
        "[[-1.0], [1.0], [-1.0], [1.0]]",
    ]
