"""Independent component analysis from many starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from fastdis.spectral._arrays import restorer, to_array

INDEPENDENT = 1e-6  # of the largest deviation: below it a direction is rounding
Contrast = tuple[Callable[[np.ndarray], np.ndarray], float, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]]


def _log_cosh(y: np.ndarray) -> np.ndarray:
    size = np.abs(y)
    return size + np.log1p(np.exp(-2 * size)) - np.log(2.0)


def _slope_of_log_cosh(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    slope = np.tanh(y)
    return slope, 1 - slope**2


def _slope_of_gauss(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    bell = np.exp(-0.5 * y**2)
    return y * bell, (1 - y**2) * bell


# G, its mean under a standard normal distribution, and its first two derivatives.
CONTRASTS: dict[str, Contrast] = {
    "logcosh": (_log_cosh, 0.3745672075, _slope_of_log_cosh),
    "exp": (lambda y: -np.exp(-0.5 * y**2), -(0.5**0.5), _slope_of_gauss),
    "cube": (lambda y: 0.25 * y**4, 0.75, lambda y: (y**3, 3 * y**2)),
}


class FastICA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Directions in which data are as far from Gaussian as they can be, from many starts.

    The parallel fixed-point iteration [1]_ on whitened data. It may stop at spurious points without a sign of it. So it
    is run from several at once, and the run wins whose components are farthest from Gaussian,

    .. math:: J = \sum_i \big( \operatorname{mean} G(y_i) - \mathbb{E}\, G(\nu) \big)^2, \quad \nu \sim N(0, 1).

    Parameters
    ----------
    n_components : int, optional
        How many components; by default as many as data vary in.
    contrast : {"logcosh", "exp", "cube"}, optional
        G: log cosh y, minus exp(-y**2 / 2), or y**4 / 4.
    restarts : int, optional
        From how many random rotations the iteration starts.
    max_iter : int, optional
        Most iterations of a run.
    tol : float, optional
        A run has converged where no direction turned by more than this, as 1 - abs(cosine).
    random_state : int, RandomState or None, optional
        For the starts.

    Attributes
    ----------
    components_ : ndarray of float64, [d, D]
        Unmixing: data less ``mean_``, times its transpose, are components of variance 1.
    mixing_ : ndarray of float64, [D, d]
        Its pseudo-inverse.
    mean_ : ndarray of float64, [D]
        Of the data.
    contrasts_ : ndarray of float64, [restarts]
        J of every run.
    converged_ : ndarray of bool, [restarts]
        Which runs converged.
    n_iter_ : int
        Iterations of the run that won.
    n_features_in_ : int
        D.

    Notes
    -----
    Components come in any order and with either sign; here the skewness of each is positive or zero. At most one source
    may be Gaussian. Arrays or tensors; computed in float64.

    References
    ----------
    .. [1] A. Hyvärinen. Fast and Robust Fixed-Point Algorithms for Independent Component Analysis. IEEE Transactions on
       Neural Networks 1999.
    """

    def __init__(
        self,
        n_components: int | None = None,
        *,
        contrast: Literal["logcosh", "exp", "cube"] = "logcosh",
        restarts: int = 16,
        max_iter: int = 200,
        tol: float = 1e-4,
        random_state: Any = 0,
    ) -> None:
        self.n_components = n_components
        self.contrast = contrast
        self.restarts = restarts
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Any, y: object = None) -> FastICA:
        """Find independent components of data.

        Parameters
        ----------
        X : array or tensor, [n, D]
            Finite.
        y : object, optional
            Ignored.

        Returns
        -------
        FastICA
            Itself.

        Raises
        ------
        ValueError
            A number is NaN or infinite; a parameter is out of range; or data vary in fewer directions than components
            are wanted.
        """
        X = validate_data(self, to_array(X), dtype=np.float64, ensure_min_samples=2)
        if self.contrast not in CONTRASTS:
            raise ValueError(f"contrast must be one of {', '.join(CONTRASTS)}, got {self.contrast!r}")
        for name in ("restarts", "max_iter"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
        if not self.tol > 0:
            raise ValueError(f"tol must be positive, got {self.tol!r}")
        self.mean_ = X.mean(axis=0)
        white, whitening = self._whiten(X - self.mean_)
        rotations, self.converged_, iterations = self._rotate(white)
        G, of_gaussian, _ = CONTRASTS[self.contrast]
        means = np.stack([G(rotation @ white).mean(axis=1) for rotation in rotations])
        self.contrasts_ = np.square(means - of_gaussian).sum(axis=1)
        best = int(np.argmax(self.contrasts_))
        self.n_iter_ = int(iterations[best])
        rotation = rotations[best]
        skewness = np.mean((rotation @ white) ** 3, axis=1)
        rotation = rotation * np.where(skewness < 0, -1.0, 1.0)[:, None]
        self.components_ = rotation @ whitening
        self.mixing_ = np.linalg.pinv(self.components_)
        self._n_features_out = len(self.components_)
        return self

    def transform(self, X: Any) -> Any:
        """Return the components of data, [m, d], as what was given: an array or a tensor.

        Parameters
        ----------
        X : array or tensor, [m, D]
            Finite.

        Returns
        -------
        array or tensor, [m, d]
            Of variance 1 on the data that were fitted.
        """
        check_is_fitted(self)
        points = validate_data(self, to_array(X), dtype=np.float64, reset=False)
        return restorer(X)((points - self.mean_) @ self.components_.T)

    def inverse_transform(self, X: Any) -> Any:
        """Return data that have given components.

        Parameters
        ----------
        X : array or tensor, [m, d]
            Components.

        Returns
        -------
        array or tensor, [m, D]
            The nearest data of those that components of the fit span.
        """
        check_is_fitted(self)
        return restorer(X)(np.asarray(to_array(X), np.float64) @ self.mixing_.T + self.mean_)

    def score(self, X: Any, y: object = None) -> float:
        """Return how far from Gaussian the components of data are, J.

        Parameters
        ----------
        X : array or tensor, [m, D]
            Data.
        y : object, optional
            Ignored.

        Returns
        -------
        float
            0 for Gaussian data, and positive otherwise.
        """
        G, of_gaussian, _ = CONTRASTS[self.contrast]
        components = to_array(self.transform(X))
        return float(np.square(G(components).mean(axis=0) - of_gaussian).sum())

    def _whiten(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return uncorrelated coordinates of variance 1, [d, n], and the map to them, [d, D]."""
        n = len(X)
        constant = np.flatnonzero((X[:1] == X).all(axis=0))
        _, lengths, directions = np.linalg.svd(X, full_matrices=False)
        rank = int(np.count_nonzero(lengths > INDEPENDENT * lengths[0]))
        wanted = rank if self.n_components is None else self.n_components
        if not isinstance(wanted, int | np.integer) or wanted < 1 or wanted > rank:
            named = f" (column {constant[0]} never changes)" if len(constant) else ""
            raise ValueError(
                f"n_components must be a whole number from 1 to the number of directions in which X varies, {rank}"
                f"{named}, got {self.n_components!r}"
            )
        whitening = directions[:wanted] * (n**0.5 / lengths[:wanted, None])
        # The sign of a singular vector is arbitrary; make it no matter of the library.
        largest = np.abs(whitening).argmax(axis=1)
        whitening *= np.sign(whitening[np.arange(wanted), largest])[:, None]
        return whitening @ X.T, whitening

    def _rotate(self, white: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rotations [restarts, d, d] that runs ended at, which converged, and after how many iterations."""
        d, n = white.shape
        slopes = CONTRASTS[self.contrast][2]
        random = check_random_state(self.random_state)
        rotations = _nearest_rotations(random.standard_normal((self.restarts, d, d)))
        converged = np.zeros(self.restarts, bool)
        iterations = np.zeros(self.restarts, int)
        for iteration in range(1, self.max_iter + 1):
            running = np.flatnonzero(~converged)
            if not len(running):
                break
            first, second = slopes((rotations[running].reshape(-1, d) @ white).reshape(len(running), d, n))
            turned = (first.reshape(-1, n) @ white.T).reshape(len(running), d, d) / n
            turned = _nearest_rotations(turned - second.mean(axis=2)[:, :, None] * rotations[running])
            cosines = np.abs(np.einsum("rij,rij->ri", turned, rotations[running]))
            rotations[running] = turned
            iterations[running] = iteration
            converged[running] = (1 - cosines).max(axis=1) < self.tol
        return rotations, converged, iterations


def _nearest_rotations(matrices: np.ndarray) -> np.ndarray:
    """Return the orthogonal matrices nearest to [r, d, d]: (W W^T)^(-1/2) W."""
    left, _, right = np.linalg.svd(matrices)
    return left @ right
