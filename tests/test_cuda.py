"""The CUDA kernels against the CPU's, bit for bit, and the captured loop; only with a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from step_cases import DTYPES, SHAPES, case, fresh, same_bits

from ddpm_fast import backend, noise, ops
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule


def obstacle() -> str:
    """Why nothing here can run; empty where it can."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if backend.extension is None:
        return f"the compiled extension is missing: {backend.extension_error}"
    if not backend.extension.build_config()["cuda_linked"]:
        return "this build has no CUDA kernels: build it with nvcc beside a CUDA torch"
    return ""


pytestmark = pytest.mark.skipif(bool(obstacle()), reason=obstacle())


def moved(arguments, device="cuda"):
    """The arguments on the GPU, in their memory orders."""
    return {k: None if v is None else v.to(device) for k, v in arguments.items()}


def check_step(arguments, device="cuda"):
    a = fresh(arguments)
    want = ops.p_sample_step(**a, backend="cpu")
    for step in (ops.p_sample_step, ops.p_sample_step_):
        on_gpu = moved(arguments, device)
        status = torch.zeros(4, dtype=torch.int32, device=device)
        got = step(**on_gpu, status=status, backend="cuda")
        assert (got is on_gpu["x_t"]) == (step is ops.p_sample_step_)
        assert got.device == on_gpu["x_t"].device
        assert same_bits(got.cpu(), want)
        assert same_bits(on_gpu["previous_pred_xstart"].cpu(), a["previous_pred_xstart"])
        assert status.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_equals_the_cpu(shape):
    for learned, guided, given in itertools.product([False, True], repeat=3):
        arguments = case(shape, learned=learned, guided=guided)
        check_step({**arguments, "noise": torch.randn(shape) if given else None})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_takes_low_precision_and_memory_orders(dtype):
    orders = [torch.contiguous_format, torch.channels_last]
    for x_order, model_order, learned in itertools.product(orders, orders, [False, True]):
        arguments = case((2, 3, 33, 21), dtype, learned, guided=True)
        arguments["x_t"] = arguments["x_t"].contiguous(memory_format=x_order)
        arguments["model_output"] = arguments["model_output"].contiguous(memory_format=model_order)
        check_step(arguments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_randn_and_q_sample_equal_the_cpu(shape):
    n = shape[0]
    seed, index, t = torch.arange(n) - 1, torch.arange(n) * 2**31, torch.arange(n) % 5
    want = ops.randn(seed, index, shape[1:], 9, noise.EDITING, backend="cpu")
    for name in ("cuda", "reference"):
        got = ops.randn(seed.cuda(), index.cuda(), shape[1:], 9, noise.EDITING, backend=name)
        assert got.is_cuda and same_bits(got.cpu(), want)
    arguments = [torch.randn(shape), torch.rand(5, 2), t, seed, index]
    if len(shape) == 4:
        arguments[0] = arguments[0].contiguous(memory_format=torch.channels_last)
    for given in (None, torch.randn(shape)):
        want = ops.q_sample(*arguments, given, backend="cpu")
        on_gpu = [a.cuda() for a in arguments]
        got = ops.q_sample(*on_gpu, None if given is None else given.cuda(), backend="cuda")
        assert same_bits(got[0].cpu(), want[0]) and same_bits(got[1].cpu(), want[1])


def test_reference_draws_the_contract_noise():
    arguments = case((4, 3, 9, 11))  # each sample at its own step
    got = ops.p_sample_step(**moved(arguments), backend="reference")
    torch.testing.assert_close(got.cpu(), ops.p_sample_step(**fresh(arguments), backend="cpu"))


BAD = [
    {"row": torch.tensor([0, 4, 1])},
    {"row": torch.tensor([0, -1, 1])},
    {"row": torch.tensor([0, 3, 1]), "previous_pred_xstart": None},
    {"row": torch.tensor([0, 2, 1]), "index": torch.tensor([[0, 1, 0, 0]] * 4).int()},
]
BAD[3]["index"][2, 2] = 1  # the variance is learned, but the model has no channels for it


@pytest.mark.parametrize("change", BAD, ids=["high", "low", "previous", "variance"])
def test_a_bad_row_leaves_its_sample_as_it_was(change):
    arguments = {**case((3, 3, 7, 5)), **change}
    good = torch.tensor([0, 2])
    with pytest.raises(RuntimeError):
        ops.p_sample_step(**fresh(arguments), backend="cpu")
    want = ops.p_sample_step(**{**fresh(arguments), "row": torch.tensor([0, 0, 1])}, backend="cpu")
    for step in (ops.p_sample_step, ops.p_sample_step_):
        on_gpu = moved(arguments)
        status = torch.zeros(4, dtype=torch.int32, device="cuda")
        got = step(**on_gpu, status=status, backend="cuda").cpu()
        assert status.tolist() == [1, int(arguments["row"][1]), 1, 0]
        assert same_bits(got[1], arguments["x_t"][1]) and same_bits(got[good], want[good])
        previous = arguments["previous_pred_xstart"]
        if previous is not None:
            assert same_bits(on_gpu["previous_pred_xstart"][1].cpu(), previous[1])


def test_a_bad_timestep_makes_its_sample_nan():
    n, x, table = torch.arange(3).cuda(), torch.randn(3, 5, 7).cuda(), torch.rand(4, 2).cuda()
    for bad in (-1, 4):
        t = torch.tensor([0, bad, 3]).cuda()
        for given in (None, torch.randn_like(x)):
            x_t, _ = ops.q_sample(x, table, t, n, n, given, backend="cuda")
            assert x_t[1].isnan().all() and x_t[[0, 2]].isfinite().all()


@pytest.fixture
def captures(monkeypatch):
    """The CUDA graphs made in the test."""
    made, graph = [], torch.cuda.CUDAGraph

    def counted():
        made.append(graph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", counted)
    return made


def check_captured(class_model, captures, device="cuda", **settings):
    """The captured loop comes first, so that the eager one prepares nothing for it."""
    settings |= {"device": device, "backend": "cuda"}
    runs = []
    for graphs in (True, False):
        sampler = Sampler.from_model(class_model, graphs=graphs, **settings)
        assert sampler.graphs == graphs
        runs.append(
            [
                sampler.sample(4, seed=seed, start=start, batch_size=4, classes=[2, 0, 1])
                for seed, start in ((0, 0), (2**63 + 5, 1000))
            ]
        )
    for captured, eager in zip(*runs, strict=True):
        assert eager.isfinite().all() and same_bits(captured, eager)
    assert not torch.equal(*runs[0])
    assert len(captures) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 20])
