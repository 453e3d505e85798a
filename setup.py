"""Extensions of cbn: the passes, and their micro-kernels for every instruction set."""

import os
import platform
import sys
import tempfile
import warnings
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# No flag here may change a result: contraction and fast-math would.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# Python's own flags ask for debug information, which is most of an extension. Who wants it says so.
ASKED = f"{os.environ.get('CC', '')} {os.environ.get('CFLAGS', '')}".split()
if not any(flag.startswith("-g") for flag in ASKED):
    FLAGS.append("-g0")
# A function and a loop begin with a cache line, whatever stands before them: what stood there made
# planes of 7 x 7 up to a fifth slower or faster (inference, benchmarks/compare.py).
ALIGNMENT = ["-falign-functions=64", "-falign-loops=64"]
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "x86_64_v3": ["-march=x86-64-v3"],
        # gcc would keep to vectors of 256 bits by itself.
        "x86_64_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    }

OPENMP_PROBE = """
#include <omp.h>
int main(void) { return omp_get_max_threads() < 1; }
"""


class BuildExtensions(build_ext):
    """Add OpenMP to every extension, if a program that needs it compiles and links."""

    def finalize_options(self) -> None:
        """Build side by side: an extension takes about a minute."""
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self) -> None:
        """Build, with OpenMP or after one warning without."""
        if self.has_openmp():
            for extension in self.extensions:
                extension.extra_compile_args.append("-fopenmp")
                extension.extra_link_args.append("-fopenmp")
        elif os.environ.get("CBN_REQUIRE_OPENMP") == "1":
            sys.exit("error: CBN_REQUIRE_OPENMP=1, but the compiler cannot build with -fopenmp")
        else:
            warnings.warn(
                "cbn is built without OpenMP and will use one thread: "
                "the compiler cannot build with -fopenmp",
                stacklevel=1,
            )
        super().build_extensions()

    def has_openmp(self) -> bool:
        """Whether a program with OpenMP compiles and links."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(OPENMP_PROBE)
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=["-fopenmp"]
                )
                self.compiler.link_executable(
                    objects, str(Path(folder, "probe")), extra_postargs=["-fopenmp"]
                )
            except Exception:  # each compiler class has errors of its own
                return False
        return True


COMMON = {
    "depends": [str(path) for path in sorted(Path("src").glob("*.[ph]*"))],
    "include_dirs": ["src", numpy.get_include()],
    "define_macros": [("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
}

# Cython also writes src/_core.h, which the others include.
core = cythonize(
    Extension("cbn._core", ["src/_core.pyx"], extra_compile_args=FLAGS, **COMMON),
    include_path=["src"],
    compiler_directives={
        "language_level": 3,
        "boundscheck": False,
        "wraparound": False,
        "cdivision": True,
        "initializedcheck": False,
    },
)
micro = [
    Extension(
        f"cbn._micro_{isa}",
        [f"src/_micro_{isa}.c"],
        extra_compile_args=[*FLAGS, *ALIGNMENT, *flags],
        **COMMON,
    )
    for isa, flags in INSTRUCTION_SETS.items()
]
setup(cmdclass={"build_ext": BuildExtensions}, ext_modules=[*core, *micro])
