"""Model files: what is saved is what is read, whole or not at all."""

import os
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddpm_fast import files
from ddpm_fast.checkpoint import CheckpointError, load_model, read_tensors, save_model
from ddpm_fast.schedule import NoiseSchedule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_survives_bit_for_bit(tmp_path, tiny_model, dtype):
    model = tiny_model(num_classes=3, null_class="row", head_channels=4, norm_eps=1e-5)
    model.unet.to(memory_format=torch.channels_last)
    model.prediction_type, model.variance_type = "v_prediction", "fixed_large"
    path = tmp_path / "a.safetensors"
    save_model(path, model, dtype)
    loaded = load_model(path)
    for name, value in model.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], value.to(dtype).float()), name
    assert loaded.config == model.config
    assert loaded.schedule.betas.tolist() == model.schedule.betas.tolist()
    assert loaded.provenance == {"step": 7, "data": ["ä", 1.5]}
    assert (loaded.prediction_type, loaded.variance_type) == ("v_prediction", "fixed_large")
    assert loaded.name == str(path) and len(loaded.sha256) == 64
    assert not loaded.unet.training
    assert not any(p.requires_grad for p in loaded.unet.parameters())
    assert load_file(path)["conv_in.weight"].dtype == dtype


def test_any_schedule_survives(tmp_path, tiny_model):
    model = tiny_model()
    betas = np.random.default_rng(0).uniform(0.01, 0.1, 10)
    for schedule in (
        NoiseSchedule.cosine(50),
        NoiseSchedule.cosine(50, s=0.1),
        NoiseSchedule(betas),
    ):
        model.schedule = schedule
        save_model(tmp_path / "a.safetensors", model)
        assert (load_model(tmp_path / "a.safetensors").schedule.betas == schedule.betas).all()


def test_a_run_s_folder_is_a_model(tmp_path, tiny_model):
    save_model(tmp_path / "model.safetensors", tiny_model())
    assert load_model(tmp_path).name == str(tmp_path)


@pytest.mark.parametrize("name", ["none", "none.safetensors", "", "a/b\0c", "x" * 300])
def test_what_is_not_there_is_a_usage_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no model") as caught:
        load_model(name)
    assert not isinstance(caught.value, CheckpointError)


def test_weights_that_do_not_fit_the_dtype_are_not_saved(tmp_path, tiny_model):
    model, path = tiny_model(), tmp_path / "a.safetensors"
    save_model(path, model)
    before = path.read_bytes()
    model.unet.conv_in.bias[0] = 1e6
    with pytest.raises(ValueError, match="is not finite in torch"):
        save_model(path, model, torch.float16)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "before")
    with pytest.raises(RuntimeError), files.replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a.txt"]
    with pytest.raises(OSError, match="Not a directory"):
        files.write_text(path / "below", "x")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_model_has_the_permissions_of_any_file(tmp_path, tiny_model, umask):
    before = os.umask(umask)
    try:
        save_model(tmp_path / "a.safetensors", tiny_model())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o666 & ~umask


def test_reading_names_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="there is no training checkpoint at"):
        read_tensors(tmp_path / "a.safetensors", "training checkpoint")
