"""Fixtures of the CUDA kernels on the CPU."""

import functools

import pytest
from harness import build


@pytest.fixture(scope="session")
def build_once(tmp_path_factory):
    return functools.cache(lambda source: build(source, tmp_path_factory.mktemp("cuda_host")))


@pytest.fixture(scope="module")
def library(request, build_once):
    """The functions of the C++ file that the test module names."""
    return build_once(request.module.SOURCE)
