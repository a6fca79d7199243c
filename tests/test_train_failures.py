"""What ends python -m ddpm_fast.train: one sentence, a status, and nothing half-written."""

import os
import resource

import numpy as np
import pytest
from training import command, here, losses

from ddpm_fast.checkpoint import load_model
from ddpm_fast.training import Trainer


def test_a_loss_that_is_not_finite_stops_and_the_last_good_state_stays(
    data_file, tmp_path, monkeypatch, capsys
):
    one_loss = Trainer.loss
    monkeypatch.setattr(
        Trainer, "loss", lambda self: one_loss(self) * (np.nan if self.step_count == 45 else 1)
    )
    assert here(data_file, tmp_path, "--steps", 80, "--save-every", 20) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "not finite by step 50" in errors
    assert "holds the last good state" in errors
    assert load_model(tmp_path).provenance["step"] == 40
    assert losses(tmp_path) == []


def test_weights_that_are_not_finite_are_not_saved(data_file, tmp_path, monkeypatch, capsys):
    """An infinite gradient: that step's loss is finite, and the weights after it are not."""
    one_step = Trainer.step

    def step(self):
        loss = one_step(self)
        if self.step_count == 7:
            self.unet.conv_in.weight.data[0] = np.inf
        return loss

    monkeypatch.setattr(Trainer, "step", step)
    assert here(data_file, tmp_path, "--steps", 7) == 1
    errors = capsys.readouterr().err
    assert "not finite by step 7" in errors and "last good state" not in errors
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["log.csv"]


@pytest.mark.parametrize(
    "more,message",
    [
        (("--steps", "0"), "steps must be between 1"),
        (("--batch-size", "0"), "batch_size"),
        (("--lr", "nan"), "lr must be"),
        (("--ema", "2"), "ema must be"),
        (("--seed", "-1"), "seed must be"),
        (("--save-every", "-1"), "must be 0 or more"),
        (("--size", "0x8"), "wanted HxW"),
        (("--size", "8"), "only a folder of images can be scaled"),
        (("--channel-mult", "1,x"), "wanted numbers like"),
        (("--channel-mult", ""), "levels"),
        (("--channel-mult", "1,1,1,1,1"), "multiples of 16, got (8, 8)"),
        (("--attention", "2"), "--attention names levels 0 to 1"),
        (("--base-channels", "6"), "norm_groups must divide"),
        (("--num-heads", "3"), "num_heads must divide"),
        (("--dropout", "1.1"), "dropout must be"),
        (("--timesteps", "0"), "num_timesteps must be"),
        (("--schedule", "square"), "invalid choice"),
        (("--prediction", "noise"), "invalid choice"),
        (("--dtype", "float16"), "invalid choice"),
        (("--device", "tpu"), "device must be auto, cpu, cuda"),
        (("--device", "cuda:99"), "CUDA devices"),
        (("--resume",), "to go on from"),
        (("--data", "nowhere"), "there is no data at"),
        (("--model", "mnist", "--base-channels", "24"), "--base-channels is for a new network"),
        (("--model", "mnist", "--unconditional"), "mnist has 10 classes"),
        (("--model", "mnist"), "the model is for samples of (1, 28, 28), and the data's are"),
        (("--model", "nowhere"), "there is no model 'nowhere'"),
    ],
)
def test_bad_arguments_are_a_usage_error(data_file, tmp_path, capsys, more, message):
    try:
        status = here(data_file, tmp_path / "run", *more)
    except SystemExit as stop:  # argparse's own
        status = stop.code
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if not line.startswith(("usage:", " "))]
    assert status == 2
    assert len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_read_is_a_failure(tmp_path, capsys):
    (tmp_path / "a.npz").write_bytes(b"PK no")
    assert here(tmp_path / "a.npz", tmp_path / "run") == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "is not a readable npz file" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_a_failure(data_file, tmp_path, capsys, below):
    (tmp_path / "file").write_text("mine")
    assert here(data_file, tmp_path / below, "--steps", 2) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and str(tmp_path / "file") in errors
    assert (tmp_path / "file").read_text() == "mine" and os.listdir(tmp_path) == ["file"]


def test_a_failure_in_its_own_process_has_no_traceback(tmp_path):
    done = command(tmp_path / "none", tmp_path / "run")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("ddpm_fast.train: there is no")


def test_a_full_disk_is_one_sentence(data_file, tmp_path):
    limit = (3000, 3000)
    done = command(
        *(data_file, tmp_path, "--steps", 2),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "checkpoint.safetensors cannot be written" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob("*.safetensors"))
