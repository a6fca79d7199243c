"""What several test files share: a tiny model, its file, and a tiny data set."""

import os

import amx_forms
import numpy as np
import pytest
import torch
from amx import build_emulator, emulated

from ddpm_fast import backend, ops, tile_trial
from ddpm_fast.checkpoint import Model, save_model
from ddpm_fast.data import Dataset
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.training import Trainer, TrainSettings
from ddpm_fast.unet import UNet
from ddpm_fast.unet_config import UNetConfig


def pytest_sessionstart(session):
    """In CI it is a failure to have no extension; elsewhere each test says what it cannot do."""
    if os.environ.get("CI") and backend.extension is None:
        pytest.exit(f"the compiled extension is {backend.extension_error}", returncode=1)


@pytest.fixture
def extension():
    """The compiled extension; its CPU level and torch's threads are put back afterwards."""
    if backend.extension is None:
        pytest.skip(f"the compiled extension is {backend.extension_error}")
    before, threads = backend.cpu_level(), torch.get_num_threads()
    yield backend.extension
    backend.extension._set_cpu_level(before)
    torch.set_num_threads(threads)


@pytest.fixture
def fused_steps(monkeypatch):
    """One entry for each step that the fused operator took."""
    taken, step = [], ops.p_sample_step

    def counted(*args, **kwargs):
        taken.append(1)
        return step(*args, **kwargs)

    monkeypatch.setattr(ops, "p_sample_step", counted)
    return taken


@pytest.fixture(scope="session")
def amx_library(tmp_path_factory):
    """The emulator of AMX's instructions, not installed."""
    return build_emulator(tmp_path_factory.mktemp("amx"))


@pytest.fixture
def amx_emulator(amx_library):
    """AMX's instructions work during the test; the function tells how many there were of each."""
    with emulated(amx_library) as counts:
        yield counts


@pytest.fixture(scope="session")
def amx_forms_library(amx_library, tmp_path_factory):
    """The file of amx_forms.py's functions."""
    return amx_forms.build(tmp_path_factory.mktemp("forms"))


@pytest.fixture
def forms(amx_emulator, amx_forms_library):
    """These functions; tiles are given back afterwards."""
    forms = amx_forms.Forms(amx_forms_library)
    yield forms
    forms("release")


@pytest.fixture
def no_amx(monkeypatch, extension):
    """As on a CPU without AMX."""
    if backend.cpu_level() == tile_trial.LEVEL:
        extension._set_cpu_level("avx512")
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)


@pytest.fixture
def amx_level(request, extension):
    """The level amx in use, on an emulator where the CPU has none: then its counts, else None."""
    if "amx" not in extension.build_config()["cpu_levels"]:
        pytest.skip("this build's compiler knew no AMX")
    if backend.conv_kernels(torch.bfloat16) is None:
        pytest.skip("this CPU has no AVX-512 for bfloat16")
    is_there = "amx" in extension.cpu_levels_available()
    counts = None if is_there else request.getfixturevalue("amx_emulator")
    extension._set_cpu_level("amx", unchecked=True)
    return counts


TINY = {
    "in_channels": 1,
    "sample_size": (8, 8),
    "base_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_levels": (False, True),
    "norm_groups": 4,
    "dropout": 0.0,
}


TRAIN_SETTINGS = TrainSettings(steps=20, batch_size=4, lr=1e-3, warmup=3, seed=5)


def _tiny_config(**changes) -> UNetConfig:
    return UNetConfig(**(TINY | changes))


def _tiny_unet(**changes) -> UNet:
    """No weight is zero, as those of the last layers are at first: every field then shows."""
    generator = torch.Generator().manual_seed(0)
    unet = UNet(_tiny_config(**changes)).eval().requires_grad_(False)
    for parameter in unet.parameters():
        parameter.normal_(0, 0.3, generator=generator)
    return unet


def _tiny_model(**changes) -> Model:
    schedule = NoiseSchedule.linear(100, 1e-3, 0.2)
    return Model(_tiny_unet(**changes), schedule, provenance={"step": 7, "data": ["ä", 1.5]})


@pytest.fixture
def tiny_config():
    return _tiny_config


@pytest.fixture
def tiny_unet():
    return _tiny_unet


@pytest.fixture
def tiny_model():
    return _tiny_model


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_model(path, _tiny_model())
    return path


CLASSES = {"num_classes": 3, "null_class": "row"}


@pytest.fixture(scope="session")
def class_model() -> Model:
    """A tiny model of three classes."""
    return _tiny_model(**CLASSES)


@pytest.fixture(scope="session")
def class_model_file(class_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "classes.safetensors"
    save_model(path, class_model)
    return path


@pytest.fixture(scope="session")
def images() -> tuple[np.ndarray, np.ndarray]:
    """Eleven uint8 images (11, 8, 8) and their labels (11,), of three classes."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (11, 8, 8), dtype=np.uint8), np.arange(11) % 3


@pytest.fixture
def dataset(images) -> Dataset:
    samples, labels = images
    return Dataset(torch.from_numpy(samples[:, None]), torch.from_numpy(labels), {"tiny": "1"})


@pytest.fixture(scope="session")
def data_file(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, *images)
    return path


@pytest.fixture
def trainer(tiny_config, dataset):
    """A new trainer of a tiny class-conditional model; keywords change the model or settings."""

    def make(
        settings=TRAIN_SETTINGS, prediction="epsilon", data=dataset, dtype=torch.float32, **config
    ):
        config = {"num_classes": 3, "null_class": "row", "dropout": 0.2} | config
        torch.manual_seed(0)
        unet = UNet(tiny_config(**config))
        return Trainer(Model(unet, NoiseSchedule.cosine(50), prediction), data, settings, dtype)

    return make
