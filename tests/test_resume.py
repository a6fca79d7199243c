"""A sampling run that was stopped, or failed, goes on to the same folder byte for byte."""

from __future__ import annotations

import errno
import json
import shutil
import signal

import numpy as np
import pytest
from sampling import contents, run

from ddpm_fast import images
from ddpm_fast.folder import LocalFolder
from ddpm_fast.loop import Loop
from ddpm_fast.output import Output

COMMON = ["--num-samples", 10, "--batch-size", 4, "--steps", 5, "--dtype", "float32", "--npz"]
COMMON += ["--class", "0,2", "--seed", 3]


@pytest.fixture
def arguments(class_model_file, tmp_path) -> list[object]:
    return ["--model", class_model_file, *COMMON, "--out", tmp_path / "out"]


@pytest.fixture
def whole(class_model_file, tmp_path, capsys) -> dict[str, bytes]:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path / "whole"
    assert run(capsys, "--model", class_model_file, *COMMON, "--out", folder)[0] == 0
    return contents(folder)


def at_step(monkeypatch, wanted: int, action) -> None:
    """Do something in the `wanted`-th step from now on, five of which are a batch."""
    taken, step = 0, Loop.step

    def counting(self) -> None:
        nonlocal taken
        taken += 1
        if taken == wanted:
            action()
        step(self)

    monkeypatch.setattr(Loop, "step", counting)


@pytest.fixture
def computed(monkeypatch) -> list[list[int]]:
    """The samples of every batch that is computed."""
    batches, start = [], Loop.start

    def noting(self, seed, index, *more) -> None:
        batches.append(sorted(set(index.tolist())))
        start(self, seed, index, *more)

    monkeypatch.setattr(Loop, "start", noting)
    return batches


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_files_and_the_run_goes_on(
    arguments, whole, tmp_path, capsys, monkeypatch, computed, number, status
):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        at_step(patch, 8, lambda: signal.raise_signal(number))
        got, _, err = run(capsys, *arguments, "--quiet")
    assert got == status and handlers == [signal.getsignal(n) for n in (2, 15)]
    out = tmp_path / "out"
    sentence = f"stopped: 4 of 10 samples are in {out}; run it again to go on"
    assert err.strip() == f"ddpm_fast.sample: {sentence}"
    assert sorted(p.name for p in out.iterdir()) == ["images", "run.json"]
    computed.clear()
    code, said, err = run(capsys, *arguments)
    assert code == 0 and said.startswith("6 samples in ") and "10/10 images" in err
    assert computed == [[4, 5, 6, 7], [8, 9]]
    assert contents(out) == whole
    speed = json.loads((out / "run.json").read_text())["speed"]
    computed.clear()
    code, said, _ = run(capsys, *arguments)
    assert code == 0 and said.startswith("all samples were there: ") and computed == []
    assert contents(out) == whole
    assert json.loads((out / "run.json").read_text())["speed"] == speed


def test_what_a_crash_leaves_is_done_again(arguments, whole, tmp_path, capsys, computed):
    out = tmp_path / "out"
    assert run(capsys, *arguments)[0] == 0
    (out / ".000001.77.partial.png").write_bytes(b"half")
    (out / "images" / "000003.png").write_bytes(b"")  # a file system that lost power
    (out / "images" / "000008.png").unlink()
    computed.clear()
    assert run(capsys, *arguments)[0] == 0
    assert computed == [[3, 8]] and contents(out) == whole


def test_a_broken_picture_is_named(arguments, whole, tmp_path, capsys):
    picture = tmp_path / "out" / "images" / "000005.png"
    assert run(capsys, *arguments)[0] == 0
    for data in (b"no picture", picture.read_bytes()[:60], whole["grid.png"]):
        picture.write_bytes(data)
        status, _, err = run(capsys, *arguments, "--quiet")
        assert status == 1 and len(err.splitlines()) == 1
        assert "000005.png is broken" in err and "delete it and run again" in err
    picture.unlink()
    assert run(capsys, *arguments)[0] == 0 and contents(tmp_path / "out") == whole


def test_a_folder_that_is_not_one_place(arguments, tmp_path, capsys, monkeypatch):
    """As where each machine has an --out of its own."""
    drain = Output.drain

    def losing(self) -> None:
        drain(self)
        (tmp_path / "out" / "images" / "000004.png").unlink()

    monkeypatch.setattr(Output, "drain", losing)
    status, _, err = run(capsys, *arguments, "--quiet")
    assert status == 1 and len(err.splitlines()) == 1
    assert "all were written, but only 9 of 10 samples are in" in err and "one place" in err


def test_a_full_disk(arguments, whole, tmp_path, capsys, monkeypatch):
    written = []

    def write_png(path, array) -> None:
        if len(written) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        write(path, array)

    write = images.write_png
    with monkeypatch.context() as patch:
        patch.setattr(images, "write_png", write_png)
        status, _, err = run(capsys, *arguments, "--quiet")
    assert status == 1 and len(err.splitlines()) == 1
    assert "No space left on device: 6 of 10 samples are in" in err
    assert len([*(tmp_path / "out" / "images").iterdir()]) == 6
    assert run(capsys, *arguments)[0] == 0 and contents(tmp_path / "out") == whole


