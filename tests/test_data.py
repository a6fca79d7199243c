"""Training data: what is read, and what is refused in one sentence."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.data import DataError, load_dataset


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    magic = magic if magic is not None else 0x0800 | array.ndim
    return struct.pack(f">I{array.ndim}I", magic, *array.shape) + array.tobytes()


def refuses(path, match: str, kind: type = DataError, **settings) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        load_dataset(path, **settings)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


@pytest.fixture
def mnist(tmp_path, images):
    """A folder as MNIST's: the training set, and a test set that must not be taken for it."""
    samples, labels = images[0], images[1].astype(np.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(samples))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(samples[:4]))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[:4]))
    (tmp_path / "._train-images-idx3-ubyte").write_bytes(b"not this")
    return tmp_path


def pack(path) -> None:
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


@pytest.mark.parametrize("packed", [(), ("images",), ("images", "labels")])
def test_idx_files_plain_and_gzipped(mnist, images, packed):
    for kind, rank in (("images", 3), ("labels", 1)):
        if kind in packed:
            pack(mnist / f"train-{kind}-idx{rank}-ubyte")
    data = load_dataset(mnist)
    assert torch.equal(data.samples, torch.from_numpy(images[0][:, None]))
    assert data.labels.dtype == torch.int64 and data.labels.tolist() == images[1].tolist()
    assert (len(data), data.num_classes, len(data.checksums)) == (11, 3, 2)


def test_the_labels_are_those_of_the_images(mnist):
    assert len(load_dataset(mnist / "t10k-images-idx3-ubyte").labels) == 4
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (mnist / name).unlink()
    data = load_dataset(mnist)
    assert len(data) == len(data.labels) == 4
    (mnist / "t10k-labels-idx1-ubyte").unlink()
    assert load_dataset(mnist).labels is None


def test_checksums_tell_data_apart(mnist):
    before = load_dataset(mnist).checksums
    assert before == load_dataset(mnist).checksums
    path = mnist / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert load_dataset(mnist).checksums != before


@pytest.mark.parametrize("cut", [1, 9, 30, 60])
def test_a_truncated_gzip_is_refused(tmp_path, images, cut):
    whole = gzip.compress(idx(images[0]))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(whole[:-cut])
    refuses(tmp_path, "is not a readable IDX file")


def test_a_damaged_gzip_is_refused(tmp_path, images):
    whole = bytearray(gzip.compress(idx(images[0])))
    whole[12:40] = b"\xff" * 28
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(whole)
    refuses(tmp_path, "is not a readable IDX file")


@pytest.mark.parametrize(
    "content,match",
    [
        (b"", "readable IDX"),
        (b"\x00\x00\x08", "readable IDX"),
        (b"PNG?" * 9, "does not begin as one"),
        (b"\x00\x00\x07\x01\x00\x00\x00\x00", "does not begin as one"),
        (idx(np.zeros((3, 8, 8), np.uint8))[:-1], r"191 values, and its header says \(3, 8, 8\)"),
        (idx(np.zeros((3, 8, 8), np.uint8)) + b"x", "193 values"),
        (struct.pack(">I3I", 0x0803, 2**32 - 1, 2**32 - 1, 2**32 - 1), "0 values"),
        (struct.pack(">I255I", 0x08FF, *[0] * 255), "readable IDX"),
        (idx(np.zeros((0, 8, 8), np.uint8)), "no samples"),
        (idx(np.zeros((3, 8), np.uint8)), r"uint8 images \(N, H, W\), got uint8 \(3, 8\)"),
        (idx(np.zeros((3, 8, 8), ">f4"), 0x0D03), "got >f4"),
    ],
)
def test_a_wrong_idx_file_is_refused(tmp_path, content, match):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    refuses(tmp_path, match)


def test_labels_of_another_number_are_refused(mnist):
    (mnist / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(10, np.uint8)))
    refuses(mnist, "labels must be 11 integers from 0")


