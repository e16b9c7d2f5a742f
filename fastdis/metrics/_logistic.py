"""Multinomial logistic regression, as scikit-learn fits it, with the loss and its gradient in one compiled pass.

scikit-learn writes and reads [n, classes] several times for each of a hundred evaluations, on one thread: with the 40
values of a dSprites orientation that takes seconds, and it would be nearly all that InfoE and the BetaVAE score cost.
The optimiser is SciPy's, with scikit-learn's settings: the iterates are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np

from fastdis.ops._backends import extension


class LogisticRegression:
    """A classifier that maximises the likelihood of classes under softmax(W x + b).

    Parameters
    ----------
    penalty : float, optional
        Times half the squared norm of W, beside the sum of losses; 0 for none. 1 / C of scikit-learn.
    balanced : bool, optional
        Weigh rows so that every class weighs as much.
    iterations : int, optional
        At most so many of L-BFGS, from zero. The optimum of separable classes without a penalty lies at infinity; the
        iterates stop where the largest entry of the mean loss's gradient is below 1e-4.
    """

    def __init__(self, *, penalty: float = 0.0, balanced: bool = False, iterations: int = 100) -> None:
        self.penalty = penalty
        self.balanced = balanced
        self.iterations = iterations

    def fit(self, x: np.ndarray, y: np.ndarray, *, threads: int = 1) -> LogisticRegression:
        """Fit finite features [n, p] and integer labels [n]."""
        try:
            from scipy.optimize import minimize
        except ImportError as error:
            raise ImportError("logistic regression needs SciPy: pip install 'fastdis[metrics]'") from error

        self.labels, inverse = np.unique(y, return_inverse=True)
        classes = len(self.labels)
        target = inverse.reshape(-1).astype(np.int32)
        n, p = x.shape
        # A power of two where features are so large that their products overflow; W takes it back below.
        largest = np.abs(x).max(initial=0.0)
        scale = 2.0 ** -np.frexp(largest)[1] if largest > 2.0**100 else 1.0
        design = np.concatenate([x * scale, np.ones((n, 1))], axis=1)
        counts = np.bincount(target)
        weights = (n / (classes * counts))[target] if self.balanced else np.ones(n)
        # Threads start anew for every evaluation, which must have some hundred microseconds of work for each.
        threads = max(1, min(threads, n * classes * (p + 1) // 250_000))
        mean_loss = multinomial_loss(design, target, weights / n, classes)
        # scikit-learn fits one vector to two classes where softmax has two: half its length each, so half its penalty.
        strength = self.penalty * scale**2 * (2 if classes == 2 else 1) / n

        def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            W = parameters.reshape(classes, p + 1)
            value, gradient = mean_loss(W, threads)
            gradient[:, :p] += strength * W[:, :p]
            return value + 0.5 * strength * np.sum(W[:, :p] ** 2), gradient.ravel()

        found = minimize(
            loss,
            np.zeros(classes * (p + 1)),
            method="L-BFGS-B",
            jac=True,
            options={"maxiter": self.iterations, "maxls": 50, "gtol": 1e-4, "ftol": 64 * np.finfo(float).eps},
        )
        W = found.x.reshape(classes, p + 1)
        self.coefficients, self.intercepts = W[:, :p] * scale, W[:, p]
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return the likeliest label of each row."""
        return self.labels[np.argmax(self._scores(x), axis=1)]

    def probabilities(self, x: np.ndarray) -> np.ndarray:
        """Return the probability of each label, [n, labels]."""
        scores = self._scores(x)
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        return scores / scores.sum(axis=1, keepdims=True)

    def log_loss(self, x: np.ndarray, y: np.ndarray) -> float:
        """Return the mean of -ln p(y | x), for labels that were fitted."""
        scores = self._scores(x)
        peak = scores.max(axis=1)
        chosen = scores[np.arange(len(x)), np.searchsorted(self.labels, y)]
        scores -= peak[:, None]
        return float(np.mean(np.log(np.exp(scores, out=scores).sum(axis=1)) + peak - chosen))

    def _scores(self, x: np.ndarray) -> np.ndarray:
        return x @ self.coefficients.T + self.intercepts


def serial_blas() -> AbstractContextManager[object]:
    """Keep BLAS on one thread while fits run: the optimiser's products are so small that waking others costs most.

    It holds for the whole process, so enter it once around fits that run side by side, not in each.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError("logistic regression needs threadpoolctl: pip install 'fastdis[metrics]'") from error
    return threadpool_limits(1, user_api="blas")


def multinomial_loss(
    x: np.ndarray, y: np.ndarray, w: np.ndarray, classes: int
) -> Callable[[np.ndarray, int], tuple[float, np.ndarray]]:
    """Return sum_i w_i (logsumexp_c(W_c . x_i) - W_{y_i} . x_i) and its gradient in W [classes, p], as a function.

    The function takes W and a number of threads. ``x`` is [n, p], ``y`` int32 [n] and ``w`` [n].
    """
    if extension is None:
        return lambda W, threads: multinomial_loss_numpy(x, y, w, W)
    return extension.MultinomialLoss(x, y, w, classes)


def multinomial_loss_numpy(x: np.ndarray, y: np.ndarray, w: np.ndarray, W: np.ndarray) -> tuple[float, np.ndarray]:
    """Return what the function that :func:`multinomial_loss` returns does."""
    rows = np.arange(len(x))
    scores = x @ W.T
    scores -= scores.max(axis=1, keepdims=True)
    chosen = scores[rows, y]
    share = np.exp(scores)
    total = share.sum(axis=1)
    share *= (w / total)[:, None]
    share[rows, y] -= w
    return float(np.sum(w * (np.log(total) - chosen))), share.T @ x
