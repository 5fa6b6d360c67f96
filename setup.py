"""Builds the C++ extension `repo_fast._C`; everything else about the package is in pyproject.toml.

The extension is optional: without a working C++ compiler the installation says so on one line and goes on, and
`repo_fast.ops` then runs its PyTorch backend on the CPU. No -march flag: a wheel must run on CPUs other than the
builder's. Sources that need more than the baseline name their instruction set themselves, and are only called on CPUs
that have it.
"""

import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import BaseError, CCompilerError


class OptionalBuildExt(build_ext):
    """Builds what can be built: with OpenMP, else without, else nothing."""

    def build_extension(self, extension: Pybind11Extension) -> None:
        compile_args, link_args = extension.extra_compile_args, extension.extra_link_args
        for openmp in [[]] if sys.platform == "win32" else [["-fopenmp"], []]:
            extension.extra_compile_args = [*compile_args, *openmp]
            extension.extra_link_args = [*link_args, *openmp]
            try:
                super().build_extension(extension)
                return
            except (BaseError, CCompilerError, OSError) as error:
                reason = error
        print(
            f"repo_fast: {extension.name} was not built ({str(reason):.60}); installing without it: "
            "the CPU ops will run on the torch backend. Install a C++ compiler (C++17) and reinstall to get it.",
            file=sys.stderr,
        )


def in_csrc(pattern: str) -> list[str]:
    """Files in csrc/, relative to this one, as setuptools wants them."""
    root = Path(__file__).parent
    return sorted(path.relative_to(root).as_posix() for path in (root / "csrc").glob(pattern))


setup(
    ext_modules=[
        Pybind11Extension(
            "repo_fast._C",
            in_csrc("*.cpp"),
            depends=in_csrc("*.h"),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["/O2"] if sys.platform == "win32" else ["-O3", "-pthread"],
            extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": OptionalBuildExt},
)