def picture(path, array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_a_folder_of_grey_images(tmp_path, images):
    for i, array in enumerate(images[0]):
        picture(tmp_path / f"{i:02d}.png", array)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._00.png").write_bytes(b"not one either")
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / ".thumbnails" / "a.png").write_bytes(b"nor this")
    (tmp_path / "folder.png").mkdir()
    data = load_dataset(tmp_path)
    assert torch.equal(data.samples, torch.from_numpy(images[0][:, None]))
    assert data.labels is None and data.num_classes is None
    before = data.checksums
    picture(tmp_path / "00.png", images[0][1])
    assert load_dataset(tmp_path).checksums != before


def test_subfolders_are_classes_and_colour_stays(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
    for i, name in enumerate(("b/0.png", "a/x/1.png", "b/2.png", "c/3.PNG")):
        picture(tmp_path / name, colours[i])
    data = load_dataset(tmp_path)
    assert data.labels.tolist() == [0, 1, 1, 2]  # a, b, b, c
    assert torch.equal(data.samples, torch.from_numpy(colours[[1, 0, 2, 3]]).movedim(-1, 1))
    picture(tmp_path / "4.png", colours[0])
    refuses(tmp_path, "both directly and in subfolders")


def test_one_image_in_colour_makes_all_rgb(tmp_path):
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 256, (4, 4), np.uint8), rng.integers(0, 256, (4, 4, 3), np.uint8)
    picture(tmp_path / "0.png", grey)
    picture(tmp_path / "1.png", colour)
    samples = load_dataset(tmp_path).samples.numpy()
    assert (samples[0] == grey).all() and (samples[1] == np.moveaxis(colour, -1, 0)).all()


def test_other_kinds_of_pixels(tmp_path):
    levels = np.array([[0, 1, 128, 256, 257], [385, 386, 32768, 65407, 65535]], np.uint16)
    picture(tmp_path / "16.png", levels)
    want = np.round(levels / 257.0).astype(np.uint8)
    assert (load_dataset(tmp_path).samples[0, 0].numpy() == want).all()
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "16.tiff")
    refuses(tmp_path, "16.tiff is not a readable image: .*more than 16 bits")
    (tmp_path / "16.tiff").unlink()
    Image.fromarray(np.zeros((2, 5, 2), np.uint8), "LA").save(tmp_path / "16.png")
    assert load_dataset(tmp_path).samples.shape == (1, 1, 2, 5)


def test_images_of_several_sizes_need_a_size(tmp_path):
    wide = np.repeat(np.array([[10] * 4 + [200] * 8 + [10] * 4], np.uint8), 8, 0)  # 8x16
    picture(tmp_path / "0.png", wide)
    picture(tmp_path / "1.png", np.full((4, 4), 77, np.uint8))
    refuses(tmp_path, "4x4 .*first image 8x16: give --size")
    samples = load_dataset(tmp_path, (8, 8)).samples
    assert samples.shape == (2, 1, 8, 8)
    assert (samples[0] == 200).all() and (samples[1] == 77).all()  # the middle; scaled up
    assert load_dataset(tmp_path, (4, 8)).samples.shape == (2, 1, 4, 8)


@pytest.mark.parametrize("cut", [3, 40, 60])
def test_a_broken_image_is_refused(tmp_path, images, cut):
    picture(tmp_path / "0.png", images[0][0])
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:cut])
    refuses(tmp_path, "0.png is not a readable image")


def test_an_image_too_large_to_be_meant_is_refused(tmp_path, images, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    picture(tmp_path / "0.png", images[0][0])
    refuses(tmp_path, "0.png is not a readable image")


def test_npz_of_grey_images_in_a_folder(data_file, images):
    for path in (data_file, data_file.parent):
        data = load_dataset(path)
        assert torch.equal(data.samples, torch.from_numpy(images[0][:, None]))
        assert data.labels.tolist() == images[1].tolist()


def test_npz_of_colour_images_and_named_arrays(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", labels=np.arange(3), data=array)
    data = load_dataset(tmp_path / "a.npz")
    assert torch.equal(data.samples, torch.from_numpy(array).movedim(-1, 1))
    assert data.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 2, 16), (5, 2, 4, 4)])