def test_captured_loop_equals_the_eager_one(class_model, captures, steps, guidance, dtype):
    check_captured(class_model, captures, steps=steps, guidance_scale=guidance, dtype=dtype)


@pytest.mark.parametrize("graphs", [False, True])
def test_values_that_are_not_finite_are_named(graphs):
    third = torch.arange(4, device="cuda").view(-1, 1, 1, 1) == 2
    sampler = Sampler(
        lambda x, t: x.masked_fill((t.view(-1, 1, 1, 1) < 30) & third, torch.nan),
        NoiseSchedule.linear(50),
        (1, 4, 4),
        device="cuda",
        backend="cuda",
        graphs=graphs,
    )
    with pytest.raises(RuntimeError, match="sample 7 has a value that is not finite after step 21"):
        sampler.sample(4, start=5, batch_size=4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs")
def test_the_second_gpu(class_model, captures):
    """The tensors' device counts, not the current one."""
    check_step(case((2, 3, 9, 11), learned=True, guided=True), "cuda:1")
    seed, index = torch.arange(2), torch.arange(2) + 5
    got = ops.randn(seed.to("cuda:1"), index.to("cuda:1"), (3, 9), 2, backend="cuda")
    assert got.get_device() == 1
    assert same_bits(got.cpu(), ops.randn(seed, index, (3, 9), 2, backend="cpu"))
    check_captured(class_model, captures, "cuda:1", steps=20, guidance_scale=3.0)
    assert torch.cuda.current_device() == 0
