"""Samples one by one, as a host project takes them; batch sizes and orders."""

from __future__ import annotations

from itertools import count, islice

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from ddpm_fast import noise
from ddpm_fast.sampler import Sampler

SETTINGS = {"steps": 5, "backend": "cpu"}


@pytest.fixture
def sampler(class_model) -> Sampler:
    return Sampler.from_model(class_model, **SETTINGS)


def test_each_index_once_with_its_sample(sampler):
    want = sampler.sample(9, seed=2, batch_size=4, classes=[0, 2])
    got = dict(sampler.stream([7, 0, 3, 8, 1], seed=2, batch_size=4, classes=[0, 2]))
    assert [*got] == [7, 0, 3, 8, 1]
    assert all(torch.equal(x, want[i]) for i, x in got.items())


def test_indices_may_have_no_end_and_are_taken_a_batch_at_a_time(sampler):
    asked = []
    stream = sampler.stream((asked.append(i) or i for i in count(5)), batch_size=3)
    assert [i for i, _ in islice(stream, 4)] == [5, 6, 7, 8] and asked == [*range(5, 11)]


def test_no_indices(sampler):
    assert [*sampler.stream([])] == [] and [*sampler.stream(iter(()))] == []


@pytest.mark.parametrize("indices", [[3, -1], [1 << 63], [0.5], ["a"], [True]])
def test_indices_that_are_none(sampler, indices):
    with pytest.raises(ValueError, match="a sample's index must be"):
        [*sampler.stream(indices)]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_noise_and_samples_at_any_batch_size(sampler, batch_size):
    """The noise is the contract's bit for bit; the network's float32 sums may differ in last bits,
    because the library has other kernels for other numbers of rows.
    """
    drawn = {}

    def callback(index, done, x) -> None:
        if not done:
            drawn.update(zip(index.tolist(), x.clone(), strict=True))

    indices = range(40, 110)
    got = dict(sampler.stream(indices, seed=5, batch_size=batch_size, callback=callback))
    wanted = torch.from_numpy(noise.randn(5, [*indices], 0, (1, 8, 8)))
    assert torch.equal(torch.stack([drawn[i] for i in indices]), wanted)
    base = sampler.sample(70, seed=5, start=40, batch_size=16)
    assert (torch.stack([got[i] for i in indices]) - base).abs().max() < 0.01


def test_a_data_loader_of_samples(sampler):
    class Samples(IterableDataset):
        def __iter__(self):
            return sampler.stream(range(10), batch_size=4)

    batches = [*DataLoader(Samples(), batch_size=5)]
    assert torch.cat([i for i, _ in batches]).tolist() == [*range(10)]
    assert torch.equal(torch.cat([x for _, x in batches]), sampler.sample(10, batch_size=4))


def test_a_first_state_as_a_function_of_the_index(class_model):
    sampler = Sampler.from_model(class_model, strength=0.6, **SETTINGS)
    images = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    want = sampler.sample(9, x_start=images, batch_size=4)
    got = dict(sampler.stream(iter([8, 2, 5, 6]), x_start=lambda i: images[i], batch_size=4))
    assert all(torch.equal(x, want[i]) for i, x in got.items())
    with pytest.raises(ValueError, match="x_start as a tensor wants a known number"):
        next(sampler.stream(count(), x_start=images))
    with pytest.raises(ValueError, match=r"x_start must be .* of shape \(4, 1, 8, 8\), got"):
        next(sampler.stream(count(), batch_size=4, x_start=lambda i: images[:3]))
