"""The training step: what is random in it, what it computes, and how it goes on after a stop."""

import dataclasses
import math
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import TRAIN_SETTINGS

from ddpm_fast import ops
from ddpm_fast.data import Dataset
from ddpm_fast.training import TrainSettings


@pytest.fixture(autouse=True)
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(trainer, steps: int) -> list[float]:
    return [trainer.step().item() for _ in range(steps)]


def test_losses_are_a_function_of_seed_and_step(trainer):
    first = run(trainer(), 6)
    torch.manual_seed(99)
    torch.rand(5)
    assert run(trainer(), 6) == first
    assert len(set(first)) == 6
    assert run(trainer(dataclasses.replace(TRAIN_SETTINGS, seed=6)), 6) != first


def test_the_step_does_not_depend_on_what_was_drawn_before(trainer):
    """Dropout too: the generator of torch is used between the steps, as a sampler would."""
    one, other = trainer(), trainer()
    for _ in range(4):
        torch.rand(7)
        other.averaged()
        drawn = torch.get_rng_state()
        assert one.step() == other.step()
        assert torch.equal(torch.get_rng_state(), drawn)  # a host's own draws go on as they were


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_resumed_run_is_the_uninterrupted_one(trainer, tmp_path, schedule):
    settings = dataclasses.replace(TRAIN_SETTINGS, lr_schedule=schedule, weight_decay=0.01)
    whole = trainer(settings)
    losses = run(whole, 12)
    before = trainer(settings)
    assert run(before, 5) == losses[:5]
    before.save(tmp_path / "a.safetensors", {"seconds": 1.5})
    after = trainer(settings)
    with torch.no_grad():  # nothing may survive of what it began with
        for value in after._tensors().values():
            value.fill_(7.0)
    assert after.load(tmp_path / "a.safetensors") == {"seconds": 1.5}
    assert after.step_count == 5
    assert run(after, 7) == losses[5:]
    for name, value in whole._tensors().items():
        assert torch.equal(value, after._tensors()[name]), name
    for parameter in after.unet.parameters():
        assert after.optimizer.state[parameter]["step"] == 12


@pytest.mark.parametrize("batch_size", [3, 4, 11, 30])
def test_every_epoch_has_each_sample_once(trainer, batch_size):
    t = trainer(dataclasses.replace(TRAIN_SETTINGS, batch_size=batch_size))
    sequence = torch.cat([t._indices(i * batch_size, batch_size) for i in range(44)])
    epochs = sequence[: len(sequence) // 11 * 11].view(-1, 11)
    assert (epochs.sort(1).values == torch.arange(11)).all()
    assert len({tuple(e.tolist()) for e in epochs}) == len(epochs)
    assert torch.equal(t._indices(5, 17), sequence[5:22])


def test_a_share_of_the_labels_becomes_the_null_class(trainer, dataset):
    settings = dataclasses.replace(TRAIN_SETTINGS, batch_size=2000, null_probability=0.25)
    t = trainer(settings)
    labels = t.batch()[2]
    assert abs((labels == 3).float().mean() - 0.25) < 0.04
    kept = labels != 3
    assert torch.equal(labels[kept], dataset.labels[t._indices(0, 2000)][kept])
    for probability in (0.0, 1.0):
        t = trainer(dataclasses.replace(settings, null_probability=probability))
        assert (t.batch()[2] == 3).float().mean() == probability
    assert (trainer(settings, null_class="none").batch()[2] < 3).all()
    assert trainer(settings, num_classes=None, null_class="none").batch()[2] is None


def test_timesteps_are_uniform_and_samples_numbered_through(trainer):
    t = trainer(dataclasses.replace(TRAIN_SETTINGS, batch_size=5000))
    t.step_count = 3
    _, timesteps, _, index = t.batch()
    counts = timesteps.bincount(minlength=50)
    assert len(counts) == 50 and counts.min() > 50 and counts.max() < 160
    assert torch.equal(index, torch.arange(15000, 20000))


def test_flipping_mirrors_half_of_the_samples(trainer):
    plain = trainer(dataclasses.replace(TRAIN_SETTINGS, batch_size=1000)).batch()[0]
    mirrored = trainer(dataclasses.replace(TRAIN_SETTINGS, batch_size=1000, flip=True)).batch()[0]
    same = (plain == mirrored).flatten(1).all(1)
    assert 400 < same.sum() < 600
    assert torch.equal(mirrored[~same], plain[~same].flip(-1))


def test_the_average_is_the_formula(trainer):
    t = trainer(dataclasses.replace(TRAIN_SETTINGS, ema=0.3))
    want = {k: v.double().clone() for k, v in t.unet.state_dict().items()}
    for k in range(8):
        t.step()
        decay = min(0.3, (1 + k) / (10 + k))
        for name, value in t.unet.state_dict().items():
            want[name] = decay * want[name] + (1 - decay) * value.double()
    t.model.clip_denoised = False
    assert not t.averaged().clip_denoised
    averaged = t.averaged().unet
    for name, value in averaged.state_dict().items():
        torch.testing.assert_close(value.double(), want[name], rtol=1e-5, atol=1e-6)
    assert not averaged.training and not any(p.requires_grad for p in averaged.parameters())
    t.step()
    assert not torch.equal(t.ema["conv_in.weight"], averaged.conv_in.weight)  # it was a copy


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_loss_is_the_formula(trainer, prediction):
    t = trainer(prediction=prediction, dropout=0.0)
    t.step_count = 2
    seen = {}

    def forward(x_t, times, labels):
        seen["x_t"] = x_t
        return torch.full_like(x_t, 0.25)

    t.unet = forward
    loss = t.loss().item()
    x_start, times, _, index = t.batch()
    seed = torch.full_like(index, 5)
    signal = torch.from_numpy(np.sqrt(t.model.schedule.alphas_cumprod))[times].view(-1, 1, 1, 1)
    sigma = torch.from_numpy(np.sqrt(1 - t.model.schedule.alphas_cumprod))[times].view(-1, 1, 1, 1)
    _, noise = ops.q_sample(x_start, t.table, times, seed, index)
    x_start, noise = x_start.double(), noise.double()
    torch.testing.assert_close(seen["x_t"].double(), signal * x_start + sigma * noise)
    target = {
        "epsilon": noise,
        "sample": x_start,
        "v_prediction": signal * noise - sigma * x_start,
    }[prediction]
    assert loss == pytest.approx(((0.25 - target) ** 2).mean().item(), rel=1e-5)
    assert abs(noise.mean()) < 0.3 and abs(noise.std() - 1) < 0.2


def test_training_learns(trainer):
    t = trainer(dataclasses.replace(TRAIN_SETTINGS, lr=1e-2), dropout=0.0)
    losses = run(t, 60)
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


def test_every_weight_learns(trainer):
    """Down to the middle of the network: a backward pass that stops on its way would not show."""
    t = trainer(dropout=0.0)
    before = {k: v.clone() for k, v in t.unet.state_dict().items()}
    run(t, 8)
    assert [k for k, v in t.unet.state_dict().items() if torch.equal(v, before[k])] == []


def test_gradients_are_clipped(trainer):
    t = trainer(dataclasses.replace(TRAIN_SETTINGS, clip_grad=1e-3))
    norms = []
    t.optimizer.step = lambda: norms.append(
        math.sqrt(
            sum(p.grad.double().square().sum() for p in t.unet.parameters() if p.grad is not None)
        )
    )
    t.step()
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)


