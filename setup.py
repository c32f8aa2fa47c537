"""Builds engine_fast._C. Everything else about the package stands in pyproject.toml.

ENGINE_FAST_CUDA=auto|0|1                     auto: with CUDA where torch has it and a toolkit is found; 1: or fail
ENGINE_FAST_CPU_ISA=auto|default|avx2|avx512  instruction set of the CPU code; auto: this machine's
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from engine_fast.extension import ISA_FEATURES, best_isa  # noqa: E402  (only the standard library behind it)

try:
    import pybind11
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(
        f"engine_fast: building needs {error.name}, which this environment lacks. Install it first "
        "(`pip install torch==2.13.0 pybind11 ninja`), then build against it: `pip install --no-build-isolation -e .`. "
        "`make install` does all of this."
    )

# at::parallel_for is OpenMP in a header. Compiled with it and linked without: torch's own runtime, already in the
# process, answers, and its threads are the only pool. at::vec has pragmas for other compilers, and g++ 12 warns of its
# own intrinsics' headers.
CXX_FLAGS = ["-O3", "-fopenmp", "-g0", "-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-Wno-uninitialized"]
ISA_FLAGS = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"],
    # at::vec silently falls back to generic code without both definitions.
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
        *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    ],
}


def choice(name: str, allowed: list[str]) -> str:
    """The environment variable `name`, "auto" when unset; exits with the allowed values otherwise."""
    value = os.environ.get(name) or "auto"
    if value not in allowed:
        sys.exit(f"engine_fast: {name} = {value!r}, expected one of {', '.join(allowed)}.")
    return value


def cpu_isa() -> str:
    wanted = choice("ENGINE_FAST_CPU_ISA", ["auto", *ISA_FEATURES])
    return best_isa() if wanted == "auto" else wanted


def cuda_version() -> str | None:
    """The CUDA version to build for, or None for a CPU build. Never asks whether a GPU is present."""
    wanted = choice("ENGINE_FAST_CUDA", ["auto", "0", "1"])
    nvcc = Path(CUDA_HOME, "bin", "nvcc") if CUDA_HOME else None
    missing = []
    if torch.version.cuda is None:
        missing.append(f"a torch with CUDA (torch {torch.__version__} is a CPU build)")
    if nvcc is None or not nvcc.is_file():
        missing.append("a CUDA toolkit (set CUDA_HOME to the folder that holds bin/nvcc)")
    if wanted == "1" and missing:
        sys.exit(
            f"engine_fast: ENGINE_FAST_CUDA = '1' needs {' and '.join(missing)}. ENGINE_FAST_CUDA=0 builds for the CPU."
        )
    return None if wanted == "0" or missing else torch.version.cuda


def compiler() -> tuple[str, str]:
    """(command, first line of its --version) of the C++ compiler that will be used; exits when there is none."""
    command = os.environ.get("CXX") or "g++"
    program = shlex.split(command)[0]
    if shutil.which(program) is None:
        sys.exit(
            f"engine_fast: the C++ compiler {program!r} was not found. Install g++ "
            "(Debian, Ubuntu: `apt-get install g++`) or set CXX to another C++20 compiler."
        )
    version = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, check=False)
    return command, (version.stdout or program).splitlines()[0]


class Build(BuildExtension):
    """Adds what is only known, and only needed, when something is really compiled."""

    def build_extensions(self) -> None:
        command, version = compiler()
        os.environ["CXX"] = command
        self.force = True  # ninja decides what is out of date: setuptools does not see changed flags or another torch
        for extension in self.extensions:
            flags = extension.extra_compile_args["cxx"]
            record = {
                "torch": torch.__version__,
                "isa": cpu_isa(),
                "cuda": cuda_version(),
                "compiler": version,
                "flags": " ".join(flags),
                "python": ".".join(map(str, sys.version_info[:3])),
            }
            literal = json.dumps(json.dumps(record)[1:-1])  # the inside of the object, as a C string
            extension.define_macros.append(("ENGINE_FAST_BUILD_JSON", literal))
        super().build_extensions()


def extension() -> Any:
    sources = [ROOT / "csrc" / "ops.cpp"]
    for folder in ("host", "cpu", "aten"):
        sources += sorted(ROOT.glob(f"csrc/{folder}/*.cpp"))
    arguments: dict[str, Any] = {
        "name": "engine_fast._C",
        "include_dirs": [pybind11.get_include(), str(ROOT / "csrc")],
        "depends": [
            str(path.relative_to(ROOT)) for suffix in ("h", "cuh") for path in sorted(ROOT.glob(f"csrc/**/*.{suffix}"))
        ],  # source archives take them
        "extra_compile_args": {"cxx": [*CXX_FLAGS, *ISA_FLAGS[cpu_isa()]]},
    }
    if cuda_version() is None:
        return CppExtension(sources=[str(path.relative_to(ROOT)) for path in sources], **arguments)
    # Without a list torch would ask the GPU of the build machine, which need not be there.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")
    sources += sorted(ROOT.glob("csrc/cuda/*.cu")) + sorted(ROOT.glob("csrc/cuda/*.cpp"))
    arguments["extra_compile_args"]["cxx"].append("-DENGINE_FAST_WITH_CUDA")
    arguments["extra_compile_args"]["nvcc"] = [
        "-O3",
        "-std=c++20",
        "--expt-relaxed-constexpr",
        "-diag-suppress=1675",
    ]  # g++'s unroll pragma
    return CUDAExtension(sources=[str(path.relative_to(ROOT)) for path in sources], **arguments)


class WithConfigs(build_py):
    """Puts configs/ into the wheel, as engine_fast/configs: `engine-fast demo` works without a clone."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_tree(str(ROOT / "configs"), str(Path(self.build_lib) / "engine_fast" / "configs"))


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": Build.with_options(no_python_abi_suffix=False), "build_py": WithConfigs},
)
