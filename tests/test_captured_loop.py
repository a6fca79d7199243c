"""The captured loop against the eager one, bit for bit; only with a GPU."""

from __future__ import annotations

import pytest
import torch
from step_cases import same_bits
from test_cuda import needs

from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule

pytestmark = needs("cuda")


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
    """The sampler's device counts, not the current one."""
    check_captured(class_model, captures, "cuda:1", steps=20, guidance_scale=3.0)
    assert torch.cuda.current_device() == 0
