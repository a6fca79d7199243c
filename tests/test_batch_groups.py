"""How a prepared network shares a batch out among cores, of which no sample's bits may depend."""

import threading

import pytest
import torch
from unet_cases import BF16, BOUND, CPU, F32, error, inputs, randomized, run

from ddpm_fast import ops
from ddpm_fast.checkpoint import load_model
from ddpm_fast.inference import FusedUNet, prepare
from ddpm_fast.sampler import Sampler
from ddpm_fast.unet import UNet
from ddpm_fast.unet_config import UNetConfig
from ddpm_fast.workers import group_size


@pytest.fixture(params=["groups", "whole"])
def two_threads(request, extension, monkeypatch):
    """Two, and what they do with the tiny batches of a test: each takes a group, or not."""
    if request.param == "groups":
        for limit in ("LARGEST_OF_ONE_CORE", "SMALLEST_GROUP"):
            monkeypatch.setattr(f"ddpm_fast.workers.{limit}", 0)
    group_size.cache_clear()
    torch.set_num_threads(2)
    yield request.param
    group_size.cache_clear()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("n", [1, 4, 6, 12])
def test_a_batch_in_groups_is_the_batch(dtype, n, two_threads, tiny_config):
    unet = randomized(tiny_config(num_classes=3, null_class="row"))
    network = prepare(unet, CPU, dtype)
    arguments = inputs(unet.config, n)
    want = run(unet, F32, *arguments)
    seen = []
    inner = network._replay
    network._replay = lambda x, rows: seen.append(len(x)) or inner(x, rows)
    got = run(network, dtype, *arguments)
    assert error(got, want) < 2 * BOUND[dtype]
    assert seen == ([n // 2] * 2 if two_threads == "groups" and n > 1 else [n])
    assert torch.get_num_threads() == 2


def test_how_batches_are_shared_out(extension, tiny_config, monkeypatch):
    """By oneDNN's convolutions, and by our own."""
    monkeypatch.setattr("ddpm_fast.ops.is_conv2d_fastest", lambda dtype: False)
    small, large = prepare(UNet(tiny_config()), CPU, BF16), prepare(UNet(UNetConfig()), CPU, BF16)
    torch.set_num_threads(2)
    assert [small._group_size(n) for n in (1, 7, 128, 129, 1000)] == [1, 7, 128, 0, 500]
    assert [large._group_size(n) for n in (1, 2, 3, 4, 16, 64, 100)] == [0, 0, 0, 2, 8, 16, 10]
    torch.set_num_threads(9)
    assert [small._group_size(7), large._group_size(90)] == [7, 0]
    torch.set_num_threads(1)
    assert [small._group_size(7), large._group_size(64)] == [0, 0]
    monkeypatch.undo()
    if not ops.is_conv2d_fastest(BF16):
        pytest.skip("this CPU has no AVX-512 for bfloat16, or has AMX")
    small, large = prepare(UNet(tiny_config()), CPU, BF16), prepare(UNet(UNetConfig()), CPU, BF16)
    torch.set_num_threads(2)
    assert [small._group_size(n) for n in (1, 256, 512, 1024)] == [0, 0, 256, 512]
    assert [large._group_size(n) for n in (1, 2, 3, 4, 16, 64, 100)] == [0, 0, 0, 2, 8, 8, 10]
    assert [large._group_size(n) for n in (10, 12, 14, 34)] == [5, 6, 7, 0]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("batch_size", [3, 8])
def test_a_sample_does_not_depend_on_its_place(dtype, batch_size, two_threads, class_model):
    sampler = Sampler.from_model(class_model, dtype=dtype, steps=10)
    assert isinstance(sampler.network, FusedUNet)
    settings = {"seed": 3, "batch_size": batch_size, "classes": [0, 1, 2]}
    whole = sampler.sample(9, start=36, **settings)
    for start in (37, 40, 42):
        assert torch.equal(sampler.sample(6, start=start, **settings)[42 - start], whole[6])


@pytest.mark.parametrize("dtype,given", [(F32, F32), (BF16, BF16), (BF16, F32)])
@pytest.mark.parametrize("threads", [2, 3])
def test_a_place_in_an_odd_batch_changes_no_bit(dtype, given, threads, two_threads):
    """Of the shipped model's size, where layers are cut among threads and groups among cores."""
    torch.set_num_threads(threads)
    network = prepare(load_model("mnist").unet, CPU, dtype)
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, 1, 28, 28, generator=generator).to(given)
    for batch_size in (3, 6, 7):
        outputs = []
        for place in range(batch_size):
            x = torch.randn(batch_size, 1, 28, 28, generator=generator).to(given)
            x[place] = one[0]
            t, labels = torch.full((batch_size,), 500), torch.full((batch_size,), 3)
            outputs.append(network(x, t, labels)[place])
        assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_step_leaves_torchs_threads_asleep(two_threads, class_model, monkeypatch):
    """Where workers compute the network: the update, and what joins their groups."""
    threads = {}

    def seen(name, function):
        def call(*arguments, **settings):
            threads.setdefault(name, set()).add(threading.current_thread().name.split("_")[0])
            return function(*arguments, **settings)

        return call

    monkeypatch.setattr(ops, "p_sample_step_", seen("step", ops.p_sample_step_))
    monkeypatch.setattr(torch, "cat", seen("cat", torch.cat))
    sampler = Sampler.from_model(class_model, dtype=F32, steps=3)
    for _ in sampler.batches(range(8), batch_size=8, classes=[0]):
        pass
    if not sampler.network.uses_workers(8):
        assert threads["step"] == {"MainThread"}
    else:
        assert threads["step"] == {"ddpm"} and "ddpm" in threads["cat"]
