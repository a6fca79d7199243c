"""Model files: they survive whole, and anything else is one sentence."""

import json
import os
import pickle
import stat
import struct
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm_fast import files
from ddpm_fast.checkpoint import CheckpointError, load_model, read_tensors, save_model
from ddpm_fast.schedule import NoiseSchedule


def refuses(path, match: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def metadata_of(path) -> dict[str, str]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))["__metadata__"]


def rewrite(path, change=None, **metadata) -> None:
    """Write the model's file again with other metadata, its tensors passed through `change`."""
    tensors, old = load_file(path), metadata_of(path)
    change = change or (lambda tensors: tensors)
    save_file(change(tensors), path, {k: v for k, v in (old | metadata).items() if v is not None})


def configured(path, **parts) -> None:
    config = json.loads(metadata_of(path)["config"])
    for name, change in parts.items():
        config[name] = config.get(name, {}) | change if isinstance(change, dict) else change
    rewrite(path, config=json.dumps(config))


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


def test_nothing_in_a_pickle_is_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "a.safetensors"
    path.write_bytes(pickle.dumps(Hostile(), protocol=2))  # as torch.save does
    refuses(path, "asks for 'posix.mkdir', and nothing in a file is ever run")
    torch.save({"w": torch.zeros(3), "x": Hostile()}, path)
    refuses(path, "asks for 'posix.mkdir', and nothing in a file is ever run")
    assert not (tmp_path / "executed").exists()


