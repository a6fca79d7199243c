"""Model files that are damaged or hostile: each is one sentence, soon, and nothing is executed."""

import json
import os
import pickle
import struct
import time

import numpy as np
import pytest
import safetensors
import torch
from checkpoint_cases import configured, refuses, rewrite
from safetensors.torch import save_file

from ddpm_fast.checkpoint import CheckpointError, load_model

SAFETENSORS = tuple(map(int, safetensors.__version__.split(".")[:2]))


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
        pytest.param(
            with_("conv_in.bias", lambda t: torch.zeros(8, dtype=torch.complex64)),
            "no weight",
            marks=pytest.mark.skipif(SAFETENSORS < (0, 7), reason="written from 0.7 on"),
        ),
        (with_("conv_in.bias", lambda t: torch.zeros(8).to(torch.float8_e4m3fn)), "no weight"),
        (with_("conv_in.bias", lambda t: torch.zeros(8).double() + 1e300), "not finite"),
        (with_("conv_in.weight", poisoned(float("nan"))), "not finite"),
        (with_("conv_in.weight", poisoned(float("inf"))), "not finite"),
    ],
)
def test_wrong_tensors_are_refused(model_file, change, match):
    rewrite(model_file, change)
    refuses(model_file, match)
