"""The field's reference implementation, disentanglement_lib 1.5, made to run without TensorFlow as a peer.

Its metrics need no TensorFlow, only names of it at import. The wheel and three small packages it needs are fetched by
pip into a cache that the build directory holds; nothing of them is installed, or becomes part of this package.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np

CACHE = Path(__file__).resolve().parents[2] / "build" / "reference_library"
LIBRARY = "disentanglement_lib==1.5"
REQUIREMENTS = ("gin-config==0.5.0", "six", "absl-py")
MODULES = ("utils", "beta_vae", "factor_vae", "mig", "dci", "sap_score", "modularity_explicitness", "irs")


class ReferenceLibrary:
    """Its metric modules by name, set as in the study of Locatello et al. (2019): ``library.mig._compute_mig``."""

    def __init__(self) -> None:
        _fetch()
        gin = _make_importable()
        for name in MODULES:
            setattr(self, name, importlib.import_module(f"disentanglement_lib.evaluation.metrics.{name}"))
        gin.bind_parameter("discretizer.discretizer_fn", self.utils._histogram_discretize)
        gin.bind_parameter("discretizer.num_bins", 20)
        gin.bind_parameter("predictor.predictor_fn", self.utils.gradient_boosting_classifier)

    def __getattr__(self, name: str) -> ModuleType:
        raise AttributeError(name)


class LookedUpData:
    """A dataset as the reference implementation takes it, whose observations are codes already.

    With ``representation`` for the encoder, which passes them on, only its own work is timed.
    """

    def __init__(self, codes: np.ndarray, factor_sizes: tuple[int, ...]) -> None:
        self.codes = codes
        self.factors_num_values = list(factor_sizes)
        self.num_factors = len(factor_sizes)
        self.observation_shape = codes.shape[1:]

    @staticmethod
    def representation(observations: np.ndarray) -> np.ndarray:
        return observations

    def sample_factors(self, num: int, random_state: np.random.RandomState) -> np.ndarray:
        return np.stack([random_state.randint(size, size=num) for size in self.factors_num_values], axis=1)

    def sample_observations_from_factors(self, factors: np.ndarray, random_state: np.random.RandomState) -> np.ndarray:
        return self.codes[np.ravel_multi_index(tuple(factors.T), self.factors_num_values)]

    def sample(self, num: int, random_state: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        factors = self.sample_factors(num, random_state)
        return factors, self.sample_observations_from_factors(factors, random_state)

    def sample_observations(self, num: int, random_state: np.random.RandomState) -> np.ndarray:
        return self.sample(num, random_state)[1]


def _fetch() -> None:
    """Download what is not in the cache."""
    if (CACHE / "disentanglement_lib").is_dir():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "install", "--no-deps", "--target", str(CACHE), "--upgrade", *REQUIREMENTS], check=True)
    subprocess.run([*pip, "download", "--no-deps", "--dest", str(CACHE), LIBRARY], check=True)
    (wheel,) = CACHE.glob("disentanglement_lib-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(CACHE)


def _make_importable() -> ModuleType:
    """Let the library find what it looks for at import, and return gin, which holds its settings."""
    if str(CACHE) not in sys.path:
        sys.path.append(str(CACHE))
    import gin

    original = gin.configurable

    def configurable(*arguments, **keywords):
        # gin-config 0.5 renamed these.
        for old, new in (("blacklist", "denylist"), ("whitelist", "allowlist")):
            if old in keywords:
                keywords[new] = keywords.pop(old)
        return original(*arguments, **keywords)

    gin.configurable = configurable
    gin.tf = types.ModuleType("gin.tf")
    gin.tf.__dict__.update({name: getattr(gin, name) for name in dir(gin) if not name.startswith("__")})
    sys.modules["gin.tf"] = gin.tf
    for name in ("tensorflow", "tensorflow.compat", "tensorflow.compat.v1", "tensorflow.compat.v1.gfile"):
        sys.modules[name] = types.ModuleType(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    return gin