def test_npz_of_floats(tmp_path, dtype, shape):
    array = np.random.default_rng(0).uniform(-1, 1, shape).astype(dtype)
    array.flat[:2] = -1, 1
    np.savez(tmp_path / "a.npz", array)
    data = load_dataset(tmp_path / "a.npz")
    assert data.samples.dtype == torch.float32 and data.labels is None
    assert torch.equal(data.batch(torch.tensor([4, 0]))[0], data.samples[[4, 0]])
    assert (data.samples.numpy() == array.astype(np.float32)).all()


@pytest.mark.parametrize(
    "array,match",
    [
        (np.full((2, 1, 8), 1.01), r"floats in \[-1, 1\], got \[1.01, 1.01\]: scale it first"),
        (np.full((2, 1, 8), np.nan), "got .nan, nan"),
        (np.full((2, 1, 8), -np.inf), r"floats in \[-1, 1\]"),
        (np.full((2, 8, 8), None), "is not a readable npz file"),
        (np.zeros((2, 8, 8), np.int32), r"got int32 of shape \(2, 8, 8\)"),
        (np.zeros((2, 8), np.uint8), r"got uint8 of shape \(2, 8\)"),
        (np.zeros((2, 8, 8), bool), "got bool"),
        (np.zeros((2, 8, 8), complex), "got complex128"),
        (np.zeros(2, "U3"), "got <U3"),
        (np.zeros((0, 8, 8), np.uint8), "no samples"),
        (np.zeros((0, 1, 8)), "no samples"),
    ],
)
def test_an_npz_that_cannot_be_used_is_refused(tmp_path, array, match):
    np.savez(tmp_path / "a.npz", array)
    refuses(tmp_path / "a.npz", match)


@pytest.mark.parametrize(
    "labels", [np.zeros(2, int), np.zeros((3, 1), int), np.full(3, -1), np.zeros(3), np.array(1)]
)
def test_labels_that_are_none_are_refused(tmp_path, labels):
    np.savez(tmp_path / "a.npz", np.zeros((3, 8, 8), np.uint8), labels)
    refuses(tmp_path / "a.npz", "labels must be 3 integers from 0")


def test_a_broken_npz_is_refused(tmp_path, data_file):
    whole = data_file.read_bytes()
    for cut in (0, 3, 100, len(whole) - 5):
        (tmp_path / "a.npz").write_bytes(whole[:cut])
        refuses(tmp_path / "a.npz", "is not a readable npz file")
    np.savez(tmp_path / "a.npz", labels=np.arange(3))
    refuses(tmp_path / "a.npz", "no array of samples")


def test_what_is_not_there_is_refused(tmp_path, data_file):
    refuses(tmp_path / "none", "there is no data at", ValueError)
    refuses(tmp_path, "no samples: no IDX files, no npz, no images")
    refuses(data_file, "only a folder of images can be scaled", ValueError, size=(4, 4))
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", np.zeros((3, 8, 8), np.uint8))
    refuses(tmp_path, "holds 2 npz files", ValueError)


def test_a_batch_scales_every_level_exactly(dataset):
    levels = torch.arange(256, dtype=torch.uint8)
    data = type(dataset)(levels.view(256, 1, 1, 1), None, {})
    x, labels = data.batch(torch.arange(256))
    want = (np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1)).tolist()
    assert x.dtype == torch.float32 and x.flatten().tolist() == want and labels is None
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8).flatten(), levels)
    x, labels = dataset.batch(torch.tensor([10, 3, 3]))
    assert x.shape == (3, 1, 8, 8) and labels.tolist() == [1, 0, 0]
    assert torch.equal(x[1], x[2])
