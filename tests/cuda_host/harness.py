"""What the tests of the CUDA kernels on the CPU share.

A test module names the C++ file with the functions it calls, ``SOURCE = "host_<family>.cpp"``, and takes the fixture
``library``: that file, compiled with the system compiler once a session. Such a file includes host_library.h first,
then the kernels, and exports C functions that return null or what went wrong.

Arrays handed to the kernels are filled with NaN before, so that an element nobody writes shows; they start or end at
inaccessible pages, so that an access outside them fails the test that makes it.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
TOLERANCES = {torch.float32: 4e-6, torch.float64: 1e-13, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def statistics_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def build(source, folder):
    """Compile one C++ file of this folder and load it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the CUDA kernels for the host")
    flags = ["-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-fsanitize=bounds,alignment"]
    includes = [f"-I{HERE}", f"-I{CUDA}"]
    compile_command = [compiler, *flags, "-Wno-unknown-pragmas", *includes, "-c", str(HERE / source)]
    subprocess.run([*compile_command, "-o", str(folder / "host.o")], check=True)
    # Linked without the sanitizer's runtime: its handlers are ours.
    subprocess.run([compiler, "-shared", "-o", str(folder / "host.so"), str(folder / "host.o")], check=True)
    loaded = ctypes.CDLL(str(folder / "host.so"))
    loaded.guarded_allocate.restype = ctypes.c_void_p
    loaded.guarded_data.restype = ctypes.c_void_p
    loaded.launched_kernels.restype = ctypes.c_char_p
    return loaded


class Arena:
    """Guarded tensors that live as long as the ``with`` block, at whose end nothing around them may have changed.

    They start right after an inaccessible page, 16-byte aligned or (``shifted``) one element later, or (``at_end``)
    stop right before one, aligned or not as their length has it.

    With a ``window``, only that many blocks at either end of each launch run, and tensors are zeros that take no memory
    before they are written: they may be as large as those whose offsets need 64 bits.
    """

    def __init__(self, library, at_end=True, reversed_order=False, shifted=False, window=0):
        self.library, self.at_end, self.shifted, self.memory = library, at_end and not shifted, shifted, []
        library.set_reversed(int(reversed_order))
        library.set_window(ctypes.c_int64(window))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.library.set_reversed(0)
        self.library.set_window(ctypes.c_int64(0))
        if error[0] is None:  # else the memory stays: the failure report prints the tensors
            clean = [self.library.guarded_free(ctypes.c_void_p(memory)) for memory in self.memory]
            assert all(clean), "a kernel wrote outside an array"

    def empty(self, size, dtype):
        """Return a tensor full of NaN (integers: -1)."""
        count = torch.Size(size).numel()
        length = count * dtype.itemsize
        memory = self.library.guarded_allocate(ctypes.c_size_t(length), int(self.at_end), self.shifted * dtype.itemsize)
        self.memory.append(memory)
        if count == 0:
            return torch.empty(size, dtype=dtype)
        address = self.library.guarded_data(ctypes.c_void_p(memory))
        return torch.frombuffer((ctypes.c_char * length).from_address(address), dtype=dtype).view(size)

    def copy(self, tensor):
        return None if tensor is None else self.empty(tensor.shape, tensor.dtype).copy_(tensor)


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def call(function, *arguments):
    """Call a function of the library: tensors as pointers, floats as doubles, integers as they are."""
    function.restype = ctypes.c_char_p
    converted = []
    for argument in arguments:
        if argument is None or isinstance(argument, torch.Tensor):
            converted.append(pointer(argument))
        elif isinstance(argument, float):
            converted.append(ctypes.c_double(argument))
        else:
            converted.append(argument)
    error = function(*converted)
    assert error is None, error.decode()


def kernels_of(*files):
    """Names, as namespace::kernel, of the __global__ functions of files of csrc/cuda."""
    names = set()
    for file in files:
        source = (CUDA / file).read_text()
        namespace = re.search(r"^namespace (fastdis[\w:]*) \{$", source, re.MULTILINE)[1]
        found = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", source)
        assert len(found) == source.count("__global__"), file
        names |= {f"{namespace}::{name}" for name in found}
    return names


def launched(library):
    """Names of the kernels that ran since the last call."""
    return set(library.launched_kernels().decode().split())


def assert_near(actual, expected, tolerance, what):
    assert actual.shape == expected.shape, what
    expected = expected.double()
    scale = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 1.0
    torch.testing.assert_close(
        actual.double(),
        expected,
        rtol=tolerance,
        atol=tolerance * max(scale, 1.0),
        equal_nan=True,
        msg=lambda m: f"{what}: {m}",
    )
