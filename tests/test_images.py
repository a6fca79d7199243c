"""Pictures: rounding, layouts, and files that are whole or not there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast import images
from ddpm_fast.files import replacing


def test_uint8_rounds_half_to_even_and_clamps():
    x = torch.linspace(-1, 1, 2_000_001)
    exact = ((x + 1.0) * 127.5).numpy()
    ties = exact[exact % 1 == 0.5]
    assert {int(t) % 2 for t in ties} == {0, 1}  # both kinds occur, so half-up would differ
    got = images.to_uint8(x.view(1, 1, 1, -1)).ravel()
    assert got.dtype == np.uint8 and np.array_equal(got, np.rint(exact))
    ends = images.to_uint8(torch.tensor([-3.0, -1.0, 1.0, 3.0]).view(1, 1, 2, 2))
    assert ends.shape == (1, 2, 2, 1) and ends.ravel().tolist() == [0, 0, 255, 255]


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    x = (levels.float() / 127.5 - 1).view(1, 1, 16, 16)
    assert np.array_equal(images.to_uint8(x).ravel(), levels.numpy())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_holds_the_pixels(tmp_path, channels):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    images.write_png(tmp_path / "a.png", array)
    back = np.asarray(Image.open(tmp_path / "a.png"))
    assert np.array_equal(back.reshape(array.shape), array)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("count, rows, columns", [(1, 1, 1), (5, 2, 3), (64, 8, 8)])
def test_grid_places_every_picture(count, rows, columns):
    pictures = np.random.default_rng(0).integers(1, 256, (count, 4, 6, 3), np.uint8)
    canvas = images.grid(pictures, gap=2)
    assert canvas.shape == (rows * 6 + 2, columns * 8 + 2, 3)
    i = count - 1
    top, left = 2 + 6 * (i // columns), 2 + 8 * (i % columns)
    assert np.array_equal(canvas[top : top + 4, left : left + 6], pictures[i])
    assert canvas[:2].max() == 0


def test_gif_moves(tmp_path):
    frames = [np.full((8, 8, 1), level, np.uint8) for level in (0, 120, 255)]
    images.write_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as file:
        assert file.n_frames == 3


def test_npz_has_the_evaluators_layout(tmp_path):
    """And it is what np.savez writes, though the samples come one by one."""
    array = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 1), np.uint8)
    labels = np.array([1, 2, 3])
    images.write_npz(tmp_path / "a.npz", array.shape, np.uint8, iter(array), labels)
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["arr_0"], array) and file["arr_1"].tolist() == [1, 2, 3]
    np.savez(tmp_path / "b.npz", array, labels)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_picture_is_read_as_it_was_written(tmp_path):
    for channels in (1, 3, 4):
        array = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
        images.write_png(tmp_path / "a.png", array)
        assert np.array_equal(images.read_png((tmp_path / "a.png").read_bytes()), array)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(path) as partial:
        partial.write_text("half")
        raise OSError("the disk is full")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
