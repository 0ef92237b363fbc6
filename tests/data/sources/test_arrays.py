from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from tokenlab.core.errors import DataError
from tokenlab.data.source import Source
from tokenlab.data.sources import arrays

IMAGES = np.arange(6 * 4 * 5 * 3, dtype=np.uint8).reshape(6, 4, 5, 3)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def build(path: Path, **options: int) -> arrays.NumpySource:
    return arrays.build(arrays.Config(path=str(path), **options))


def write_npz(folder: Path) -> Path:
    np.savez(folder / "train.npz", image=IMAGES, label=LABELS)
    np.savez_compressed(folder / "test.npz", images=IMAGES[:2], labels=LABELS[:2, None])
    return folder


def write_npy(folder: Path, count: int = 6) -> Path:
    for split, size in (("train", count), ("test", 2)):
        (folder / split).mkdir(parents=True)
        np.save(folder / split / "image.npy", np.resize(IMAGES, (size, 4, 5, 3)))
        np.save(folder / split / "label.npy", np.resize(LABELS, (size, 1)).astype(np.uint8))
    return folder


def write_medmnist(folder: Path) -> Path:
    file = folder / "pathmnist.npz"
    parts = {"train": 6, "val": 3, "test": 2}
    content = {f"{split}_images": IMAGES[:n] for split, n in parts.items()}
    np.savez(file, **content, **{f"{split}_labels": LABELS[:n, None] for split, n in parts.items()})
    return file


def write_keras(folder: Path) -> Path:
    file = folder / "mnist.npz"
    np.savez(file, x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:2], y_test=LABELS[:2])
    return file


@pytest.mark.parametrize("write", [write_npz, write_npy, write_medmnist, write_keras])
def test_every_layout(tmp_path: Path, write) -> None:
    source = build(write(tmp_path))
    assert isinstance(source, Source)
    val = {"val": 3} if write is write_medmnist else {}
    assert source.splits == {"train": 6, "test": 2, **val}
    assert source.spec == {"image": ((4, 5, 3), "uint8"), "label": ((), "int32")}
    assert (source.num_classes, source.class_names) == (3, None)
    records = pickle.loads(pickle.dumps(source.split("train")))
    batch = records.batch(np.array([5, 0, 5]))
    np.testing.assert_array_equal(batch["image"], IMAGES[[5, 0, 5]])
    np.testing.assert_array_equal(batch["label"], [2, 0, 2])
    assert batch["label"].dtype == np.int32 and batch["image"].flags.owndata | batch["image"].flags.writeable
    batch["image"][:] = 0
    record = records[5]
    np.testing.assert_array_equal(record["image"], IMAGES[5])
    assert record["label"] == 2 and np.shape(record["label"]) == ()
    with pytest.raises(IndexError):
        records[6]


