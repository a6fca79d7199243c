"""What a prepared network keeps of the timesteps: its rows are right, whoever asks and whenever."""

import pytest
import torch
import torch.nn.functional as F
from unet_cases import BOUND, CPU, F32, error, inputs, randomized, run

from ddpm_fast import time_table
from ddpm_fast.inference import prepare
from ddpm_fast.unet import embed


def test_timesteps_are_scaled_as_by_the_unet(tiny_config):
    """In float32, where another rounding of 1427 shows."""
    unet = randomized(tiny_config(timestep_scale=1000 / 700))
    table, t = prepare(unet, CPU, F32).table, torch.arange(900, 1000)
    emb = embed(unet.config, unet.time_mlp, None, t, None)
    want = F.linear(emb, table._weight, table._bias)
    torch.testing.assert_close(table(t, None), want, rtol=1e-6, atol=1e-6)


def test_expectations_may_change_while_a_row_is_made(tiny_config, monkeypatch):
    """By another thread: here, in the middle of the computation."""
    unet = randomized(tiny_config(num_classes=3, null_class="row"))
    network = prepare(unet, CPU, F32)
    network.expect([5, 7, 9])
    compute = network.table._compute

    def interrupted(timesteps, label):
        network.expect([20, 7, 40])
        return compute(timesteps, label)

    monkeypatch.setattr(network.table, "_compute", interrupted)
    x, _, labels = inputs(unet.config, 1)
    for t in (9, 5, 20, 7, 40):
        times = torch.tensor([t])
        want = run(unet, F32, x, times, labels)
        assert error(run(network, F32, x, times, labels), want) < BOUND[F32]
        monkeypatch.setattr(network.table, "_compute", compute)


@pytest.mark.parametrize("labels", [None, [3, 0]])
def test_any_timestep_has_its_row_expected_or_not(labels, tiny_config):
    config = tiny_config(num_classes=3, null_class="row")
    unet = randomized(config)
    network = prepare(unet, CPU, F32)
    network.expect([70, 3, 70])
    labels = None if labels is None else torch.tensor(labels)
    x, _, _ = inputs(config, 2)
    for t in ([3, 3], [70, 3], [12, 3], [12, 12], [0.5, 70.0], [1e6, 0.0]):
        times = torch.tensor(t)
        want = run(unet, F32, x, times, labels)
        assert error(run(network, F32, x, times, labels), want) < BOUND[F32]
        assert error(run(network, F32, x, times, labels), want) < BOUND[F32]  # from the table


def test_the_table_forgets_the_oldest(tiny_config, monkeypatch):
    monkeypatch.setattr("ddpm_fast.time_table.MAX_VALUES", 1000)
    unet = randomized(tiny_config(num_classes=3, null_class="row"))
    network = prepare(unet, CPU, F32)
    network.expect(range(5))
    x, _, _ = inputs(unet.config, 1)
    for t in range(12):
        for label in range(4):
            arguments = torch.tensor([t]), torch.tensor([label])
            assert error(run(network, F32, x, *arguments), run(unet, F32, x, *arguments)) < 1e-5
    kept = [*network.table._expected[1].values(), *network.table._others.values()]
    assert 0 < sum(v.numel() for v in kept) < 2500


def test_a_table_of_too_many_classes_is_made_row_by_row(tiny_config, monkeypatch):
    unet = randomized(tiny_config(num_classes=3, null_class="row"))
    wanted = prepare(unet, CPU, F32)
    wanted.expect(range(100))
    monkeypatch.setattr(time_table, "MAX_VALUES", 100)
    network = prepare(unet, CPU, F32)
    network.expect(range(100))
    x, _, labels = inputs(unet.config, 3)
    t = torch.tensor([7, 3, 99])
    torch.testing.assert_close(network(x, t, labels), wanted(x, t, labels))
    assert network.table._expected == ({}, {})
