from __future__ import annotations

import json
import os
import pickle
import re
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.data import tiny_tfds
from tokenlab import data
from tokenlab.core.errors import ConfigError, DataError
from tokenlab.data import prepared
from tokenlab.data.source import FileError, Source
from tokenlab.data.sources import tfds

REAL = os.environ.get("TFDS_DATA_DIR", "")
needs_real_sets = pytest.mark.skipif(
    not (Path(REAL) / "fashion_mnist").is_dir(), reason="TFDS_DATA_DIR names no folder with fashion_mnist"
)


def build(folder: Path, dataset: str = "tiny", **options: str) -> tfds.TfdsSource:
    return tfds.build(tfds.Config(dataset=dataset, data_dir=str(folder), **options))


def decode(content: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("shards", [1, 4])
def test_records_are_what_was_written(tmp_path: Path, shards: int) -> None:
    images = {"train": tiny_tfds.pictures(10), "test": tiny_tfds.pictures(5, seed=1)}
    tiny_tfds.make(tmp_path, images=images, shards=shards)
    source = build(tmp_path)
    assert isinstance(source, Source)
    assert source.splits == {"train": 10, "test": 5}
    assert source.spec == {"image": ((6, 5, 3), "encoded"), "label": ((), "int32")}
    assert (source.name, source.num_classes, source.class_names) == ("tiny", 3, tiny_tfds.CLASSES)
    for split, expected in images.items():
        records = source.split(split)
        assert len(records) == len(expected)
        indices = np.random.default_rng(0).permutation(len(expected)).repeat(2)
        batch = records.batch(indices)
        assert isinstance(batch["image"], list) and batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["label"], indices % 3)
        for index, content in zip(indices, batch["image"], strict=True):
            np.testing.assert_array_equal(decode(content), expected[index])
            record = records[int(index)]
            assert record["image"] == content and record["label"] == index % 3
    with pytest.raises(IndexError):
        source.split("test")[5]


def test_sizes_that_differ_are_none(tmp_path: Path) -> None:
    images = [tiny_tfds.pictures(1, size)[0] for size in ((4, 5, 3), (6, 5, 3))]
    tiny_tfds.make(tmp_path, images={"train": images})
    assert build(tmp_path).spec["image"] == ((None, None, 3), "encoded")


def test_numbers_are_kept_and_texts_left_out(tmp_path: Path) -> None:
    box = np.arange(36, dtype=np.float32).reshape(9, 2, 2) / 7
    extra = {"box": list(box), "age": list(range(-4, 5)), "id": [b"x"] * 9}
    features = {
        "box": tiny_tfds.tensor("float32", 2, 2),
        "age": tiny_tfds.tensor("int64"),
        "id": {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}},
    }
    tiny_tfds.make(tmp_path, splits={"train": 9}, features=features, extra=extra)
    source = build(tmp_path)
    assert source.spec == {
        "image": ((6, 5, 3), "encoded"),
        "label": ((), "int32"),
        "box": ((2, 2), "float32"),
        "age": ((), "int64"),
    }
    batch = source.split("train").batch(np.array([8, 0, 3]))
    np.testing.assert_array_equal(batch["box"], box[[8, 0, 3]])
    np.testing.assert_array_equal(batch["age"], [4, -4, -1])
    record = source.split("train")[1]
    np.testing.assert_array_equal(record["box"], box[1])
    assert record["age"] == -3 and record["age"].dtype == np.int64


def test_the_newest_version_or_the_one_asked_for(tmp_path: Path) -> None:
    for version, count in (("1.9.0", 3), ("1.10.0", 4), ("1.2.0", 5)):
        tiny_tfds.make(tmp_path, version=version, splits={"train": count})
    assert build(tmp_path).splits == {"train": 4}
    assert build(tmp_path, "tiny:1.2.0").splits == {"train": 5}
    with pytest.raises(DataError, match=r"no version '1.2.1'.*Did you mean '1.2.0'"):
        build(tmp_path, "tiny:1.2.1")


def test_a_folder_serves_for_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_tfds.make(tmp_path)
    expected = build(tmp_path).fingerprint
    for given in (folder, folder.parent):
        assert tfds.build(tfds.Config(dataset=str(given))).fingerprint == expected
    monkeypatch.setenv(prepared.DATA_DIR_VARIABLE, str(tmp_path))
    assert tfds.build(tfds.Config(dataset="tiny")).fingerprint == expected
    monkeypatch.chdir(tmp_path)
    assert tfds.build(tfds.Config(dataset="./tiny")).fingerprint == expected


