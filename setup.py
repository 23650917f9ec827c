"""Builds csrc/ into the module _lottery; pyproject.toml says the rest.

C++ where a compiler is, with OpenMP where it takes -fopenmp; CUDA too where torch has CUDA and an nvcc of its major
version is found; never by whether a GPU is present. USE_CUDA=0 refuses CUDA, TORCH_CUDA_ARCH_LIST chooses the
architectures. Without a compiler nothing is built and lottery.py runs in pure PyTorch.
"""

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from glob import glob

from setuptools import setup

try:
    import torch
except ImportError:
    raise SystemExit("setup.py needs torch: pip install -r requirements.txt, then --no-build-isolation") from None


def cuda_home() -> str | None:
    """The toolkit to build with, or None. (torch's own guess takes /usr for a link /usr/bin/nvcc.)"""
    if os.environ.get("USE_CUDA", "1") == "0" or torch.version.cuda is None:
        return None
    nvcc = os.path.realpath(shutil.which("nvcc") or "")
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and os.path.dirname(os.path.dirname(nvcc))):
        if home and os.path.isfile(f"{home}/bin/nvcc") and os.path.isfile(f"{home}/include/cuda_runtime.h"):
            said = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
            major = re.search(r"release (\d+)", said)
            if major and major[1] == torch.version.cuda.split(".")[0]:
                return home
    print(f"torch has CUDA {torch.version.cuda}, but there is no nvcc of that version: csrc/cuda is not built")
    return None


def compiles(compiler: str, flags: list[str], source: str) -> bool:
    """With the flags that the environment has for the build, too."""
    flags = [*os.environ.get("CXXFLAGS", "").split(), *flags, "trial.cpp", *os.environ.get("LDFLAGS", "").split()]
    trial = [*compiler.split(), *flags, "-o", "trial"]
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/trial.cpp", "w") as file:
            file.write(source)
        try:
            made = subprocess.run(trial, cwd=folder, capture_output=True, text=True)
        except OSError as error:
            print(error)
            return False
        print(made.stderr, end="")
        return made.returncode == 0


def openmp(compiler: str) -> list[str]:
    """The flag for OpenMP, or none where the compiler refuses it, as Apple's clang does."""
    if compiles(compiler, ["-fopenmp"], "#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n"):
        return ["-fopenmp"]
    print(f"{compiler} refuses -fopenmp: csrc/ is built for one thread")
    return []


def extensions() -> list:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not os.path.isfile(sysconfig.get_path("include") + "/Python.h"):
        print("no C++ compiler or no Python.h: csrc/ is not built, lottery.py will run in pure PyTorch")
        return []
    if not compiles(compiler, [], "#include <vector>\nint main() { return std::vector<int>(1)[0]; }\n"):  # macOS' stub
        print(f"{compiler} does not compile: csrc/ is not built, lottery.py will run in pure PyTorch")
        return []
    os.environ.setdefault("CXX", compiler)  # what was asked about OpenMP is what builds
    home = cuda_home()
    if home:
        os.environ["CUDA_HOME"] = home  # before cpp_extension is imported: it reads it once
        os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or "7.5;8.0;9.0+PTX"
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sources, headers = ["csrc/ops.cpp", *sorted(glob("csrc/cpu/*.cpp"))], glob("csrc/**/*.h", recursive=True)
    version = re.search(r'^__version__ = "(.*)"', open("audio_lottery/__init__.py").read(), re.M)[1]
    threads = openmp(compiler)
    name = f'-DAUDIO_LOTTERY_VERSION="{version}"'
    flags = ["-O3", *threads, "-Wall", name, *os.environ.get("CXXFLAGS", "").split()]
    if not home:
        return [CppExtension("_lottery", sources, extra_compile_args=flags, extra_link_args=threads, depends=headers)]
    define = f'-DAUDIO_LOTTERY_CUDA="{os.environ["TORCH_CUDA_ARCH_LIST"]}"'
    return [
        CUDAExtension(
            "_lottery", sources + sorted(glob("csrc/cuda/*.cu")), extra_link_args=threads, depends=headers,
            extra_compile_args={"cxx": [*flags, define], "nvcc": ["-O3", "--extra-device-vectorization"]},
        )
    ]  # fmt: skip


ext_modules = extensions()
if ext_modules:
    from torch.utils.cpp_extension import BuildExtension

    setup(ext_modules=ext_modules, cmdclass={"build_ext": BuildExtension})
else:
    setup()