def test_the_learning_rate(trainer):
    constant = TrainSettings(steps=100, lr=0.5, warmup=10)
    cosine = dataclasses.replace(constant, lr_schedule="cosine")
    for settings in (constant, cosine):
        assert [settings.learning_rate(k) for k in (0, 4, 9, 10)] == [0.05, 0.25, 0.5, 0.5]
    assert constant.learning_rate(99) == 0.5
    assert cosine.learning_rate(55) == pytest.approx(0.25)
    assert cosine.learning_rate(100) == pytest.approx(0, abs=1e-12)
    assert dataclasses.replace(constant, warmup=0).learning_rate(0) == 0.5
    t = trainer(dataclasses.replace(TRAIN_SETTINGS, warmup=3))
    run(t, 2)
    assert t.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 2 / 3)


def test_low_precision_is_for_the_network_only(trainer):
    t = trainer(dtype=torch.bfloat16)
    with mock.patch.object(t.unet, "forward", wraps=t.unet.forward) as forward:
        loss = t.step()
    assert forward.call_args.args[0].dtype == torch.float32
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.dtype == torch.float32 for p in t.unet.parameters())
    assert loss == pytest.approx(trainer().step().item(), rel=0.05)


def test_series_are_trained_too(trainer):
    data = Dataset(torch.rand(6, 2, 16) * 2 - 1, None, {})
    t = trainer(data=data, in_channels=2, sample_size=(16,), num_classes=None, null_class="none")
    assert all(math.isfinite(loss) for loss in run(t, 2))


@pytest.mark.parametrize(
    "change,match",
    [
        ({"in_channels": 3}, r"samples of \(3, 8, 8\), and the data's are \(1, 8, 8\)"),
        ({"sample_size": (4, 4)}, "the data's are"),
        ({"num_classes": 2}, "2 classes, and the data 3"),
        ({"data": Dataset(torch.zeros(4, 1, 8, 8), None, {})}, "the data no labels"),
        ({"learn_sigma": True}, "learned variance can be sampled, but not trained"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(trainer, change, match):
    with pytest.raises(ValueError, match=match):
        trainer(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"batch_size": 2.0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"lr_schedule": "linear"},
        {"warmup": -1},
        {"weight_decay": -0.1},
        {"ema": 1.1},
        {"ema": math.nan},
        {"clip_grad": 0.0},
        {"null_probability": -0.1},
        {"null_probability": 2.0},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))) as caught:
        TrainSettings(**change)
    assert "\n" not in str(caught.value)


def test_what_is_not_finite_is_noticed(trainer):
    t = trainer()
    assert t.is_finite()
    t.ema["conv_out.bias"][0] = math.inf
    assert not t.is_finite()
