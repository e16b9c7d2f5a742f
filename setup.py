"""Build of the compiled extension ``fastdis._C``. Everything else is in pyproject.toml.

Environment variables
---------------------
FORCE_CUDA=1            build the CUDA kernels, and fail where that cannot be done; 0 leaves them out
FASTDIS_NO_EXT=1        pure Python: the reference and the Triton kernels only
TORCH_CUDA_ARCH_LIST    CUDA architectures; "8.0;9.0+PTX" where it is unset and no GPU is seen
MAX_JOBS                compiler processes at once
DEBUG=1                 debug symbols, little optimisation, warnings are errors
"""

import os
import shutil
from pathlib import Path

from setuptools import Command, Extension, setup

NO_EXTENSION = os.environ.get("FASTDIS_NO_EXT", "0") == "1"
DEBUG = os.environ.get("DEBUG", "0") == "1"
PURE_PYTHON = "or set FASTDIS_NO_EXT=1 to install without compiled kernels"

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None


def wants_cuda():
    """Whether to build CUDA kernels; fails in one sentence where FORCE_CUDA=1 cannot be followed."""
    force = os.environ.get("FORCE_CUDA")
    if force == "0":
        return False
    problem = None
    nvcc = cpp_extension.CUDA_HOME and Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
    if torch.version.cuda is None:
        problem = f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    elif not nvcc or not nvcc.exists():
        problem = f"no CUDA toolkit was found; install CUDA {torch.version.cuda} or set CUDA_HOME to where it is"
    else:
        words = os.popen(f'"{nvcc}" --version').read().partition("release ")[2].partition(",")[0]
        if words.split(".")[0] != torch.version.cuda.split(".")[0]:
            problem = (
                f"nvcc is version {words or 'unknown'} but torch {torch.__version__} is built for CUDA "
                f"{torch.version.cuda}; set CUDA_HOME to a toolkit of that major version"
            )
    if problem is None:
        return True
    if force is not None:
        raise SystemExit(f"fastdis: FORCE_CUDA is set, but {problem}.")
    if torch.version.cuda is not None:
        print(f"fastdis: building without CUDA kernels, because {problem}.")
    return False


def extension():
    """Describe the one extension: libtorch stable-ABI ops and the pybind11 module, in one shared object."""
    root = Path(__file__).parent
    cuda = wants_cuda()
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if cuda and not architectures and torch.cuda.device_count() == 0:
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0+PTX"
    if cuda and not architectures:
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        architectures = ";".join(f"{major}.{minor}" for major, minor in sorted(found))

    folders = ["csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/host/*.cpp", *(["csrc/cuda/*.cu"] if cuda else [])]
    sources = [path for pattern in folders for path in root.glob(pattern)]
    headers = [*root.glob("csrc/**/*.h"), *root.glob("csrc/**/*.cuh")]
    macros = [
        ("TORCH_TARGET_VERSION", "0x020b000000000000"),  # the stable ABI of torch 2.11, and of every later torch
        ("FASTDIS_BUILD_TORCH", torch.__version__),
        ("FASTDIS_BUILD_CUDA", torch.version.cuda if cuda else "none"),
        ("FASTDIS_BUILD_CUDA_ARCHITECTURES", architectures.replace(";", "_") if cuda else "none"),
        ("FASTDIS_BUILD_DEBUG", str(int(DEBUG))),
    ]
    if cuda:
        macros.append(("USE_CUDA", None))
    # No -ffast-math: it would reach the whole process through the linker, and lose NaN and Inf.
    host = ["-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
            "-fopenmp-simd", "-pthread"]  # fmt: skip
    host += ["-O1", "-g", "-Wall", "-Werror", "-Wno-psabi"] if DEBUG else ["-O2", "-g0", "-Wno-psabi"]
    device = ["-std=c++20", *(["-O1", "-g", "-lineinfo"] if DEBUG else ["-O3"])]
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return make(
        "fastdis._C",
        sorted(str(path.relative_to(root)) for path in sources),
        depends=sorted(str(path.relative_to(root)) for path in headers),
        define_macros=macros,
        extra_compile_args={"cxx": host, "nvcc": device},
        extra_link_args=["-pthread"],
    )


class MissingTorch(Command):
    """Stands in for the build where torch is missing: sdists can be made without it, extensions cannot."""

    user_options = []

    def initialize_options(self): ...

    def finalize_options(self): ...

    def get_source_files(self):
        return []

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}

    def run(self):
        raise SystemExit(
            "fastdis: torch is needed to build the compiled kernels; install torch 2.11 or later first and build with "
            f"--no-build-isolation, {PURE_PYTHON}."
        )


if NO_EXTENSION:
    modules, commands = [], {}
elif torch is None:
    modules, commands = [Extension("fastdis._C", [])], {"build_ext": MissingTorch}
else:

    class Build(cpp_extension.BuildExtension):
        """torch's build command, after a look for the compiler."""

        def run(self):
            compiler = os.environ.get("CXX", "c++").split()[0]
            if shutil.which(compiler) is None:
                raise SystemExit(
                    f"fastdis: no C++ compiler ({compiler}) was found; install g++ 12 or later, set CXX, {PURE_PYTHON}."
                )
            super().run()

    modules, commands = [extension()], {"build_ext": Build}

setup(ext_modules=modules, cmdclass=commands)
