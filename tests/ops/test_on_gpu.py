"""What only a GPU can show of every op: streams, graphs, devices, compilation, autocast, more than 2^31 elements.

A new column is covered by being registered: its calls are the samples of its suite.
"""

import pytest
import torch
from column_suite import INTERPRETED, outputs_of, suite_of

import fastdis
from fastdis import reference
from fastdis.ops import _backends

pytestmark = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="there is no GPU here")

SLEEP_CYCLES = 100_000_000  # some 50 ms: more than it takes to queue an op's two passes


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    return request.param


@pytest.fixture(params=_backends.columns())
def name(request, backend):
    column = _backends.columns()[request.param]
    if (backend, "cuda") not in column.choices:
        pytest.skip(column.reasons[backend, "cuda"])
    return request.param


class Call:
    """One sample on a GPU: its tensors, output gradients to go with them, and both passes of any op on them.

    The public op is called, not the suite's, which may seed: every pass starts from the same seed, outside the op.
    """

    def __init__(self, name, sample, backend, dtype=torch.float32, device="cuda", values=0):
        self.options = sample.options | {"backend": backend}
        tensors = sample.to(dtype, device)
        changed = {k: suite_of(name).maps(k, t)[values] for k, t in tensors.items() if t.is_floating_point()}
        self.tensors = tensors | changed
        self.op, self.device = getattr(fastdis, name), device
        generator = torch.Generator(device).manual_seed(7)
        with torch.no_grad():
            outputs = outputs_of(self.op(**self.tensors, **self.options))
        self.grads = [torch.randn(o.shape, device=device, generator=generator).to(o) for o in outputs]

    def seeded(self, function, *arguments):
        with torch.cuda.device(self.device):
            torch.cuda.manual_seed(11)
        return function(*arguments)

    def leaves(self, tensors=None):
        tensors = self.tensors if tensors is None else tensors
        return {k: t.detach().requires_grad_(t.is_floating_point()) for k, t in tensors.items()}

    def passes(self, leaves, op=None):
        """Every output and every gradient of leaves."""
        outputs = outputs_of((op or self.op)(**leaves, **self.options))
        chosen = [i for i, o in enumerate(outputs) if o.requires_grad]
        wanted = [t for t in leaves.values() if t.requires_grad]
        gradients = torch.autograd.grad([outputs[i] for i in chosen], wanted, [self.grads[i] for i in chosen])
        return [*(o.detach() for o in outputs), *gradients]

    def eager(self):
        return self.seeded(self.passes, self.leaves())


def samples_of(name):
    return [s for s in suite_of(name).samples() if not s.empty]


def assert_close(ours, wanted):
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == b.dtype
        scale = 1 + b.abs().max().item() if b.numel() else 1
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * scale)


# -- order -------------------------------------------------------------------------------------------------------------


def test_two_runs_are_the_same_bit_by_bit(name, backend):
    for sample in samples_of(name):
        call = Call(name, sample, backend)
        for a, b in zip(call.eager(), call.eager(), strict=True):
            assert torch.equal(a, b), sample.name


def test_work_is_queued_on_the_current_stream(name, backend):
    """The inputs come late on a stream of their own: a kernel on any other stream would read what was there before."""
    for sample in samples_of(name):
        call = Call(name, sample, backend)
        wanted = call.eager()
        late = {k: torch.zeros_like(t) for k, t in call.tensors.items()}
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        torch.cuda.manual_seed(11)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP_CYCLES)
            for key, tensor in call.tensors.items():
                late[key].copy_(tensor)
            ours = call.passes(call.leaves(late))
        # Nor may the host have waited, which would have hidden a wrong stream.
        waited = stream.query()
        stream.synchronize()
        assert_close(ours, wanted)
        assert not waited, f"{sample.name}: the call waits for the GPU"


# -- graphs and compilers ----------------------------------------------------------------------------------------------


def test_both_passes_are_captured_in_a_graph_and_replayed_on_new_inputs(name, backend):
    for sample in samples_of(name):
        call, other = Call(name, sample, backend), Call(name, sample, backend, values=2)
        other.grads = call.grads
        wanted = other.eager()
        leaves = call.leaves()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call.passes(leaves)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call.passes(leaves)
        with torch.no_grad():
            for key, tensor in other.tensors.items():
                leaves[key].copy_(tensor)
        for _ in range(2):  # a replay leaves nothing behind that the next one would trip over
            call.seeded(graph.replay)
            assert_close(captured, wanted)