def test_grey_images_get_a_channel_and_floats_are_float32(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", image=np.linspace(0, 1, 24).reshape(2, 3, 4), age=np.array([0.5, 1.5]))
    source = build(tmp_path)
    assert source.spec == {"image": ((3, 4, 1), "float32"), "age": ((), "float32")}
    assert source.num_classes is None
    assert source.split("train").batch(np.array([1]))["image"].dtype == np.float32


def test_npy_files_stay_on_disk(tmp_path: Path) -> None:
    # A sparse file of 16 GiB: reading all of it would fail or take long.
    (tmp_path / "train").mkdir()
    count = (16 << 30) // (256 * 256)
    images = np.lib.format.open_memmap(
        tmp_path / "train" / "image.npy", mode="w+", dtype=np.uint8, shape=(count, 256, 256, 1)
    )
    images[-1] = 7
    del images
    np.save(tmp_path / "train" / "label.npy", np.zeros(count, np.int8))
    records = build(tmp_path).split("train")
    content = pickle.dumps(records)
    assert len(content) < 2000
    for each in (records, pickle.loads(content)):
        batch = each.batch(np.array([0, count - 1]))
        assert batch["image"].max(axis=(1, 2, 3)).tolist() == [0, 7]
        assert not isinstance(batch["image"], np.memmap)
        batch["image"][:] = 1
    assert records.batch(np.array([0]))["image"].max() == 0


def test_fortran_order_and_byte_order(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "image.npy", np.asfortranarray(IMAGES))
    np.save(tmp_path / "train" / "label.npy", LABELS.astype(">i8"))
    batch = build(tmp_path).split("train").batch(np.array([4, 2]))
    np.testing.assert_array_equal(batch["image"], IMAGES[[4, 2]])
    assert batch["label"].tolist() == [1, 2] and batch["label"].dtype == np.dtype("=i4")


def test_classes(tmp_path: Path) -> None:
    write_npz(tmp_path)
    assert build(tmp_path, num_classes=5).num_classes == 5
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    assert build(tmp_path).class_names == ("cat", "dog", "owl")
    with pytest.raises(DataError, match="classes.txt has 3 names; config.data.num_classes is 4"):
        build(tmp_path, num_classes=4)


def test_labels_out_of_range_are_named(tmp_path: Path) -> None:
    write_npz(tmp_path)
    with pytest.raises(DataError, match="split 'train': label of example 2 is 2; expected 0 to 1"):
        build(tmp_path, num_classes=2)
    np.savez(tmp_path / "test.npz", image=IMAGES, label=np.array([0, 0, 0, 9, 0, 0]))
    with pytest.raises(DataError, match="split 'test': label of example 3 is 9; expected 0 to 2"):
        build(tmp_path)
    np.savez(tmp_path / "test.npz", image=IMAGES, label=np.array([0, -1, 0, 0, 0, 0]))
    with pytest.raises(DataError, match="split 'test': label of example 1 is -1; expected 0 to 2"):
        build(tmp_path)


def test_labels_beyond_int32_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", image=IMAGES, label=np.array([0, 1, 10**10, 0, 0, 0]))
    with pytest.raises(DataError, match="label of example 2 is 10000000000; expected 0 to 2147483646"):
        build(tmp_path)


def test_splits_whose_names_have_an_underscore(tmp_path: Path) -> None:
    content = {"image": IMAGES, "label": LABELS, "wide_mask": IMAGES}
    names = ("my_train", "my_test")
    np.savez(
        tmp_path / "a.npz", **{f"{name}_{key}": value for name in names for key, value in content.items()}
    )
    source = build(tmp_path / "a.npz")
    assert source.splits == {"my_train": 6, "my_test": 6}
    assert source.spec.keys() == {"image", "label", "wide_mask"}


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    first = write_npz(tmp_path)
    before = build(first).fingerprint
    os.utime(first / "train.npz", (1, 1))
    assert build(first).fingerprint == before
    changed = IMAGES.copy()
    changed[3, 0, 0, 0] ^= 1
    np.savez(first / "train.npz", image=changed, label=LABELS)
    assert build(first).fingerprint != before
    second = write_npy(tmp_path / "npy")
    before = build(second).fingerprint
    assert build(second).fingerprint == before
    images = np.load(second / "train" / "image.npy", mmap_mode="r+")
    status = (second / "train" / "image.npy").stat()
    images[3, 0, 0, 0] ^= 1
    del images
    os.utime(second / "train" / "image.npy", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert build(second).fingerprint != before


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    def error(expected: str, folder: str, **content: np.ndarray) -> None:
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "train.npz", **content)
        with pytest.raises(DataError, match=expected) as found:
            build(tmp_path / folder)
        assert "\n" not in str(found.value)

    error("must have one or more rows, all as many", "a", image=IMAGES, label=LABELS[:5])
    error("must have one or more rows", "b", image=IMAGES[:0], label=LABELS[:0])
    error("must have one or more rows", "c", image=np.uint8(3))
    labels = r"label of split 'train' is {}; expected integers \[n\]: of one-hot labels .argmax\(axis=1\)"
    error(labels.format(r"int64\[6, 2\]"), "d", label=np.zeros((6, 2), int))
    error(labels.format(r"float32\[6, 3\]"), "g", label=np.eye(3, dtype=np.float32)[LABELS])
    error(labels.format(r"float64\[6\]"), "h", label=LABELS.astype(float))
    for dtype in ("uint16", "int64", "bool"):
        error(
            rf"image of .* is {dtype}\[6, 4, 5, 3\]; .*\.astype\(np\.uint8\)",
            dtype,
            image=IMAGES.astype(dtype),
        )
    error("is <U1; expected numbers", "e", image=IMAGES, label=np.array(list("abcdef")))
    error("two arrays for key 'image'", "f", image=IMAGES, images=IMAGES)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    np.savez(tmp_path / "train.npz", image=np.array([Trap()], dtype=object))
    with pytest.raises(DataError, match="key 'image' of .*train.npz' cannot be read: Object arrays"):
        build(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file or folder"):
        build(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no split: expected SPLIT.npz"):
        build(tmp_path)
    (tmp_path / "odd.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match="is no .npz file"):
        build(tmp_path / "odd.npz")
    np.savez(tmp_path / "odd.npz", images=IMAGES)
    with pytest.raises(DataError, match="has the key 'images'; expected SPLIT_KEY"):
        build(tmp_path / "odd.npz")
    whole = (tmp_path / "odd.npz").read_bytes()
    for content in (whole[:-30], b"hello"):
        (tmp_path / "odd.npz").write_bytes(content)
        with pytest.raises(DataError, match="is no .npz file, or it is cut off; expected one of numpy.savez"):
            build(tmp_path / "odd.npz")
    np.save(tmp_path / "image.npy", IMAGES)
    with pytest.raises(
        DataError, match="image.npy' is a single array; expected a .npz file with every split"
    ):
        build(tmp_path / "image.npy")
    folder = write_npy(tmp_path / "npy")
    file = folder / "train" / "image.npy"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match="image.npy' cannot be read"):
        build(folder)


def test_splits_that_differ(tmp_path: Path) -> None:
    write_npz(tmp_path)
    np.savez(tmp_path / "test.npz", image=IMAGES[:, :2], label=LABELS)
    with pytest.raises(DataError, match="split 'train' has .*, split 'test' has"):
        build(tmp_path)
