"""What this installation is made of, and what serves each op on this machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import numpy as np
import torch

from fastdis._version import __version__
from fastdis.ops import _backends


def build_info() -> dict[str, Any]:
    """Describe this installation.

    Returns
    -------
    dict
        ``versions``: of fastdis, Python, torch, NumPy and Triton (``"not installed"`` where it is not);
        ``extension``: compiler, torch and CUDA it was built with, CUDA architectures, instruction-set levels compiled,
        the highest this machine has and the one in use, or ``missing`` with the reason;
        ``gpus``: their names;
        ``ops``: for each op and device type the backend that ``backend="auto"`` takes, and why.
    """
    triton = "not installed"
    if importlib.util.find_spec("triton") is not None:
        triton = importlib.metadata.version("triton")
    extension: dict[str, Any] = {"missing": f"{_backends.extension_error}; {_backends.REMEDY}"}
    if _backends.extension is not None:
        extension = _backends.extension.build_info()
        extension["cuda_architectures"] = extension["cuda_architectures"].replace("_", ";")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "fastdis": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "triton": triton,
        },
        "extension": extension,
        "gpus": gpus,
        "ops": {name: column.report() for name, column in _backends.columns().items()},
    }