def test_a_truncated_file_is_refused_at_any_length(model_file):
    whole = model_file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    lengths = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 1}
    for length in sorted(lengths | set(range(0, len(whole), len(whole) // 40))):
        model_file.write_bytes(whole[:length])
        refuses(model_file, "not a readable safetensors file")


def test_random_bytes_and_huge_headers_are_refused(model_file):
    whole = model_file.read_bytes()
    rng = np.random.default_rng(0)
    for content in (
        rng.bytes(1000),
        struct.pack("<Q", 2**63) + whole[8:],
        struct.pack("<Q", 2**64 - 1) + whole[8:],
        struct.pack("<Q", 10**8) + whole[8:],
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        whole + b"x",
    ):
        model_file.write_bytes(content)
        refuses(model_file)


def test_flipped_bytes_never_give_another_error(model_file):
    whole = bytearray(model_file.read_bytes())
    rng = np.random.default_rng(0)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in rng.integers(0, header, 60):
        content = whole.copy()
        content[place] ^= 1 << int(rng.integers(8))
        model_file.write_bytes(content)
        try:
            load_model(model_file)
        except CheckpointError as error:
            assert "\n" not in str(error)


def test_another_program_s_safetensors_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    for metadata in (None, {"format": "pt"}, {"format": "x\ny" * 1000}):
        save_file({"w": torch.zeros(3)}, path, metadata)
        refuses(path, "of no known family .*: its 1 tensors could not be placed: 'w'")


@pytest.mark.parametrize(
    "config",
    [
        None,
        "",
        "{",
        "[" * 100_000,
        '{"a":' * 50_000,
        "null",
        "[]",
        "7",
        '"config"',
        "{}",
        "1" * 10_000,
    ],
)
def test_hostile_json_is_refused(model_file, config):
    rewrite(model_file, config=config)
    refuses(model_file, "describes no valid model")


@pytest.mark.parametrize("conventions", [7, None, "text", {"a": 1}, [1, ["b"], None]])
def test_conventions_of_any_kind_do_no_harm(model_file, conventions):
    rewrite(model_file, provenance=json.dumps({"conventions": conventions}))
    assert load_model(model_file).conventions == []
    rewrite(model_file, provenance=json.dumps({"conventions": ["a\x1b[2Jb\nc", "é" * 9999]}))
    assert load_model(model_file).conventions == ["a[2Jbc", "é" * 400]


@pytest.mark.parametrize("provenance", ["[" * 100_000, "[]", "nothing"])
def test_hostile_provenance_is_refused(model_file, provenance):
    rewrite(model_file, provenance=provenance)
    refuses(model_file, "describes no valid model")


@pytest.mark.parametrize(
    "parts",
    [
        {"unet": {"base_channels": 10**9}},
        {"unet": {"base_channels": 2**14, "channel_mult": [256, 256]}},
        {"unet": {"base_channels": 1e300}},
        {"unet": {"base_channels": "8"}},
        {"unet": {"base_channels": None}},
        {"unet": {"in_channels": 2**62}},
        {"unet": {"channel_mult": "x" * 100}},
        {"unet": {"channel_mult": {"1": 2}}},
        {"unet": {"channel_mult": [1] * 10, "attention_levels": [True] * 10, "num_res_blocks": 16}},
        {"unet": {"channel_mult": [1] * 10**5, "attention_levels": [True] * 10**5}},
        {"unet": {"num_res_blocks": 10**9}},
        {"unet": {"num_classes": 10**12}},
        {"unet": {"sample_size": [10**30, 8]}},
        {"unet": {"sample_size": [[8], 8]}},
        {"unet": {"norm_eps": float("nan")}},
        {"unet": {"dropout": float("inf")}},
        {"unet": {"a\nb": 1}},
        {"unet": []},
        {"unet": None},
        {"unet": {"learn_sigma": True}},
        {"schedule": {"num_train_timesteps": 10**12}},
        {"schedule": {"num_train_timesteps": -1}},
        {"schedule": {"beta_schedule": ["linear"]}},
        {"schedule": {"trained_betas": [[1], 2]}},
        {"schedule": {"trained_betas": [float("nan")]}},
        {"schedule": "linear"},
        {"prediction_type": "__class__"},
        {"prediction_type": ["epsilon"]},
        {"variance_type": None},
        {"variance_type": "learned"},
        {"clip_denoised": 1},
        {"lucid_unet": {"channel_mult": [4096] * 10, "base_channels": 2**14}},
        {"lucid_unet": {}},
        {"lucid_unet": None},
    ],
)
def test_a_hostile_configuration_is_refused_quickly(model_file, parts):
    configured(model_file, **parts)
    began = time.process_time()
    refuses(model_file)
    assert time.process_time() - began < 2


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def with_(name, value):
    return lambda tensors: tensors | {name: value(tensors)}


def poisoned(number):
    def value(tensors):
        bad = tensors["conv_in.weight"].clone()
        bad.flatten()[5] = number
        return bad

    return value


@pytest.mark.parametrize(
    "change,match",
    [
        (without("conv_in.weight"), "lacks 'conv_in.weight'"),
        (lambda tensors: {}, "describes no valid model"),
        (with_("extra\n", lambda t: torch.zeros(3)), "unknown tensor"),
        (with_("conv_in.bias", lambda t: torch.zeros(9)), r"shape \(9,\) where .* wants \(8,\)"),
        (with_("conv_in.bias", lambda t: torch.zeros(())), "shape"),
        (with_("conv_in.bias", lambda t: torch.zeros(8, dtype=torch.int64)), "which is no weight"),
        (with_("conv_in.bias", lambda t: torch.zeros(8).bool()), "which is no weight"),
        (with_("conv_in.bias", lambda t: torch.zeros(8, dtype=torch.complex64)), "no weight"),
        (with_("conv_in.bias", lambda t: torch.zeros(8).to(torch.float8_e4m3fn)), "no weight"),
        (with_("conv_in.bias", lambda t: torch.zeros(8).double() + 1e300), "not finite"),
        (with_("conv_in.weight", poisoned(float("nan"))), "not finite"),
        (with_("conv_in.weight", poisoned(float("inf"))), "not finite"),
    ],
)
def test_wrong_tensors_are_refused(model_file, change, match):
    rewrite(model_file, change)
    refuses(model_file, match)


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
