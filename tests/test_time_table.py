"""What a prepared network keeps of the timesteps: its rows are right, whoever asks and whenever."""

import torch
import torch.nn.functional as F
from test_inference import BOUND, CPU, F32, error, inputs, randomized, run

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
