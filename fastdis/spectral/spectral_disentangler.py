"""The spectral method: coordinates by a Hessian eigenmap, then independent components of them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from fastdis.metrics import mcc
from fastdis.spectral._arrays import restorer, to_array
from fastdis.spectral.fast_ica import FastICA
from fastdis.spectral.hessian_eigenmap import HessianEigenmap


class SpectralDisentangler(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Recover the factors of data whose generator is locally isometric and whose factors are independent.

    If :math:`x = f(z)` with f injective and :math:`J_f^\top J_f = I` on an open connected domain, a Hessian eigenmap
    recovers z up to an invertible affine map; if the components of z are independent and at most one is Gaussian,
    independent component analysis recovers them up to order, sign and scale [1]_.

    Parameters
    ----------
    n_components : int, optional
        d, the number of factors.
    n_neighbors : int, optional
        As for :class:`HessianEigenmap`.
    mode : {"hlle", "ltsa"}, optional
        As for :class:`HessianEigenmap`.
    neighbors_algorithm : {"exact", "approximate"}, optional
        As for :class:`HessianEigenmap`.
    contrast : {"logcosh", "exp", "cube"}, optional
        As for :class:`FastICA`.
    restarts : int, optional
        As for :class:`FastICA`.
    random_state : int, RandomState or None, optional
        For the starts of the latter.

    Attributes
    ----------
    eigenmap_ : HessianEigenmap
        What coordinates come from.
    ica_ : FastICA
        What turns them into factors.
    embedding_ : ndarray of float64, [n, d]
        Factors of the points fitted: uncorrelated, of mean 0 and variance 1, in any order.
    n_features_in_ : int
        D.

    Notes
    -----
    The paper's number of neighbours and its options of the analysis are not public: defaults are ours. Constant but
    unequal scales of the factors do no harm. Factors that are Gaussian, or a map that stretches some places more than
    others, are outside the theorem.

    Points in a CUDA tensor stay on their device, where :class:`HessianEigenmap` says what is computed there; components
    are the host's.

    References
    ----------
    .. [1] D. Horan, E. Richardson, Y. Weiss. When Is Unsupervised Disentanglement Possible? NeurIPS 2021.
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        n_neighbors: int | None = None,
        mode: Literal["hlle", "ltsa"] = "hlle",
        neighbors_algorithm: Literal["exact", "approximate"] = "exact",
        contrast: Literal["logcosh", "exp", "cube"] = "logcosh",
        restarts: int = 16,
        random_state: Any = 0,
    ) -> None:
        self.n_components = n_components
        self.n_neighbors = n_neighbors
        self.mode = mode
        self.neighbors_algorithm = neighbors_algorithm
        self.contrast = contrast
        self.restarts = restarts
        self.random_state = random_state

    def fit(self, X: Any, y: object = None) -> SpectralDisentangler:
        """Find the factors of points.

        Parameters
        ----------
        X : array or tensor, [n, D]
            Finite. Most rows must be distinct.
        y : object, optional
            Ignored.

        Returns
        -------
        SpectralDisentangler
            Itself.

        Raises
        ------
        ValueError
            As :meth:`HessianEigenmap.fit` and :meth:`FastICA.fit`.
        """
        self.fit_transform(X)
        return self

    def fit_transform(self, X: Any, y: object = None) -> Any:
        """Find the factors of points and return them, [n, d], as what was given: an array or a tensor.

        Parameters
        ----------
        X : array or tensor, [n, D]
            As for :meth:`fit`.
        y : object, optional
            Ignored.

        Returns
        -------
        array or tensor, [n, d]
            ``embedding_``.
        """
        eigenmap = HessianEigenmap(
            self.n_components,
            n_neighbors=self.n_neighbors,
            mode=self.mode,
            neighbors_algorithm=self.neighbors_algorithm,
        ).fit(X)
        ica = FastICA(contrast=self.contrast, restarts=self.restarts, random_state=self.random_state)
        factors = ica.fit(eigenmap.embedding_).transform(eigenmap.embedding_)
        self.eigenmap_, self.ica_, self.embedding_ = eigenmap, ica, factors
        self.n_features_in_ = eigenmap.n_features_in_
        if hasattr(eigenmap, "feature_names_in_"):
            self.feature_names_in_ = eigenmap.feature_names_in_
        self._n_features_out = factors.shape[1]
        return restorer(X)(factors)

    def transform(self, X: Any) -> Any:
        """Return factors of other points, [m, d], as what was given: an array or a tensor.

        Parameters
        ----------
        X : array or tensor, [m, D]
            Finite.

        Returns
        -------
        array or tensor, [m, d]
            Placed among the points fitted as :meth:`HessianEigenmap.transform` does.
        """
        check_is_fitted(self)
        return self.ica_.transform(self.eigenmap_.transform(X))

    def score(self, X: Any, y: Any) -> float:
        """Return how well factors agree with true ones: the mean correlation coefficient of the best matching.

        Parameters
        ----------
        X : array or tensor, [m, D]
            Points.
        y : array or tensor, [m] or [m, K]
            Their true factors.

        Returns
        -------
        float
            ``fastdis.metrics.mcc`` of :meth:`transform`, from 0 to 1.
        """
        truth = np.asarray(to_array(y))
        return mcc(self.transform(X), truth[:, None] if truth.ndim == 1 else truth).score
