"""SAP: against the reference implementation and scikit-learn, by hand, and on input that is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdis.metrics import sap
from fastdis.metrics._host_hinge import hinge_accuracy, hinge_accuracy_numpy, hinge_lines, hinge_lines_numpy
from fastdis.metrics._split import as_split

ENCODERS = ["identity5", "linear_mix10", "collapsed10"]


def golden_split(inputs, encoder):
    return inputs[f"train_{encoder}"], inputs["ys_train"], inputs[f"test_{encoder}"], inputs["ys_test"]


@pytest.fixture
def factors():
    """Ten independent factors of ten values, as in the reference implementation's own tests."""
    return np.random.RandomState(0).randint(1, 11, size=(3000, 10))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_matches_the_reference_implementation(golden, encoder):
    inputs, expected = golden
    arguments = golden_split(inputs, encoder)
    assert sap(*arguments).score == pytest.approx(expected[encoder]["sap_discrete"], abs=1e-6)
    assert sap(*arguments, continuous=True).score == pytest.approx(expected[encoder]["sap_continuous"], abs=1e-6)


def random_problem(seed, n, sizes, scale=1.0, shift=0.0):
    random = np.random.default_rng(seed)
    sizes = np.array(sizes, np.int32)
    classes = np.stack([random.permutation(np.arange(n) % size) for size in sizes]).astype(np.int32)
    if n > 100:  # rare classes, but none that is absent
        classes[:, n // 3 :] = np.minimum(classes[:, n // 3 :], 1)
    codes = random.normal(size=(n, 3)) + classes[0][:, None] * random.normal(size=3)
    return codes * scale + shift, classes, sizes


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (1e-3, 0), (30, 5), (0.1, -20)])
def test_lines_are_scikit_learns(scale, shift):
    svm = pytest.importorskip("sklearn.svm")
    codes, classes, sizes = random_problem(0, 400, [3, 2, 7], scale, shift)
    centre, slope, height = hinge_lines(codes, classes, sizes, 0.01)
    intercept = height - slope * centre[:, None]
    line = 0
    for labels, size in zip(classes, sizes, strict=True):
        count = 1 if size == 2 else size
        for j in range(3):
            model = svm.LinearSVC(C=0.01, class_weight="balanced", dual=False, tol=1e-12, max_iter=10_000)
            model.fit(codes[:, [j]], labels)
            np.testing.assert_allclose(slope[j, line : line + count], model.coef_[:, 0], rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(intercept[j, line : line + count], model.intercept_, rtol=1e-5, atol=1e-7)
            # Its lines win for us whatever they win for it.
            theirs = np.zeros(1), model.coef_.T, model.intercept_[None]
            accuracy = hinge_accuracy(codes[:, [j]], labels[None], np.array([size], np.int32), *theirs)
            assert accuracy.item() == model.score(codes[:, [j]], labels)
        line += count


def objective(x, sign, weight, slope, intercept):
    margin = np.maximum(0, 1 - sign * (slope * x + intercept))
    return (slope**2 + intercept**2) / 2 + np.sum(weight * margin**2)


@pytest.mark.parametrize("penalty", [1e-4, 0.01, 10.0])
def test_lines_lie_at_the_minimum(penalty):
    """The objective, written down plainly, rises in every direction, and its gradient is zero."""
    codes, classes, sizes = random_problem(1, 200, [4])
    centre, slope, height = hinge_lines(codes, classes, sizes, penalty)
    for j in range(3):
        for c in range(4):
            sign = np.where(classes[0] == c, 1.0, -1.0)
            weight = np.where(classes[0] == c, penalty * 200 / (4 * np.sum(classes[0] == c)), penalty)
            w, b = slope[j, c], height[j, c] - slope[j, c] * centre[j]
            pull = -2 * weight * sign * np.maximum(0, 1 - sign * (w * codes[:, j] + b))
            scale = np.abs(pull).sum()
            assert abs(w + pull @ codes[:, j]) < 1e-11 * scale * np.abs(codes[:, j]).max()
            assert abs(b + pull.sum()) < 1e-11 * scale
            least = objective(codes[:, j], sign, weight, w, b)
            for step in np.random.default_rng(j).normal(size=(20, 2)) * 1e-3:
                assert objective(codes[:, j], sign, weight, w + step[0], b + step[1]) > least


@pytest.mark.parametrize(
    ("n", "sizes", "scale", "shift"),
    [
        (1, [1], 1, 0),
        (2, [2], 1, 0),
        (7, [2, 7], 1, 0),
        (300, [5, 2], 1e-6, 0),
        (300, [9], 1, 1e6),
        (300, [3], 1e40, 0),
    ],
)
def test_compiled_and_numpy_agree(n, sizes, scale, shift):
    codes, classes, sizes = random_problem(2, n, sizes, scale, shift)
    codes[:, 2] = 0.1  # a code that never varies
    mine, numpys = hinge_lines(codes, classes, sizes, 0.01), hinge_lines_numpy(codes, classes, sizes, 0.01)
    spread = np.abs(codes - mine[0]).max(axis=0)[:, None]
    np.testing.assert_array_equal(mine[0], numpys[0])
    np.testing.assert_allclose(mine[1] * spread, numpys[1] * spread, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(mine[2], numpys[2], rtol=1e-7, atol=1e-9)
    classes = np.where(np.arange(n) % 5 == 4, -1, classes).astype(np.int32)
    np.testing.assert_array_equal(
        hinge_accuracy(codes, classes, sizes, *mine), hinge_accuracy_numpy(codes, classes, sizes, *mine)
    )


def test_a_large_offset_costs_no_digits():
    """Of x + 2**20 the exact line is nearly constant; in extended precision its gradient there is zero."""
    codes, classes, sizes = random_problem(3, 500, [3])
    codes = np.round(codes * 2**20) / 2**20 + 2.0**20
    centre, slope, height = hinge_lines(codes, classes, sizes, 0.01)
    u = codes.astype(np.longdouble) - centre
    for j in range(3):
        for c in range(3):
            sign = np.where(classes[0] == c, 1.0, -1.0)
            weight = np.where(classes[0] == c, 0.01 * 500 / (3 * np.sum(classes[0] == c)), 0.01)
            w, h = np.longdouble(slope[j, c]), np.longdouble(height[j, c])
            origin = h - centre[j] * w
            pull = -2 * weight * sign * np.maximum(0, 1 - sign * (w * u[:, j] + h))
            scale = float(np.abs(pull).sum())
            assert abs(float(w - centre[j] * origin + pull @ u[:, j])) < 1e-7 * scale
            assert abs(float(origin + pull.sum())) < 1e-7 * scale


def test_threads_do_not_matter(golden):
    inputs, _ = golden
    arguments = [array[:500] for array in golden_split(inputs, "linear_mix10")]
    before = torch.get_num_threads()
    try:
        matrices = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            matrices.append(sap(*arguments).matrix)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*matrices)


def test_published_vectors(factors):
    codes = factors.astype(float)
    assert 0.9 <= sap(codes, factors, codes, factors, continuous=True).score <= 1
    zeros = np.zeros_like(codes)
    assert sap(zeros, factors, zeros, factors, continuous=True).score == 0
    twice = np.hstack([codes, codes])
    assert sap(twice, factors, twice, factors, continuous=True).score == pytest.approx(0, abs=1e-12)
    assert sap(twice, factors, twice, factors).score == 0


def test_binary_factors_by_hand():
    factor = np.array([0, 0, 1, 1] * 10).reshape(-1, 1)
    codes = np.hstack([factor * 10.0 - 5, -np.array([0, 1, 0, 1] * 10).reshape(-1, 1)])
    result = sap(codes, factor, codes, factor)
    assert result.matrix.tolist() == [[1.0], [0.5]]
    assert result.gaps.tolist() == [0.5]
    assert result.score == 0.5


def test_one_code_leads_by_all_it_predicts():
    factor = np.array([0, 1] * 20).reshape(-1, 1)
    codes = factor * 10.0 - 5
    assert sap(codes, factor, codes, factor).score == 1
    assert sap(codes, factor, codes, factor, continuous=True).score == pytest.approx(1)


def test_a_constant_code_predicts_the_commonest_value():
    factor = np.array([0] * 3 + [7] * 5 + [9] * 4).reshape(-1, 1)
    test = np.array([7, 7, 0, 9]).reshape(-1, 1)
    for value in (0.0, 3.7, -1e9, 1e100):
        result = sap(np.full((12, 2), value), factor, np.full((4, 2), value), test)
        assert result.matrix.tolist() == [[0.5], [0.5]]
        assert result.score == 0


def test_test_values_that_training_lacks_are_misses():
    factor = np.array([2, 2, 4, 4]).reshape(-1, 1)
    codes = np.array([-9.0, -9, 9, 9]).reshape(-1, 1)
    assert sap(codes, factor, codes, np.array([2, 3, 4, 5]).reshape(-1, 1)).score == 0.5
    assert sap(codes, factor, codes[:1], factor[:1]).score == 1


def test_scale_matters_only_to_classification(golden):
    inputs, _ = golden
    arguments = [array[:2000] for array in golden_split(inputs, "linear_mix10")]
    codes, factors, test_codes, test_factors = arguments
    scaled = (codes * np.float64(7) + 3, factors, test_codes * np.float64(7) + 3, test_factors)
    assert sap(*scaled, continuous=True).score == pytest.approx(sap(*arguments, continuous=True).score, abs=1e-9)
    assert sap(*scaled).score != sap(*arguments).score


def test_codes_of_little_variance_do_not_correlate():
    factor = np.array([0, 1] * 20).reshape(-1, 1)
    for scale, score in ((1e-7, 0.0), (1e-5, 1.0)):
        codes = factor * scale
        assert sap(codes, factor, codes, factor, continuous=True).score == pytest.approx(score)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_of_every_precision(factors, dtype):
    codes = torch.from_numpy(factors[:200]).to(dtype)
    if dtype.is_floating_point:
        codes.requires_grad_()
    tensors = sap(codes, torch.from_numpy(factors[:200]), codes, torch.from_numpy(factors[:200]))
    arrays = sap(*[factors[:200]] * 4)
    assert tensors.score == arrays.score


def test_arrays_of_any_layout(factors):
    codes = np.random.default_rng(0).normal(size=(400, 3))
    labels = factors[:400, :2]
    contiguous = sap(codes[::2].copy(), labels[::2].copy(), codes[1::2].copy(), labels[1::2].copy())
    strided = sap(np.asfortranarray(codes)[::2], np.asfortranarray(labels)[::2], codes[1::2], labels[1::2])
    np.testing.assert_array_equal(contiguous.matrix, strided.matrix)


GOOD = np.array([[0.0], [1.0]]), np.array([[0], [1]])


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, np.array([[0.0], [np.nan]]), ValueError, "codes must be finite"),
        (2, np.array([[0.0], [np.inf]]), ValueError, "test_codes must be finite"),
        (0, np.array([[0.0], [1e151]]), ValueError, r"codes must lie between -1e\+150 and 1e\+150"),
        (2, np.array([[0.0], [-1e300]]), ValueError, "test_codes must lie between"),
        (1, np.array([[3], [3]]), ValueError, "factors column 0 never varies"),
        (1, np.array([[0.0], [1.0]]), TypeError, "factors must be integers"),
        (3, np.array([[0.5], [1.0]]), TypeError, "test_factors must be integers"),
        (2, np.zeros((2, 2)), ValueError, "codes and test_codes must have as many columns, got 1 and 2"),
        (3, np.zeros((2, 3), int), ValueError, "factors and test_factors must have as many columns, got 1 and 3"),
        (3, np.zeros((3, 1), int), ValueError, "test_codes and test_factors must have as many rows, got 2 and 3"),
        (2, np.zeros((0, 1)), ValueError, "test_codes must have at least one row"),
        (0, np.zeros(2), ValueError, r"codes must have shape \[n, d\]"),
    ],
)
def test_input_that_does_not_fit(position, value, error, message):
    arguments = [*GOOD, *GOOD]
    arguments[position] = value
    with pytest.raises(error, match=message):
        sap(*arguments)


def test_split_numbers_test_values_as_training_values():
    split = as_split(GOOD[0], np.array([[5], [-2]]), np.zeros((4, 1)), np.array([[-2], [5], [9], [-9]]), largest=1.0)
    assert split.classes.tolist() == [[1, 0]]
    assert split.test_classes.tolist() == [[0, 1, -1, -1]]


def test_extension_refuses_what_would_read_out_of_bounds():
    extension = pytest.importorskip("fastdis._C")
    codes, classes, sizes = random_problem(0, 10, [3])
    with pytest.raises(IndexError, match="classes must be"):
        extension.hinge_lines(codes, classes + np.int32(1), sizes, 0.01, 1)
    with pytest.raises(ValueError, match="slope"):
        extension.hinge_accuracy(codes, classes, sizes, np.zeros(3), np.zeros((3, 2)), np.zeros((3, 3)), 1)
