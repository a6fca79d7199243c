"""PyTorch's files: nothing in them runs, and none costs more memory than it is long."""

import collections
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_cases import refuses

from ddpm_fast.pickles import read_pickle


def test_tensors_have_the_path_that_they_lie_at(tmp_path):
    a, b = torch.arange(3.0), torch.ones(2, 2)
    state = {
        "a": a,
        "b": {"c": [b, {7: a}], "n": 3, "s": "text"},
        "o": collections.OrderedDict(p=b),
    }
    for number, zipped in enumerate((True, False)):
        path = tmp_path / f"{number}.pt"
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        found = read_pickle(path)
        assert list(found) == ["a", "b.c.0", "b.c.1.7", "o.p"]
        assert torch.equal(found["b.c.1.7"], a) and torch.equal(found["o.p"], b)


class Hostile:
    def __init__(self, folder) -> None:
        self.folder = str(folder / "executed")

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_named_and_not_run(zipped, tmp_path):
    path = tmp_path / "m.pt"
    for state in ({"w": torch.zeros(3), "x": Hostile(tmp_path)}, Hostile(tmp_path)):
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        refuses(
            path, "asks for 'posix.mkdir', and nothing in a file is ever run: save a state dict"
        )
    # Python's own pickle, with instructions that torch.save does not use.
    path.write_bytes(pickle.dumps({"x": Hostile(tmp_path)}, protocol=4))
    refuses(path, "no readable PyTorch file")
    # A whole module: its class would have to be imported.
    torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=zipped)
    refuses(path, r"asks for 'torch\.nn\.modules\.linear\.Linear'")
    assert not (tmp_path / "executed").exists()


def test_a_truncated_file_is_refused_at_any_length(tmp_path):
    path = tmp_path / "m.pt"
    for zipped in (True, False):
        torch.save({"w": torch.randn(100)}, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for length in sorted({1, 2, 3, 4, 5, len(whole) - 1, *range(9, len(whole), 41)}):
            path.write_bytes(whole[:length])
            refuses(path, "no readable PyTorch file|asks for '|not a readable safetensors")


def test_more_numbers_than_the_file_holds_are_refused(tmp_path):
    path = tmp_path / "m.pt"
    for name, tensor in (
        ("expanded", torch.zeros(1).expand(1 << 40)),
        ("overlapping", torch.zeros(8).as_strided((8, 8), (0, 1))),
    ):
        torch.save({name: tensor}, path)
        refuses(path, f"'{name}' in it claims more numbers than the file holds")
    for name, tensor in (
        ("meta", torch.zeros(1 << 40, device="meta")),
        ("sparse", torch.eye(3).to_sparse()),
    ):
        torch.save({name: tensor}, path)
        refuses(path, f"'{name}' in it is no plain tensor|no readable PyTorch file")


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    path, bomb = tmp_path / "m.pt", tmp_path / "bomb.pt"
    torch.save({"w": torch.zeros(1 << 22)}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert bomb.stat().st_size < path.stat().st_size / 100
    refuses(bomb, "archive is compressed")


def test_containers_without_end_are_not_walked(tmp_path):
    path = tmp_path / "m.pt"
    nested: object = torch.zeros(1)
    for _ in range(40):
        nested = [nested, nested]  # 2 ** 40 ways to one tensor, in a small file
    torch.save({"x": nested}, path)
    refuses(path, "could not be placed: there are none")
    torch.save({str(i): torch.zeros(1) for i in range(100)} | {"x": [nested] * 3}, path)
    refuses(path, "its 100 tensors could not be placed")
    wide: list = []
    for _ in range(6):
        wide = [wide] * 1000  # 10 ** 18 ways to nothing
    torch.save({"x": wide}, path)
    refuses(path, "has more than 1000000 entries")
    ring: dict = {"w": torch.zeros(1)}
    ring["again"] = ring
    torch.save(ring, path)
    refuses(path, "could not be placed")


def test_a_lone_tensor_or_number_is_no_model(tmp_path):
    path = tmp_path / "m.pt"
    for state in (torch.zeros(3), 7, "text", None):
        torch.save(state, path)
        refuses(path, "of no known family")


def test_thousands_of_mutated_files_are_sentences():
    """In a process of its own, so that a crash would show, and with it the memory it took."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, here / "checkpoint_fuzz.py", "2000", "0"],
        env={**os.environ, "PYTHONPATH": str(here.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert '"files": 2000' in done.stdout
