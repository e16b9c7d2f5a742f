"""Both passes of every op on the samples of its suite, once each: what compute-sanitizer watches."""

from __future__ import annotations

import argparse

import torch
from column_suite import outputs_of, suite_of

import fastdis
from fastdis.ops import _backends

DTYPES = (torch.float32, torch.float16, torch.float64, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    device = parser.parse_args().device
    calls = 0
    for name, column in _backends.columns().items():
        # The compiled kernels of that device, or an error that says why not.
        column.choose(device, torch.empty(0, device=device))
        samples = [s for s in suite_of(name).samples() if not s.empty]
        # Every dtype on one sample, which is small; the first on the others.
        for sample, dtype in [(samples[0], d) for d in DTYPES] + [(s, DTYPES[0]) for s in samples[1:]]:
            tensors = sample.to(dtype, device)
            leaves = [t.requires_grad_() for t in tensors.values() if t.is_floating_point()]
            outputs = outputs_of(getattr(fastdis, name)(**tensors, **sample.options, backend=device))
            chosen = [o for o in outputs if o.requires_grad]
            torch.autograd.grad(chosen, leaves, [torch.ones_like(o) for o in chosen])
            calls += 1
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"{name}: {len(samples)} samples")
    print(f"{calls} calls, forward and backward")


if __name__ == "__main__":
    main()
