"""Train for a moment, then sample: models of other shapes go the same way as the shipped one."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ddpm_fast import sample, train

SMALL = ["--base-channels", "8", "--norm-groups", "4", "--num-res-blocks", "1", "--dropout", "0"]
SMALL += ["--steps", "3", "--batch-size", "2", "--warmup", "1", "--sample-every", "0", "--quiet"]
SMALL += ["--device", "cpu"]


def train_and_sample(tmp_path, array: np.ndarray, *more: str):
    np.savez(tmp_path / "data.npz", array)
    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert train.main(["--data", str(tmp_path / "data.npz"), "--out", run, *SMALL, *more]) == 0
    arguments = ["--model", run, "--num-samples", "3", "--batch-size", "2", "--out", str(out)]
    assert sample.main([*arguments, "--steps", "3", "--npz", "--quiet", "--device", "cpu"]) == 0
    return out


def test_64x64_rgb(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    out = train_and_sample(tmp_path, pictures, "--channel-mult", "1,1,2", "--attention", "2")
    with Image.open(out / "images" / "000002.png") as picture:
        assert picture.mode == "RGB" and picture.size == (64, 64)
    with np.load(out / "samples_3x64x64x3.npz") as file:
        assert file["arr_0"].dtype == np.uint8 and file["arr_0"].std() > 1


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_series(tmp_path, prediction):
    series = np.sin(np.linspace(0, 9, 6 * 2 * 32)).reshape(6, 2, 32)
    out = train_and_sample(tmp_path, series, "--channel-mult", "1,2", "--prediction", prediction)
    assert sorted(p.name for p in out.iterdir()) == ["arrays", "run.json", "samples_3x2x32.npz"]
    with np.load(out / "samples_3x2x32.npz") as file:
        assert file["arr_0"].dtype == np.float32 and np.isfinite(file["arr_0"]).all()
        assert file["arr_0"].std() > 1e-5
