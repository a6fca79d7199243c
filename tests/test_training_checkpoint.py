"""Checkpoints of training: another run's, a prolonged run's, damaged ones."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TRAIN_SETTINGS

from ddpm_fast.checkpoint import CheckpointError, read_tensors, write_tensors
from ddpm_fast.data import Dataset


@pytest.fixture
def saved(trainer, tmp_path):
    t = trainer()
    t.step()
    t.step()
    t.save(tmp_path / "a.safetensors", {})
    return tmp_path / "a.safetensors"


def other_data(dataset):
    return Dataset(dataset.samples, dataset.labels, {"tiny": "2"})


@pytest.mark.parametrize(
    "change,match",
    [
        (
            {"settings": replace(TRAIN_SETTINGS, seed=6)},
            "other settings .seed: 5 there, 6",
        ),
        ({"settings": replace(TRAIN_SETTINGS, lr=0.1)}, "lr: 0.001 there, 0.1 now"),
        ({"settings": replace(TRAIN_SETTINGS, lr_schedule="cosine")}, "lr_schedule"),
        ({"dropout": 0.1}, "other unet .dropout: 0.2 there, 0.1 now"),
        ({"prediction": "sample"}, "other prediction_type .'epsilon' there, 'sample' now"),
        ({"data": other_data}, "other data .tiny: '1' there, '2' now"),
    ],
)
def test_a_checkpoint_of_another_run_names_the_difference(saved, trainer, dataset, change, match):
    change = {k: v(dataset) if v is other_data else v for k, v in change.items()}
    t = trainer(**change)
    before = t.unet.conv_in.weight.clone()
    with pytest.raises(CheckpointError, match=match) as caught:
        t.load(saved)
    assert "\n" not in str(caught.value)
    assert torch.equal(before, t.unet.conv_in.weight) and t.step_count == 0


def test_a_run_of_constant_rate_may_be_prolonged(saved, trainer, tmp_path):
    t = trainer(replace(TRAIN_SETTINGS, steps=40))
    t.load(saved)
    assert t.step_count == 2
    cosine = replace(TRAIN_SETTINGS, lr_schedule="cosine")
    trainer(cosine).save(saved, {})
    with pytest.raises(CheckpointError, match="steps: 20 there, 40 now"):
        trainer(replace(cosine, steps=40)).load(saved)


@pytest.mark.parametrize(
    "metadata",
    [
        {"format": "pt"},
        {"step": "x"},
        {"step": "-1"},
        {"step": None},
        {"identity": None},
        {"identity": "[]"},
        {"identity": "[" * 100_000},
        {"progress": "{"},
        {"progress": "7"},
        {"identity": json.dumps({"settings": "x" * 10_000})},
    ],
)
def test_a_checkpoint_with_damaged_metadata_is_refused(saved, trainer, metadata):
    tensors, old = read_tensors(saved, "checkpoint")
    write_tensors(saved, tensors, {k: v for k, v in (old | metadata).items() if v is not None})
    with pytest.raises(CheckpointError) as caught:
        trainer().load(saved)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


def test_a_checkpoint_with_damaged_tensors_is_refused(saved, trainer):
    whole, metadata = read_tensors(saved, "checkpoint")
    name = "exp_avg.conv_in.weight"
    for tensors in (
        {k: v for k, v in whole.items() if k != name},
        whole | {name: torch.zeros(3)},
    ):
        write_tensors(saved, tensors, metadata)
        t = trainer()
        with pytest.raises(CheckpointError, match="is missing or of another shape"):
            t.load(saved)
        assert t.step_count == 0
    saved.write_bytes(saved.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        trainer().load(saved)
