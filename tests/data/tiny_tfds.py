"""Makes tiny prepared TFDS sets without TensorFlow and without TFDS, for tests on a bare clone.

The protobuf bytes are written by hand here, from the wire format, so that they do not share code with what reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

CLASSES = ("cat", "dog", "owl")


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # a negative int64 is written as its two's complement
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(features: Mapping[str, bytes | int | Sequence[float] | np.ndarray]) -> bytes:
    """A tf.train.Example: bytes as a bytes_list, integers (an int or an integer array) and floats as their lists."""
    entries = b""
    for key, value in features.items():
        if isinstance(value, bytes):
            feature = field(1, field(1, value))
        else:
            array = np.asarray(value)
            if array.dtype.kind == "f":
                feature = field(2, field(1, array.astype("<f4").tobytes()))
            else:
                feature = field(3, field(1, b"".join(varint(int(each)) for each in array.reshape(-1))))
        entries += field(1, field(1, key.encode()) + field(2, feature))
    return field(1, entries)


def png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 1|3] (red first) as PNG bytes."""
    ordered = image[..., ::-1] if image.shape[-1] == 3 else image
    return cv2.imencode(".png", np.ascontiguousarray(ordered))[1].tobytes()


def pictures(count: int, size: tuple[int, int, int] = (6, 5, 3), seed: int = 0) -> np.ndarray:
    """Random pictures, uint8 [count, *size]."""
    return np.random.default_rng(seed).integers(0, 256, (count, *size), dtype=np.uint8)


def make(
    folder: Path,
    *,
    name: str = "tiny",
    version: str = "1.0.0",
    images: Mapping[str, Sequence[np.ndarray]] | None = None,
    labels: Mapping[str, Sequence[int]] | None = None,
    splits: Mapping[str, int] | None = None,
    classes: Sequence[str] = CLASSES,
    shards: int = 1,
    corrupt: Mapping[str, Mapping[int, Literal["picture", "record"]]] | None = None,
    features: Mapping[str, Any] | None = None,
    extra: Mapping[str, Sequence[Any]] | None = None,
    info: Mapping[str, Any] | None = None,
) -> Path:
    """Write a prepared set to `folder`/`name`/`version`.

    Args:
      folder: the data directory.
      name: of the set; "name/config" for one with configs (give "configName" in `info`).
      images: by split, uint8 [H, W, 1|3] each; None for random ones of 6 x 5 x 3, as many as `splits` says.
      labels: by split; None for 0, 1, 2, 0, 1, ...
      splits: counts, {"train": 9, "test": 6} by default; of `images` where they are given.
      classes: names of the classes.
      shards: files a split.
      corrupt: by split and record: "picture" stores bytes that are no picture, "record" bytes that are no Example.
      features: further features for features.json.
      extra: their values, by feature, for the records of every split, as long as the longest.
      info: entries that replace those of dataset_info.json.

    Returns:
      The folder of the version.
    """
    if images is None:
        counts = splits or {"train": 9, "test": 6}
        images = {split: pictures(count, seed=i) for i, (split, count) in enumerate(counts.items())}
    target = Path(folder) / name / version
    target.mkdir(parents=True)
    stem = name.partition("/")[0]
    described = []
    for split, values in images.items():
        records = []
        for i, image in enumerate(values):
            wrong = (corrupt or {}).get(split, {}).get(i)
            label = labels[split][i] if labels else i % len(classes)
            content = b"this is no picture" if wrong == "picture" else png(image)
            more = {key: column[i] for key, column in (extra or {}).items()}
            record = example({"image": content, "label": label, **more})
            records.append(b"\xff" * 12 if wrong == "record" else record)
        parts = [part.tolist() for part in np.array_split(np.arange(len(records)), shards)]
        for number, part in enumerate(parts):
            file = target / f"{stem}-{split}.array_record-{number:05}-of-{shards:05}"
            writer = ArrayRecordWriter(str(file), "group_size:1")
            for i in part:
                writer.write(records[i])
            writer.close()
        described.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(sum(map(len, records))),
                "shardLengths": [str(len(part)) for part in parts],
            }
        )
    first = next(iter(images.values()))[0]
    same = len({np.shape(image) for values in images.values() for image in values}) == 1
    sizes = first.shape if same else (-1, -1, first.shape[-1])
    root = "tensorflow_datasets.core.features"
    described_features = {
        "image": {
            "pythonClassName": f"{root}.image_feature.Image",
            "image": {"dtype": "uint8", "shape": {"dimensions": [str(size) for size in sizes]}},
        },
        "label": {
            "pythonClassName": f"{root}.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": str(len(classes))},
        },
        **(features or {}),
    }
    written = {"featuresDict": {"features": described_features}}
    (target / "features.json").write_text(json.dumps(written))
    (target / "label.labels.txt").write_text("\n".join(classes) + "\n")
    about = {"name": stem, "version": version, "fileFormat": "array_record", "splits": described}
    (target / "dataset_info.json").write_text(json.dumps({**about, **(info or {})}))
    return target


def tensor(dtype: str, *sizes: int) -> dict[str, Any]:
    """A tensor feature of features.json."""
    content = {"dtype": dtype, "shape": {"dimensions": [str(size) for size in sizes]}, "encoding": "none"}
    return {"pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor", "tensor": content}
