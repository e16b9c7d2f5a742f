"""Parametrises the column suites over their samples, dtypes and backends, and keeps one fault of a GPU from many."""

import os

# Without it cuBLAS refuses to run under torch's deterministic algorithms, which poison fresh memory. Read at its first
# product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import time

import pytest
import torch


def pytest_generate_tests(metafunc):
    generate = getattr(metafunc.cls, "generate", None)
    if generate is not None:
        generate(metafunc)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """After a fault of the GPU, which would fail every later test of the process, leave the rest to another worker."""
    if not report.failed or "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        time.sleep(1)  # until the report has gone to the controller
        os._exit(1)
