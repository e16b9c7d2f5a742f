"""What a call costs where there is next to nothing to compute: ``python benchmarks/overhead.py``.

Prints microseconds, medians on one thread, of every op forward (no gradients) and forward + backward, with torch's relu
and a sum of fields by the library for comparison: call after call, and cold, after other work that filled the caches,
as where a large model runs between two calls.
"""

import statistics
import time

import torch

import fastdis

CALLS = {"warm": 2000, "cold": 100}
OTHER_WORK = 2**25  # numbers to read: more than any cache holds


def inputs(*shapes):
    return [torch.randn(*shape).requires_grad_() for shape in shapes]


def median_microseconds(run, state, other):
    seconds = []
    for _ in range(CALLS[state]):
        if state == "cold":
            other.sum()
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1e6


def overhead(op, tensors, state, other):
    """Microseconds of a call, and of a call with its gradients."""

    def forward():
        with torch.no_grad():
            op(*tensors)

    def both():
        results = op(*tensors)
        results = [r for r in (results if isinstance(results, tuple) else (results,)) if r.requires_grad]
        torch.autograd.grad(results, tensors, [torch.ones_like(r) for r in results])

    return median_microseconds(forward, state, other), median_microseconds(both, state, other)


def calls():
    """Every op on inputs of a few numbers."""
    image, row, field = (2, 4, 2, 2), (2, 3), (2, 4, 3)
    selected, labels = torch.tensor([0, 1]), torch.tensor([0, 1, 1])
    return {
        "torch.relu": (torch.relu, inputs(row)),
        "torch.add(noise, fields.sum(1))": (lambda n, f: torch.add(n, f.sum(1), alpha=0.5), inputs(row, field)),
        "style_modulation": (
            lambda x, a, b: fastdis.style_modulation(x, a, b, groups=4),
            inputs(image, (2, 4), (2, 4)),
        ),
        "prototype_distances": (fastdis.prototype_distances, inputs((3, 2), (4, 2))),
        "prototypical_loss": (lambda q, p: fastdis.prototypical_loss(q, p, labels), inputs((3, 2), (4, 2))),
        "sum_gradient_fields": (lambda n, f: fastdis.sum_gradient_fields(n, f, 0.5), inputs(row, field)),
        "ddim_step": (lambda x, n, f: fastdis.ddim_step(x, n, f, 0.5, 0.6), inputs(row, row, field)),
        "disdiff_terms": (lambda x, n, f: fastdis.disdiff_terms(x, n, f, selected, 0.5, 0.6), inputs(row, row, field)),
        "tangent_activation": (fastdis.tangent_activation, inputs((3, 2, 4))),
        "jacobian_gram": (fastdis.jacobian_gram, inputs((2, 2, 4))),
        "isometry_penalty": (fastdis.isometry_penalty, inputs((2, 2, 4))),
        "total_correlation": (
            lambda z, m, v: fastdis.total_correlation(z, m, v, dataset_size=100),
            inputs((3, 2), (3, 2), (3, 2)),
        ),
        "reparameterize": (fastdis.reparameterize, inputs(row, row)),
        "gaussian_kl": (fastdis.gaussian_kl, inputs(row, row)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    other = torch.randn(OTHER_WORK)
    print(f"{'':<33}{'call after call':^32}{'cold':^32}   microseconds")
    print(f"{'':<33}" + 2 * f"{'forward':>12}{'forward + backward':>20}")
    for name, (op, tensors) in calls().items():
        warm, cold = (overhead(op, tensors, state, other) for state in CALLS)
        print(f"{name:<33}" + "".join(f"{forward:>12.0f}{both:>20.0f}" for forward, both in (warm, cold)))