def test_a_folder_that_vanishes(arguments, whole, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        # At one stroke: its files are being written meanwhile.
        at_step(patch, 8, lambda: (tmp_path / "out").rename(tmp_path / "gone"))
        status, _, err = run(capsys, *arguments, "--quiet")
    assert status == 1 and len(err.splitlines()) == 1 and "0 of 10 samples are in" in err
    assert run(capsys, *arguments)[0] == 0 and contents(tmp_path / "out") == whole


def test_one_run_at_a_time(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(capsys, *arguments)[0] == 0
    before = contents(out)
    other = LocalFolder(out)
    for hold in (other.lock, other.share_lock):  # alone in it, and beside others of its run
        hold()
        for more in ([], ["--overwrite", "--seed", 9]):
            status, _, err = run(capsys, *arguments, "--quiet", *more)
            assert status == 1 and "another run is writing into" in err
        assert {k: v for k, v in contents(out).items() if k != ".lock"} == before
    other.unlock()
    assert contents(out) == before
    assert run(capsys, *arguments)[0] == 0


def test_another_batch_size_goes_on_and_says_so(arguments, whole, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 8, lambda: signal.raise_signal(signal.SIGINT))
        assert run(capsys, *arguments)[0] == 130
    status, said, _ = run(capsys, *arguments, "--batch-size", 5)
    assert status == 0 and "goes on with another batch_size: 4 there, 5 now" in said
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["environment"]["batch_size"] == 5
    assert [e["batch_size"] for e in record["earlier_environments"]] == [4]
    assert contents(tmp_path / "out") == whole
    status, said, _ = run(capsys, *arguments, "--batch-size", 9)  # with which nothing is drawn
    assert status == 0 and "goes on" not in said
    assert json.loads((tmp_path / "out" / "run.json").read_text())["environment"]["batch_size"] == 5


def test_every_other_setting_is_named(arguments, tmp_path, capsys):
    assert run(capsys, *arguments)[0] == 0
    more = ["--seed", 4, "--method", "ddim", "--guidance", 2]
    status, _, err = run(capsys, *arguments, *more)
    assert status == 2 and len(err.splitlines()) == 1
    for words in ("method: ddpm there, ddim now", "guidance: 1.0 there, 2.0", "seed: 3 there, 4"):
        assert words in err


def test_a_run_that_left_no_sample_binds_nobody(arguments, whole, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(capsys, *arguments, "--seed", 9)[0] == 0
    for picture in (out / "images").iterdir():
        picture.unlink()
    assert run(capsys, *arguments)[0] == 0 and contents(out) == whole


OTHERS = ['{"decides": {}, "earlier_environments": 5}', '{"decides": {}, "environment": []}']


@pytest.mark.parametrize("text", [None, "{", "[]", '{"decides": 3}', "9" * 5000, *OTHERS])
def test_samples_of_unknown_origin(arguments, whole, tmp_path, capsys, text):
    out = tmp_path / "out"
    (out / "images").mkdir(parents=True)
    (out / "images" / "000002.png").write_bytes(b"of somebody")
    if text is not None:
        (out / "run.json").write_text(text)
    status, _, err = run(capsys, *arguments)
    words = "cannot be read" if text else "samples, but no run.json"
    assert status == 2 and words in err and "--overwrite" in err
    assert (out / "images" / "000002.png").read_bytes() == b"of somebody"
    assert run(capsys, *arguments, "--overwrite")[0] == 0 and contents(out) == whole


def test_a_moving_picture_is_not_lost(arguments, whole, tmp_path, capsys, monkeypatch, computed):
    """Stopped in the batch that shows in it, or after; drawn again only where it is missing."""
    for step, batches in ((3, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]), (8, [[4, 5, 6, 7], [8, 9]])):
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda: signal.raise_signal(signal.SIGTERM))
            assert run(capsys, *arguments, "--gif")[0] == 143
        computed.clear()
        assert run(capsys, *arguments, "--gif")[0] == 0
        assert computed == batches
        files = contents(tmp_path / "out")
        gif = files.pop("denoising.gif")
        assert files == whole and gif.startswith(b"GIF89a")
        shutil.rmtree(tmp_path / "out")


def test_more_samples_of_the_same_run(arguments, tmp_path, capsys, computed):
    assert run(capsys, *arguments)[0] == 0
    computed.clear()
    assert run(capsys, *arguments, "--num-samples", 13)[0] == 0
    assert computed == [[10, 11, 12]]
    with np.load(tmp_path / "out" / "samples_13x8x8x1.npz") as file:
        assert file["arr_1"].tolist() == [0, 2] * 6 + [0]


def test_a_series_goes_on(tiny_model, tmp_path, capsys, monkeypatch, computed):
    from ddpm_fast.checkpoint import save_model

    save_model(tmp_path / "m.safetensors", tiny_model(in_channels=2, sample_size=(16,)))
    arguments = ["--model", tmp_path / "m.safetensors", "--num-samples", 5, "--batch-size", 2]
    arguments += ["--steps", 5, "--dtype", "float32", "--quiet"]
    assert run(capsys, *arguments, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        at_step(patch, 8, lambda: signal.raise_signal(signal.SIGTERM))
        assert run(capsys, *arguments, "--out", tmp_path / "out")[0] == 143
    computed.clear()
    assert run(capsys, *arguments, "--out", tmp_path / "out")[0] == 0
    assert computed == [[2, 3], [4]]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
