"""Fixtures for every test."""

import os

# A thread that waits must not spin on the core of one that works. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The compiled CPU kernels get memory full of NaN in every test.
os.environ["FASTDIS_POISON"] = "1"

import pytest
import torch


def pytest_collection_modifyitems(items):
    # Those that take minutes come first, or one worker would be left with them at the end.
    items.sort(key=lambda item: "test_triton_interpreter" not in item.nodeid)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Let torch's own allocations be full of NaN too, so that an element that no kernel writes shows."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)
