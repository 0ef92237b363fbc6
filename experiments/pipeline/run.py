"""How fast the data pipeline is alone, and how long training waits for it.

    python experiments/pipeline/run.py [--json=FILE] [--seconds=5] [--steps=30] [--repeats=3]

Two sets are made on the spot, so that nothing has to be there: 28 px arrays, and JPEG files of 192 to 256 px with the
smoothness of photographs. `clothing_small` is read as well where TFDS_DATA_DIR holds it. Batches are of 128.

    alone       images a second of the training stream, one setting of threads and workers after the other, --repeats
                rounds interleaved; median
    waiting     a ViT-S/16 trained for --steps steps at 192 px with RandAugment: seconds spent waiting for batches over
                seconds, without the steps up to the first record, which compile
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from tokenlab import data
from tokenlab.core import huge_pages
from tokenlab.data.loader import Prefetch
from tokenlab.train import default_config, run

BATCH = 128
SMALL = "random_crop(28, pad=2)|flip_lr|value_range(-1, 1)"
LARGE = "decode|random_resized_crop(192)|flip_lr|randaugment(2, 9)|value_range(-1, 1)"
EVAL_LARGE = "decode|resize(192)|value_range(-1, 1)"
MAKERS = {  # name: config.data settings
    "the thread that asks": {"prefetch": 0},
    "1 thread": {"prefetch": 4},
    "2 threads": {"prefetch": 4, "threads": 2},
    "2 workers": {"prefetch": 4, "workers": 2},
}


def arrays(folder: Path, rng: np.random.Generator, examples: int = 10_000) -> dict[str, Any]:
    """28 px grey pictures in an npz; returns the `config.data` that reads them."""
    for split, count in (("train", examples), ("test", 256)):
        image = rng.integers(0, 256, (count, 28, 28, 1), np.uint8)
        np.savez(folder / f"{split}.npz", image=image, label=rng.integers(0, 10, count))
    return {"name": "arrays", "path": str(folder), "transform": SMALL, "eval_transform": "value_range(-1, 1)"}


def photographs(folder: Path, rng: np.random.Generator, examples: int = 1024) -> dict[str, Any]:
    """JPEG files in folders of ten classes, blurred noise of 192 to 256 px; returns their `config.data`."""
    for split, count in (("train", examples), ("test", 64)):
        for number in range(count):
            height, width = rng.integers(192, 257, 2)
            coarse = rng.integers(0, 256, (24, 24, 3), np.uint8)
            picture = cv2.resize(coarse, (int(width), int(height)), interpolation=cv2.INTER_CUBIC)
            path = folder / split / f"class_{number % 10}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), picture, [cv2.IMWRITE_JPEG_QUALITY, 90])
    return {"name": "folder", "path": str(folder), "transform": LARGE, "eval_transform": EVAL_LARGE}


def prepared() -> dict[str, Any] | None:
    """`config.data` of the clothing photographs, where they have been prepared."""
    place = os.environ.get("TFDS_DATA_DIR")
    if not place or not (Path(place) / "clothing_small").is_dir():
        return None
    return {"name": "tfds", "dataset": "clothing_small", "transform": LARGE, "eval_transform": EVAL_LARGE}


def throughput(settings: dict[str, Any], seconds: float, *, memory: int) -> float:
    """Images a second of the training stream, from its second batch on."""
    config = {**settings, "memory": memory}
    stream = data.TrainStream(data.build(config), "train", BATCH, seed=0)
    ahead = {"depth": config["prefetch"], "threads": config.get("threads", 1)}
    with Prefetch(stream.batch, **ahead, workers=config.get("workers", 0)) as batches:
        next(batches)  # decodes what is kept, starts what has to be started
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            next(batches)
            count += 1
        return count * BATCH / (time.perf_counter() - start)


def waiting(settings: dict[str, Any], steps: int, workdir: Path, batch: int = 16) -> dict[str, float]:
    """Train a ViT-S/16 for some steps; seconds a step, and the share of them spent waiting for batches."""
    config = default_config()
    config.steps, config.batch_size, config.log_every = steps, batch, 2
    config.eval_every = config.checkpoint_every = 0
    config.model.size = "S/16"
    config.data = {**config.data.to_dict(), **settings}
    run(config, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    records = [line for line in lines if line["split"] == "train"]
    first, last = records[0], records[-1]
    spent = last["seconds"] - first["seconds"]
    return {
        "batch_size": batch,
        "step_seconds": spent / (last["step"] - first["step"]),
        "waiting": (last["data_seconds"] - first["data_seconds"]) / spent,
    }


def main() -> None:
    """Measure, print, and write the figures when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="of the ViT-S/16; 0 for none")
    options = parser.parse_args()

    records: list[dict[str, Any]] = []
    table = Table("set", "made by", "images/s")
    with tempfile.TemporaryDirectory() as place:
        rng, folder = np.random.default_rng(0), Path(place)
        (folder / "arrays").mkdir()
        jpeg = photographs(folder / "photographs", rng)
        sets = {"28 px, in memory": (arrays(folder / "arrays", rng), 1024), "192 px JPEG, made": (jpeg, 0)}
        if (clothing := prepared()) is not None:
            sets["192 px JPEG, clothing_small"] = (clothing, 0)
        rates: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.repeats):
            for name, (settings, memory) in sets.items():
                for maker, how in MAKERS.items():
                    rate = throughput({**settings, **how}, options.seconds, memory=memory)
                    rates.setdefault((name, maker), []).append(rate)
        for (name, maker), found in rates.items():
            rate = statistics.median(found)
            records.append({"set": name, "made_by": maker, "images_per_second": rate, "all": found})
            table.add_row(name, maker, f"{rate:,.0f}")
        Console().print(table)
        if options.steps:
            settings = {**(clothing or jpeg), "prefetch": 4, "memory": 0}
            found = waiting(settings, options.steps, folder / "run")
            records.append({"set": "ViT-S/16 at 192 px", **found})
            print(
                f"ViT-S/16 at 192 px, batch {found['batch_size']}: {found['step_seconds']:.2f} s a step, "
                f"{found['waiting']:.2%} of it waiting for data"
            )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    huge_pages.ensure()
    main()
