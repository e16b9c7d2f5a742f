"""Manifolds with known coordinates, for the spectral tests."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def torus_patch():
    """Uniform coordinates, each on an arc of a circle of its own, in a random subspace: isometric."""

    def make(n, d, D, seed=0, reach=1.0):
        rng = np.random.default_rng(seed)
        z = rng.uniform(-reach, reach, (n, d))
        arcs = np.concatenate([np.sin(z), 1 - np.cos(z)], axis=1)
        frame = np.linalg.qr(rng.standard_normal((max(D, 2 * d), 2 * d)))[0]
        return z, arcs @ frame.T

    return make


@pytest.fixture(scope="session")
def patch(torus_patch):
    return torus_patch(900, 2, 40)