def test_configs_of_a_set(tmp_path: Path) -> None:
    tiny_tfds.make(tmp_path, name="tiny/small", info={"configName": "small"}, splits={"a": 3})
    assert prepared.find("tiny", str(tmp_path)).name == "tiny/small"
    tiny_tfds.make(tmp_path, name="tiny/large", info={"configName": "large"}, splits={"a": 4})
    assert prepared.find("tiny/large", str(tmp_path)).counts() == {"a": 4}
    with pytest.raises(DataError, match="several configs: expected one of tiny/large, tiny/small"):
        prepared.find("tiny", str(tmp_path))
    assert [name for name, _ in prepared.scan(str(tmp_path))] == ["tiny/large", "tiny/small"]


def test_missing_sets(tmp_path: Path) -> None:
    tiny_tfds.make(tmp_path, name="fashion_mnist")
    with pytest.raises(DataError) as error:
        build(tmp_path, "fashon_mnist")
    assert "Did you mean 'fashion_mnist'? With a network, `tokenlab data prepare" in one_line(error)
    with pytest.raises(DataError, match="does not exist: set config.data.data_dir or .* TFDS_DATA_DIR"):
        build(tmp_path / "nowhere", "fashion_mnist")
    with pytest.raises(DataError, match="there is no folder"):
        build(tmp_path, str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no prepared TFDS set"):
        build(tmp_path, "empty")
    with pytest.raises(ConfigError, match=r"config\.data\.dataset is missing"):
        data.resolve({"name": "tfds"})


def test_other_formats_say_how_to_convert(tmp_path: Path) -> None:
    tiny_tfds.make(tmp_path, info={"fileFormat": "tfrecord"})
    with pytest.raises(
        DataError, match="are tfrecord files; expected array_record.*tfds convert_format --dataset_v"
    ):
        build(tmp_path)
    both = {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    tiny_tfds.make(tmp_path, name="both", info=both)
    assert len(build(tmp_path, "both").split("train")[0]["image"])


def test_no_picture(tmp_path: Path) -> None:
    folder = tiny_tfds.make(tmp_path)
    text = {"featuresDict": {"features": {"text": {"pythonClassName": "a.Text", "text": {}}}}}
    (folder / "features.json").write_text(json.dumps(text))
    with pytest.raises(DataError, match=r"'tiny' 1.0.0 holds no picture; its features: text \(text\)\.$"):
        build(tmp_path)


def test_several_labels(tmp_path: Path) -> None:
    coarse = {"pythonClassName": "a.ClassLabel", "classLabel": {"numClasses": "2"}}
    make = {"splits": {"train": 4}, "features": {"coarse": coarse}, "extra": {"coarse": [0, 1, 1, 0]}}
    tiny_tfds.make(tmp_path, **make)
    with pytest.raises(
        DataError, match="several features of kind label: label, coarse; set config.data.label_key"
    ):
        build(tmp_path)
    with pytest.raises(DataError, match="has no label 'coars'. Did you mean 'coarse'"):
        build(tmp_path, label_key="coars")
    fine = build(tmp_path, label_key="label")
    assert fine.split("train").batch(np.arange(4))["coarse"].tolist() == [0, 1, 1, 0]
    # The other label stands under its own name, which is taken here.
    with pytest.raises(DataError, match="feature 'label' has the name"):
        build(tmp_path, label_key="coarse")
    keys = {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}}
    tiny_tfds.make(tmp_path, name="says", info={"supervisedKeys": keys}, **make)
    said = build(tmp_path, "says")
    assert said.num_classes == 3 and said.spec["coarse"] == ((), "int32")


def test_the_fingerprint_tells_sets_apart(tmp_path: Path) -> None:
    for name, options in {
        "a": {},
        "b": {"splits": {"train": 9, "test": 7}},
        "c": {"classes": ("cat", "dog", "fox")},
        "d": {"version": "1.0.1"},
    }.items():
        tiny_tfds.make(tmp_path / name, **options)
    found = [build(tmp_path / name).fingerprint for name in "abcd"]
    assert len(set(found)) == 4
    assert build(tmp_path / "a").fingerprint == found[0]


def test_records_are_pickled_by_path(tmp_path: Path) -> None:
    tiny_tfds.make(tmp_path, shards=2)
    records = build(tmp_path).split("train")
    before = records.batch(np.arange(9))
    content = pickle.dumps(records)
    assert len(content) < 2000 and before["image"][0] not in content
    again = pickle.loads(content).batch(np.arange(9))
    assert again["image"] == before["image"]


def test_threads_share_records(tmp_path: Path) -> None:
    tiny_tfds.make(tmp_path, shards=3)
    records = build(tmp_path).split("train")
    expected = pickle.loads(pickle.dumps(records)).batch(np.arange(9))["image"]
    found: list[list[bytes]] = []
    threads = [
        threading.Thread(target=lambda: found.append(records.batch(np.arange(9))["image"])) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 6


def test_a_record_that_is_no_example_is_named(tmp_path: Path) -> None:
    tiny_tfds.make(tmp_path, shards=2, corrupt={"train": {7: "record"}})
    records = build(tmp_path).split("train")
    expected = (
        r"'tiny', split 'train': record 7 \(file 'tiny-train.array_record-00001-of-00002'\): .* no tf.train"
    )
    with pytest.raises(DataError, match=expected):
        records[7]
    with pytest.raises(DataError, match=expected):
        records.batch(np.array([1, 7, 8]))
    assert len(records.batch(np.array([0, 1, 6, 8]))["image"]) == 4


def test_a_feature_that_is_missing_in_a_record_is_named(tmp_path: Path) -> None:
    tiny_tfds.make(tmp_path, features={"age": tiny_tfds.tensor("int64")})
    with pytest.raises(DataError, match=r"record 2 .*feature 'age' has 0 values \(int64_list\); expected 1"):
        build(tmp_path).split("train")[2]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    # Random pictures do not compress, so that a damaged byte lies in one record.
    images = {"train": tiny_tfds.pictures(40, (64, 64, 3))}
    folder = tiny_tfds.make(tmp_path, images=images)
    file = next(folder.glob("*train*"))
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 50] = bytes(50)
    file.write_bytes(content)
    records = build(tmp_path).split("train")
    failed = []
    for index in range(40):
        try:
            records[index]
        except DataError as error:
            failed.append((index, str(error)))
    assert 1 <= len(failed) <= 10, failed
    index, text = failed[0]
    assert f"record {index} (file '{file.name}')" in text and "\n" not in text
    with pytest.raises(DataError, match=re.escape(f"record {index} (file")):
        records.batch(np.arange(40))
    file.write_bytes(content[:middle])
    with pytest.raises(DataError) as error:
        build(tmp_path).split("train")[0]
    assert f"split 'train': file '{file.name}': it is cut off" in one_line(error)
    assert isinstance(error.value, FileError)
    records = build(tmp_path).split("train")
    file.unlink()
    with pytest.raises(FileError) as error:
        records[3]
    assert f"file '{file.name}': it is missing; expected 40" in one_line(error)
    with pytest.raises(DataError) as error:
        build(tmp_path)
    assert f"files are missing, the first '{file.name}'; prepare the set anew" in one_line(error)


def test_broken_descriptions(tmp_path: Path) -> None:
    folder = tiny_tfds.make(tmp_path)
    (folder / "label.labels.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match="names 2 classes; features.json says that 'label' has 3"):
        build(tmp_path)
    (folder / "features.json").write_text("{")
    with pytest.raises(DataError, match="features.json' cannot be read"):
        build(tmp_path)
    (folder / "features.json").unlink()
    with pytest.raises(DataError, match="features.json' is missing"):
        build(tmp_path)
    (folder / "dataset_info.json").write_text('{"splits": [{"name": "train", "shardLengths": ["x"]}]}')
    (folder / "features.json").write_text("{}")
    with pytest.raises(DataError, match="is not as TFDS writes it"):
        build(tmp_path)


@needs_real_sets
def test_fashion_mnist() -> None:
    source = tfds.build(tfds.Config(dataset="fashion_mnist"))
    assert source.splits == {"train": 60000, "test": 10000}
    assert source.class_names is not None and source.class_names[9] == "Ankle boot"
    labels = source.split("test").batch(np.arange(10000))["label"]
    np.testing.assert_array_equal(np.bincount(labels), [1000] * 10)


@needs_real_sets
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what TFDS warns of is not ours
def test_the_same_records_as_tfds_gives() -> None:
    import tensorflow_datasets

    source = tfds.build(tfds.Config(dataset="fashion_mnist")).split("test")
    other = tensorflow_datasets.data_source("fashion_mnist", split="test", data_dir=REAL)
    for index in (0, 1, 4321, 9999):
        ours, theirs = source[index], other[index]
        assert ours["label"] == theirs["label"]
        decoded = cv2.imdecode(np.frombuffer(ours["image"], np.uint8), cv2.IMREAD_GRAYSCALE)
        np.testing.assert_array_equal(decoded, theirs["image"][..., 0])
