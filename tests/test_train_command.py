"""python -m ddpm_fast.train, end to end."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peer_fixtures import write_checkpoint
from PIL import Image
from safetensors.torch import load_file
from training import ENVIRONMENT, NETWORK, arguments, command, here, losses

from ddpm_fast.checkpoint import Model, load_model, save_model
from ddpm_fast.lucid_unet import LucidUNet, LucidUNetConfig
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.training import Trainer


def equal(one: Path, other: Path, name: str) -> bool:
    a, b = load_file(one / name), load_file(other / name)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished(data_file, tmp_path_factory):
    """A whole run of 120 steps in its own process."""
    out = tmp_path_factory.mktemp("train") / "run"
    done = command(data_file, out, "--steps", 120, "--save-every", 40, "--sample-every", 60)
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_leaves_what_it_promises(finished):
    out, done = finished
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    names = {name for name in names if not name.startswith("tensorboard")}
    assert names == {
        "checkpoint.safetensors",
        "model.safetensors",
        "log.csv",
        "samples/0000060.png",
        "samples/0000120.png",
    }
    with Image.open(out / "samples" / "0000120.png") as image:
        assert image.size == (82, 82)  # 8 times 8 samples of 8x8, and gaps of 2
    assert [step for step, _ in losses(out)] == ["50", "100", "120"]
    assert "done at step 120 of 120" in done.stdout and str(out) in done.stdout
    bar = done.stderr.split("\r")[-1]
    assert "loss 0." in bar or "loss 1." in bar
    assert "images/s" in bar and "120/120 [" in bar and "<" in bar  # elapsed < left


def test_the_model_can_be_loaded_and_says_how_it_was_made(finished, data_file):
    out, _ = finished
    model = load_model(out)
    assert model.provenance["step"] == 120
    assert model.provenance["command"][:3] == ["python", "-m", "ddpm_fast.train"]
    assert list(model.provenance["data"]) == [data_file.name]
    assert (model.config.num_classes, model.config.null_class) == (3, "row")
    checkpoint = load_file(out / "checkpoint.safetensors")
    for name, value in model.unet.state_dict().items():
        assert torch.equal(value, checkpoint[f"ema.{name}"])


def test_a_run_is_not_overwritten(finished, data_file, capsys):
    out, _ = finished
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert here(data_file, out, "--steps", 5) == 2
    assert "already holds a training run: add --resume" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def interrupted(monkeypatch, step: int, number: int = signal.SIGINT) -> None:
    """Let the signal arrive during the given step."""
    one_step = Trainer.step

    def stopping(self):
        if self.step_count == step - 1:
            signal.raise_signal(number)
        return one_step(self)

    monkeypatch.setattr(Trainer, "step", stopping)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_to_the_same_losses(
    finished, data_file, tmp_path, monkeypatch, capsys, number
):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        interrupted(patch, 73, number)
        assert here(data_file, tmp_path, "--steps", 120) == 128 + number
    assert "stopped at step 73 of 120" in capsys.readouterr().out
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert load_model(tmp_path).provenance["step"] == 73
    # As if it had been killed a while after that checkpoint, the last line half written.
    with (tmp_path / "log.csv").open("a") as file:
        file.write("100,9.000000,1.000e-04,1.0,9\r\n150,9.00")
    assert here(data_file, tmp_path, "--steps", 120, "--resume") == 0
    out, _ = finished
    assert losses(tmp_path) == losses(out)
    assert equal(out, tmp_path, "model.safetensors")
    assert equal(out, tmp_path, "checkpoint.safetensors")
    assert here(data_file, tmp_path, "--steps", 120, "--resume") == 0  # there is nothing left to do
    assert losses(tmp_path) == losses(out)


@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_from_outside_saves_first(data_file, tmp_path, number, status):
    args = arguments(data_file, tmp_path, "--steps", 10**6, "--save-every", 0)
    process = subprocess.Popen(
        [sys.executable, "-m", "ddpm_fast.train", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        log, deadline = tmp_path / "log.csv", time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") > 1):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        assert not (tmp_path / "checkpoint.safetensors").exists()
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status
    assert "stopped at step" in output and "Traceback" not in errors
    assert load_model(tmp_path).provenance["step"] >= 50
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        "checkpoint.safetensors",
        "log.csv",
        "model.safetensors",
    ]


def test_a_sampling_grid_has_no_more_steps_than_the_schedule(data_file, tmp_path):
    more = ("--steps", 2, "--timesteps", 3, "--sample-every", 2)
    assert here(data_file, tmp_path, *more) == 0
    assert (tmp_path / "samples" / "0000002.png").is_file()


def test_series_are_trained_without_pictures(tmp_path):
    np.savez(tmp_path / "a.npz", np.random.default_rng(0).uniform(-1, 1, (5, 2, 16)))
    out = tmp_path / "run"
    assert here(tmp_path / "a.npz", out, "--steps", 2, "--sample-every", 1) == 0
    assert load_model(out).config.sample_shape == (2, 16)
    assert not (out / "samples").exists()


def test_a_model_is_trained_further(finished, data_file, tmp_path):
    start = load_model(finished[0])
    assert here(data_file, tmp_path, "--model", finished[0], "--steps", 3, "--lr", 1e-5) == 0
    model = load_model(tmp_path)
    assert (model.config, model.prediction_type) == (start.config, start.prediction_type)
    assert model.schedule.config() == start.schedule.config()
    before, after = start.unet.state_dict(), model.unet.state_dict()
    moved = [float((after[name] - before[name]).abs().max()) for name in before]
    assert min(moved) > 0 and max(moved) < 5e-5  # Adam's steps are of about lr
    assert model.provenance["from"] == {"sha256": start.sha256, **start.provenance}
    assert "from" not in start.provenance
    more = ("--model", finished[0], "--lr", 1e-5, "--steps", 5, "--resume")
    assert here(data_file, tmp_path, *more) == 0  # --lr-schedule constant: it may be prolonged
    assert load_model(tmp_path).provenance["step"] == 5


@pytest.mark.parametrize("name", ["diffusers_adm", "w86763777"])
def test_another_code_bases_model_is_trained_further(tmp_path, capsys, name):
    """One with classes and no null class, and one without classes; the data have labels."""
    path = write_checkpoint(name, tmp_path)
    start = load_model(path)
    assert start.config.null_class == "none" and start.conventions
    samples = np.random.default_rng(0).uniform(-1, 1, (9, *start.config.sample_shape))
    np.savez(tmp_path / "a.npz", samples, np.arange(9) % 3)
    out, more = tmp_path / "run", ("--steps", 2, "--sample-every", 2, "--lr", 1e-5)
    assert here(tmp_path / "a.npz", out, "--model", path, *more) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[: len(start.conventions)] == start.conventions
    unused = f"{path} has no classes: the labels are not used"
    assert (unused in said) == (start.config.num_classes is None)
    trained = load_model(out)
    assert (trained.config, trained.clip_denoised) == (start.config, start.clip_denoised)
    assert trained.variance_type == start.variance_type
    for key, value in trained.unet.state_dict().items():
        assert (value - start.unet.state_dict()[key]).abs().max() < 5e-5
    assert trained.conventions == start.conventions
    assert trained.provenance["from"]["family"] == start.provenance["family"]
    assert (out / "samples" / "0000002.png").is_file()


def test_lucidrains_network_is_trained_further(data_file, tmp_path):
    config = LucidUNetConfig(1, (8, 8), 8, 8, (1, 2), (False, True), (2, 2), (4, 4))
    start = Model(LucidUNet(config), NoiseSchedule.cosine(20), clip_denoised=False)
    save_model(tmp_path / "start.safetensors", start)
    out, model = tmp_path / "run", ("--model", tmp_path / "start.safetensors")
    assert here(data_file, out, *model, "--steps", 2, "--sample-every", 2) == 0
    trained = load_model(out)
    assert (trained.config, trained.clip_denoised) == (config, False)
    assert (out / "samples" / "0000002.png").is_file()


def test_a_run_goes_on_from_the_model_that_it_began_with(finished, data_file, tmp_path, capsys):
    begun = ("--model", finished[0])
    assert here(data_file, tmp_path, *begun, "--steps", 2) == 0
    for other in (("--model", tmp_path), ("--resume", *NETWORK)):
        assert here(data_file, tmp_path, "--resume", *other, "--steps", 4) == 1
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and "was made with other model" in errors
    assert load_model(tmp_path).provenance["step"] == 2


def test_a_checkpoint_that_cannot_go_on_is_a_failure(finished, data_file, tmp_path, capsys):
    out, _ = finished
    assert here(data_file, out, "--steps", 120, "--resume", "--lr", 0.5) == 1
    assert "lr: 0.0002 there, 0.5 now" in capsys.readouterr().err
    (tmp_path / "checkpoint.safetensors").write_bytes(b"x" * 100)
    assert here(data_file, tmp_path, "--resume") == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "not a readable safetensors file" in errors
