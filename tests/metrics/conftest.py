"""What the metric tests share: codes and factors, and the reference implementation's values for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """Return (inputs, expected): inputs["train_identity5"], inputs["ys_train"], expected["identity5"]["mig"]."""
    with np.load(GOLDEN / "metrics_inputs.npz") as file:
        inputs = {name: file[name] for name in file.files}
    for array in inputs.values():
        array.setflags(write=False)
    return inputs, json.loads((GOLDEN / "metrics.json").read_text())