@pytest.mark.parametrize("mode", ["static", "dynamic", "reduce-overhead"])
def test_compile_fullgraph_by_inductor(name, backend, mode):
    import torch._inductor.config as inductor

    call = Call(name, samples_of(name)[0], backend)
    wanted = call.eager()
    torch.compiler.reset()
    compiled = torch.compile(
        call.op, fullgraph=True, dynamic=mode == "dynamic", mode=mode if mode == "reduce-overhead" else None
    )
    with inductor.patch(fallback_random=True):  # or a seed would not mean what it means to torch
        for _ in range(3):  # reduce-overhead warms up, records, and replays
            torch.compiler.cudagraph_mark_step_begin()
            ours = [t.clone() for t in call.seeded(call.passes, call.leaves(), compiled)]
            assert_close(ours, wanted)


# -- dtypes and devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast_of_float32_leaves(name, backend, dtype):
    for sample in samples_of(name):
        call = Call(name, sample, backend)
        wanted = call.eager()
        with torch.autocast("cuda", dtype=dtype):
            outputs = outputs_of(call.op(**call.leaves(), **call.options))
            call.grads = [g.to(o.dtype) for g, o in zip(call.grads, outputs, strict=True)]
            ours = call.eager()
        assert {gradient.dtype for gradient in ours[len(outputs) :]} == {torch.float32}, sample.name
        for a, b in zip(ours, wanted, strict=True):
            assert (a.double() - b).norm() <= 0.05 * b.double().norm() + 1e-6, sample.name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs here")
def test_tensors_of_another_device_than_the_current_one(name, backend):
    for sample in samples_of(name):
        wanted = Call(name, sample, backend, device="cuda:0").eager()
        call = Call(name, sample, backend, device="cuda:1")
        call.grads = [g.to("cuda:1") for g in Call(name, sample, backend, device="cuda:0").grads]
        with torch.cuda.device(0):
            ours = call.eager()
            assert torch.cuda.current_device() == 0
        assert {t.device for t in ours} == {torch.device("cuda:1")}
        assert_close([t.to("cuda:0") for t in ours], wanted)


# -- size --------------------------------------------------------------------------------------------------------------

ROWS = 2**21 + 1  # of 1024 elements: 1024 more than an int32 can count
# For one op of each family: the sizes of its tensors, each with the dimension that holds independent rows (None for a
# tensor without), and options.
HUGE = {
    "style_modulation": ({"x": ((ROWS, 8, 128), 0), "scale": ((ROWS, 8), 0), "shift": ((ROWS, 8), 0)}, {"groups": 2}),
    "sum_gradient_fields": (
        {"noise": ((ROWS, 128), 0), "fields": ((ROWS, 8, 128), 0), "coefficient": ((ROWS,), 0)}, {},
    ),
    "jacobian_gram": ({"jacobian": ((ROWS, 4, 256), 0)}, {}),
    "prototype_distances": ({"queries": ((1, ROWS, 1024), 1), "prototypes": ((1, 4, 1024), None)}, {}),
    "gaussian_kl": ({"mean": ((ROWS, 1024), 0), "logvar": ((ROWS, 1024), 0)}, {"reduction": "none"}),
    "tangent_activation": ({"rows": ((2, ROWS, 4, 128), 1)}, {"activation": "silu"}),
}  # fmt: skip
NEEDED_BYTES = 40 * 2**30


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGE)
def test_the_last_rows_of_more_than_2_to_the_31_elements(name, backend):
    column = _backends.columns()[name]
    if (backend, "cuda") not in column.choices:
        pytest.skip(column.reasons[backend, "cuda"])
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < NEEDED_BYTES:
        pytest.skip(f"less than {NEEDED_BYTES >> 30} GiB of the GPU are free")
    sizes, options = HUGE[name]
    assert max(torch.Size(size).numel() for size, _ in sizes.values()) > 2**31

    def last(tensor, dim):
        return tensor if dim is None else tensor.narrow(dim, tensor.shape[dim] - 3, 3)

    leaves = {
        k: torch.randn(size, device="cuda", dtype=torch.bfloat16).requires_grad_() for k, (size, _) in sizes.items()
    }
    outputs = getattr(fastdis, name)(**leaves, **options, backend=backend)
    # The dimension of rows, which every output has where the first tensor has it.
    dim = next(iter(sizes.values()))[1]
    grad = torch.randn_like(outputs)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grad)

    few = {k: last(t.detach(), sizes[k][1]).double().requires_grad_() for k, t in leaves.items()}
    exact = getattr(reference, name)(**few, **options)
    exact_gradients = torch.autograd.grad(exact, list(few.values()), last(grad, dim).double())
    compared = [(last(outputs, dim), exact)]
    for (_, rows), ours, wanted in zip(sizes.values(), gradients, exact_gradients, strict=True):
        if rows is not None:  # the others are sums over all rows
            compared.append((last(ours, rows), wanted))
    for ours, wanted in compared:
        assert (ours.double() - wanted).norm() <= 0.02 * wanted.norm()
