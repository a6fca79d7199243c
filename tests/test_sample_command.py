"""python -m ddpm_fast.sample as a user runs it: what it leaves, and what it says of bad input."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from recording import Recording
from sampling import pixels, run

from ddpm_fast import noise
from ddpm_fast.backend import extension
from ddpm_fast.checkpoint import read_tensors, save_model, write_tensors
from ddpm_fast.executor import CaptureError
from ddpm_fast.inference import convolutions

QUICK = ["--steps", "5", "--dtype", "float32"]


@pytest.fixture
def model_file(class_model_file) -> str:
    return str(class_model_file)


def test_what_a_run_leaves(model_file, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    status, said, _ = run(
        *(capsys, "--model", model_file, "--num-samples", 5, "--batch-size", 2, "--out", out),
        *("--npz", "--gif", "--graphs", "--class", "0,2", "--start", 7, *QUICK),
    )
    assert status == 0
    first, last = said.strip().splitlines()
    assert first.startswith("--graphs: nothing to capture on a CPU")
    assert last.startswith("5 samples in ") and "images/s" in last
    assert last.endswith(str(out / "grid.png"))
    names = sorted(p.name for p in out.iterdir())
    assert names == ["denoising.gif", "grid.png", "images", "run.json", "samples_5x8x8x1.npz"]
    pictures = sorted(p.name for p in (out / "images").iterdir())
    assert pictures == [f"{i:06d}.png" for i in range(7, 12)]
    with np.load(out / "samples_5x8x8x1.npz") as file:
        assert file["arr_1"].tolist() == [2, 0, 2, 0, 2]
        assert np.array_equal(file["arr_0"][3, ..., 0], pixels(out / "images" / "000010.png"))
    record = json.loads((out / "run.json").read_text())
    decides, environment = record["decides"], record["environment"]
    level = extension.cpu_level() if environment["backend"] == "cpu" else None
    assert environment["cpu_level"] == level
    assert environment["convolutions"] == convolutions(torch.float32)
    assert decides["timesteps"] == [99, 74, 50, 25, 0]
    assert (decides["classes"], decides["seed"], decides["dtype"]) == ([0, 2], 0, "float32")
    assert decides["noise_contract"] == noise.VERSION and len(decides["model_sha256"]) == 64


def test_a_capture_that_falls_back_is_told_once(model_file, tmp_path, capsys, monkeypatch):
    """By a warning and in run.json, which says how the samples were drawn."""
    executor = Recording()
    executor.capture = lambda step, count: fail("a CUDA graph cannot capture the network")
    monkeypatch.setattr("ddpm_fast.sampler.make_executor", lambda *_: (executor, ""))

    def fail(message):
        raise CaptureError(message)

    command = ["--model", model_file, "--num-samples", 3, "--graphs", "auto", "--no-fused", *QUICK]
    with pytest.warns(UserWarning, match="step by step: a CUDA graph cannot capture") as warned:
        status, said, _ = run(capsys, *command, "--device", "cpu", "--out", tmp_path)
    assert status == 0 and len(warned) == 1 and "captured" not in said
    environment = json.loads((tmp_path / "run.json").read_text())["environment"]
    assert environment["graphs"] is False
    assert environment["convolutions"] is None  # of a network that is not fused


def test_sample_42_is_one_picture(model_file, tmp_path, capsys):
    """At any start, and on the reference backend, byte for byte."""
    common = ["--model", model_file, "--batch-size", 4, "--class", "all", "--seed", 3]
    for name, more in (
        ("a", ["--start", 0, "--num-samples", 43]),
        ("b", ["--start", 40, "--num-samples", 5]),
        ("c", ["--start", 42, "--num-samples", 1, "--backend", "reference"]),
    ):
        assert run(capsys, *common, *more, "--out", tmp_path / name, *QUICK)[0] == 0
    files = [(tmp_path / n / "images" / "000042.png").read_bytes() for n in "abc"]
    assert files[0] == files[1] == files[2]


def test_fifty_steps_on_the_reference_backend_give_the_same_bytes(model_file, tmp_path, capsys):
    for backend in ("cpu", "reference"):
        arguments = ["--model", model_file, "--num-samples", 3, "--steps", 50, "--npz"]
        arguments += ["--dtype", "float32", "--backend", backend, "--out", tmp_path / backend]
        assert run(capsys, *arguments)[0] == 0
    a, b = (np.load(tmp_path / n / "samples_3x8x8x1.npz")["arr_0"] for n in ("cpu", "reference"))
    assert np.array_equal(a, b)


@pytest.mark.parametrize(
    "text, timesteps",
    [
        ("ddim5", [80, 60, 40, 20, 0]),
        ("2,3", [99, 74, 50, 49, 0]),
        ("4", [99, 66, 33, 0]),
    ],
)
def test_steps_mean_what_openai_means(model_file, tmp_path, capsys, text, timesteps):
    arguments = ["--model", model_file, "--num-samples", 1, "--steps", text, "--quiet"]
    status, said, _ = run(capsys, *arguments, "--out", tmp_path)
    run_json = json.loads((tmp_path / "run.json").read_text())
    assert status == 0 and said == ""
    assert run_json["decides"]["timesteps"] == timesteps
    assert run_json["decides"]["method"] == "ddpm"


def test_the_shipped_model_draws_digits(tmp_path, capsys):
    status, _, _ = run(
        *(capsys, "--num-samples", 4, "--steps", "ddim10", "--method", "ddim", "--class", "1,0"),
        *("--out", tmp_path, "--quiet"),
    )
    one, zero = (pixels(tmp_path / "images" / f"00000{i}.png") for i in (0, 1))
    assert status == 0 and one.shape == (28, 28)
    # Digits are bright strokes on black, and a zero has more ink than a one.
    assert np.median(one) < 10 and one.max() > 200 and zero.max() > 200
    assert zero.mean() > one.mean()


def test_a_class_of_a_model_without_classes(tiny_model, tmp_path, capsys):
    save_model(tmp_path / "m.safetensors", tiny_model())
    for text in ("all", "1"):
        status, _, err = run(capsys, "--model", tmp_path / "m.safetensors", "--class", text)
        assert status == 2 and "without classes" in err


@pytest.mark.parametrize(
    "words, settings",
    [
        (["--method", "dpmpp_2m"], {"method": "dpmpp_2m"}),
        (
            ["--method", "ddim", "--no-use-clipped-model-output"],
            {"use_clipped_model_output": False},
        ),
        (
            ["--spacing", "leading", "--steps-offset", "1"],
            {"spacing": "leading", "timesteps": [81, 61, 41, 21, 1]},
        ),
    ],
    ids=lambda v: v[1] if isinstance(v, list) else "",
)
def test_run_json_has_the_method_and_backends_agree(model_file, tmp_path, capsys, words, settings):
    arrays = []
    for backend in ("cpu", "reference"):
        out = tmp_path / backend
        arguments = ["--model", model_file, "--num-samples", 2, *words, "--backend", backend]
        assert run(capsys, *arguments, "--npz", "--out", out, *QUICK)[0] == 0
        arrays.append(np.load(out / "samples_2x8x8x1.npz")["arr_0"])
        decides = json.loads((out / "run.json").read_text())["decides"]
        assert {name: decides[name] for name in settings} == settings
    assert np.array_equal(*arrays) and arrays[0].std() > 1


def test_images_to_start_from(model_file, data_file, images, tmp_path, capsys):
    """Sample i starts from image i of eleven, over and over; run.json tells the images apart."""
    arguments = ["--model", model_file, "--init", data_file, "--npz", *QUICK]
    weak = ["--strength", 0.2, "--start", 10, "--num-samples", 2, "--out", tmp_path / "weak"]
    assert run(capsys, *arguments, *weak)[0] == 0
    decides = json.loads((tmp_path / "weak" / "run.json").read_text())["decides"]
    assert decides["strength"] == 0.2 and decides["timesteps"] == [0]
    assert list(decides["init"]) == [data_file.name]
    got = np.load(tmp_path / "weak" / "samples_2x8x8x1.npz")["arr_0"][..., 0].astype(int)
    wanted = images[0][[10, 0]].astype(int)
    # One step from timestep 0, where 0.1 % of the variance is noise.
    assert abs(got - wanted).mean() < 10 < abs(got - wanted[::-1]).mean()
    strong = ["--strength", 1, "--start", 9, "--num-samples", 3, "--out", tmp_path / "strong"]
    assert run(capsys, *arguments, *strong)[0] == 0
    got = np.load(tmp_path / "strong" / "samples_3x8x8x1.npz")["arr_0"][1:, ..., 0].astype(int)
    assert abs(got - wanted).mean() > 10


BAD = {
    "no such model": (["--model", "nothing-here"], 2, "there is no model"),
    "too many steps": (["--steps", "101"], 2, "between 1 and 100"),
    "no steps": (["--steps", "0"], 2, "between 1 and 100"),
    "steps that are no steps": (["--steps", "many"], 2, "steps"),
    "ddim stride": (["--steps", "ddim77"], 2, "77"),
    "no such class": (["--class", "3"], 2, "no class 3"),
    "class that is no number": (["--class", "cat"], 2, "--class wants"),
    "no samples": (["--num-samples", "0"], 2, "number of samples"),
    "no batch": (["--batch-size", "0"], 2, "batch size"),
    "eta": (["--eta", "0.5"], 2, "eta"),
    "eta too large": (["--method", "ddim", "--eta", "2"], 2, "eta"),
    "method": (["--method", "magic"], 2, "magic"),
    "device": (["--device", "abacus"], 2, "abacus"),
    "backend": (["--backend", "triton"], 1, "triton"),
    "eta of another method": (["--method", "dpmpp_2m", "--eta", "1"], 2, "ddim"),
    "raw eps of another method": (["--no-use-clipped-model-output"], 2, "ddim"),
    "inversion": (["--method", "ddim_inverse"], 2, "ddim_inverse"),
    "strength alone": (["--strength", "0.5"], 2, "--init"),
    "images alone": (["--init", "nowhere"], 2, "--strength"),
    "no images": (["--init", "nowhere", "--strength", "1"], 2, "no data at nowhere"),
    "steps offset": (["--steps-offset", "1"], 2, "steps_offset"),
    "guidance": (["--guidance", "nan"], 2, "guidance"),
    "guidance to nothing": (["--guidance", "2"], 2, "guidance"),
    "last sample": (["--start", str(2**63 - 1)], 2, "first sample"),
}
if not torch.cuda.is_available():
    BAD["no cuda"] = (["--device", "cuda"], 2, "0 CUDA devices")


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(model_file, tmp_path, capsys, case):
    arguments, wanted, words = BAD[case]
    out = tmp_path / "out"
    status, said, err = run(capsys, "--model", model_file, *arguments, "--out", out)
    assert status == wanted and said == ""
    last = err.strip().splitlines()[-1]
    assert words in last and "Traceback" not in err
    assert not out.exists()


def test_a_folder_of_another_run(model_file, tmp_path, capsys):
    """Another run's pictures are not mixed with, unless they are to be replaced."""
    common = ["--model", model_file, "--out", tmp_path, *QUICK]
    assert run(capsys, *common, "--num-samples", 3, "--npz", "--gif")[0] == 0
    (tmp_path / "images" / "mine.png").write_text("of the user")
    before = (tmp_path / "images" / "000002.png").read_bytes()
    status, _, err = run(capsys, *common, "--num-samples", 1, "--seed", 5)
    assert status == 2 and "seed: 0 there, 5 now" in err and len(err.splitlines()) == 1
    assert (tmp_path / "images" / "000002.png").read_bytes() == before
    assert (
        run(capsys, *common, "--num-samples", 1, "--start", 3)[0] == 0
    )  # the same run, more of it
    assert len(list((tmp_path / "images").iterdir())) == 5
    assert run(capsys, *common, "--num-samples", 1, "--seed", 5, "--overwrite")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.png", "images", "run.json"]
    names = sorted(p.name for p in (tmp_path / "images").iterdir())
    assert names == ["000000.png", "mine.png"]


def test_a_truncated_model(model_file, tmp_path, capsys):
    path = tmp_path / "cut.safetensors"
    with open(model_file, "rb") as file:
        path.write_bytes(file.read()[:5000])
    status, _, err = run(capsys, "--model", path, "--out", tmp_path / "out")
    assert status == 1 and len(err.splitlines()) == 1 and "truncated" in err
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite(class_model_file, tmp_path, capsys):
    tensors, metadata = read_tensors(class_model_file, "model")
    tensors["conv_in.weight"][0, 0, 0, 0] = torch.nan
    write_tensors(tmp_path / "nan.safetensors", tensors, metadata)
    arguments = ["--model", tmp_path / "nan.safetensors", "--out", tmp_path / "out"]
    status, _, err = run(capsys, *arguments)
    assert status == 1 and len(err.splitlines()) == 1 and "conv_in.weight" in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(model_file, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    arguments = ["--model", model_file, "--out", tmp_path / "file" / "out", *QUICK]
    status, _, err = run(capsys, *arguments)
    assert status == 1 and len(err.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_in_a_process_of_its_own(model_file, tmp_path):
    """A file may hold 200 bytes: one sentence, status 1, no half-written file."""
    arguments = ["--model", model_file, "--num-samples", "9", "--device", "cpu"]
    arguments += ["--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "ddpm_fast.sample", *arguments, "--quiet", *QUICK],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("ddpm_fast.sample: ")
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or pixels(path).shape == (8, 8)


def test_a_series_goes_to_arrays_and_npz(tiny_model, tmp_path, capsys):
    """A 1-D model leaves float32 arrays and an npz of them (N, C, L), and no picture."""
    save_model(tmp_path / "m.safetensors", tiny_model(in_channels=2, sample_size=(16,)))
    arguments = ["--model", tmp_path / "m.safetensors", "--num-samples", 3, *QUICK]
    status, said, _ = run(capsys, *arguments, "--out", tmp_path / "out")
    name = "samples_3x2x16.npz"
    assert status == 0 and said.strip().endswith(name)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["arrays", "run.json", name]
    with np.load(tmp_path / "out" / name) as file:
        assert file["arr_0"].dtype == np.float32 and file["arr_0"].shape == (3, 2, 16)
        one = np.load(tmp_path / "out" / "arrays" / "000001.npy")
        assert one.dtype == np.float32 and np.array_equal(file["arr_0"][1], one)
    status, _, err = run(capsys, *arguments, "--out", tmp_path / "gif", "--gif")
    assert status == 2 and "--gif wants pictures" in err and not (tmp_path / "gif").exists()


def test_the_last_sample_of_a_seed(class_model_file, tmp_path, capsys):
    last = 2**63 - 1
    words = ["--start", last, "--num-samples", 1, "--class", "1", "--npz", "--out", tmp_path / "o"]
    assert run(capsys, "--model", class_model_file, *words, *QUICK)[0] == 0
    assert (tmp_path / "o" / "images" / f"{last}.png").exists()
