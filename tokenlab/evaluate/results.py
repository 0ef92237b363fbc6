"""What evaluation finds: metrics over a whole split, calibration, each class, probes, costs; one result a stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from tokenlab import tasks
from tokenlab.core.errors import ConfigError
from tokenlab.evaluate import codes, metrics, predictions, probe
from tokenlab.evaluate.predictions import Predictions
from tokenlab.evaluate.trained import Trained
from tokenlab.train.costs import forward_cost
from tokenlab.train.evaluation import Evaluator

TRAIN = "train"
"""The split that probes learn from."""


@dataclass(frozen=True, eq=False)
class Measured:
    """A stack's result and what it was found from.

    Attributes:
      result: JSON values, see `measure`.
      predictions: of every example of the split.
      confusion: int64 [C, C], true class by predicted class; None where the task does not classify.
      calibration: None where the task does not classify.
    """

    result: dict[str, Any]
    predictions: Predictions
    confusion: np.ndarray | None = None
    calibration: metrics.Calibration | None = None


def measure(trained: Trained, split: str, probes: Sequence[str] = ()) -> dict[str, Any]:
    """Metrics of a trained model over a whole split, each example counted once, and what an example costs.

    Args:
      trained: from `load`.
      split: of its data.
      probes: names of `probe.PROBES` to run on the features.

    Returns:
      "split", the task's metrics ("loss", "accuracy", "top5_accuracy"), "stack", "flops_per_example" (counted,
      forward), "images_per_second", or of what else an example is (measured, see `Predictions`), "tokens_per_example"
      (after embedding), "tokens_out" (at the head), "examples", "parameters" and "checkpoint_step"; of a model without
      a stack neither "stack" nor "tokens_out". Of a tokenizer of pictures also "codes" (how many there are),
      "codes_used" and "code_perplexity", of the whole split. For a task that classifies also "ece", "calibration"
      {"ece", "nll", "brier", "bins"}, "per_class" (a row a class) and "most_confused"; with probes "probe", {name: its
      result}.

    Raises:
      DataError: there is no such split, or its records are not what the source says.
      ConfigError: probes of data that has no labels, no train split, or of the train split itself.
      ShardingError: config.mesh does not fit the devices.
      NonFiniteError: the model gives logits that are not finite.
    """
    return measure_each([trained], split, probes)[0].result


def measure_each(trained: Sequence[Trained], split: str, probes: Sequence[str] = ()) -> list[Measured]:
    """`measure` for several stacks on the same weights and data, which is read once; from `load_each`."""
    first = trained[0]
    check_probes(first, split, probes)
    mesh = first.config.mesh.build()
    evaluators = [Evaluator(each.model, each.task, mesh) for each in trained]
    # Padding counts nothing, so the batch may be larger than asked for: as many rows on every device.
    shards = evaluators[0].shards
    rows = -(-first.config.eval.batch_size // shards) * shards
    params = predictions.put(evaluators, [each.params for each in trained])
    found = predictions.predict(evaluators, params, first.source, split, rows, features=bool(probes))
    measured = [_measured(each, said, split) for each, said in zip(trained, found, strict=True)]
    for each, stack in zip(measured, trained, strict=True):
        if codes.gives_codes(stack):
            found = codes.Coder(stack)(split)
            each.result.update(codes.used([found.codes], stack.model.codes_count))
    if probes:
        learned = predictions.predict(evaluators, params, first.source, TRAIN, rows)
        for each, train in zip(measured, learned, strict=True):
            each.result["probe"] = _probe(train, each.predictions, first.source.num_classes, probes)
    return measured


def classifies(trained: Trained) -> bool:
    """Whether the logits of the model are of the classes of the data."""
    return getattr(trained.task, "classifies", False) and _has_labels(trained.source)


def check_classifies(trained: Trained, what: str) -> None:
    """Raise a ConfigError when `what` is asked of a task that does not classify."""
    if not classifies(trained):
        raise ConfigError(
            f"{what} needs a task that classifies and data with labels; task "
            f"{trained.config.task.get('name', 'classify')!r} on data {trained.source.name!r} is none: leave it out."
        )


def check_probes(trained: Trained, split: str, probes: Sequence[str]) -> None:
    """Raise a ConfigError when there is nothing to learn a probe from."""
    if not probes:
        return
    source = trained.source
    asked = f"--probe={','.join(probes)}"
    if not _has_labels(source):
        raise ConfigError(f"{asked} needs data with labels; {source.name!r} has {', '.join(source.spec)}.")
    if TRAIN not in source.splits:
        raise ConfigError(
            f"{asked} learns from split {TRAIN!r}; {source.name!r} has {', '.join(source.splits)}."
        )
    if split == TRAIN:
        raise ConfigError(f"{asked} learns from split {TRAIN!r}: expected another one for --split.")


def class_names(source: Any) -> tuple[str, ...] | None:
    """Names of the classes, where the data has them."""
    names = getattr(source, "class_names", None)
    return tuple(map(str, names)) if names else None


def _has_labels(source: Any) -> bool:
    return "label" in source.spec and bool(source.num_classes)


def _measured(trained: Trained, said: Predictions, split: str) -> Measured:
    program = trained.model.program
    result = {
        "split": split,
        **said.metrics,
        **({"stack": trained.model.stack_text} if program is not None else {}),
        "flops_per_example": forward_cost(trained.model, trained.task, trained.source.spec).model_flops,
        f"{tasks.examples_of(trained.task, trained.source)}_per_second": said.examples_per_second,
        "tokens_per_example": trained.model.tokens_per_example,
        **({"tokens_out": program.after} if program is not None else {}),
        "examples": len(said),
        **({"examples_left_out": said.skipped} if said.skipped else {}),
        "parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(trained.params)),
        "checkpoint_step": trained.step,
    }
    if not classifies(trained):
        return Measured(result, said)
    logits, labels = said.logits, said.labels
    calibration = metrics.calibration(logits, labels)
    confusion = metrics.confusion_matrix(logits.argmax(axis=1), labels, logits.shape[1])
    result["ece"] = calibration.ece
    result["calibration"] = {
        "ece": calibration.ece,
        "nll": metrics.negative_log_likelihood(logits, labels),
        "brier": metrics.brier_score(logits, labels),
        "bins": [asdict(each) for each in calibration.bins],
    }
    result["per_class"] = metrics.per_class(confusion, class_names(trained.source))
    result["most_confused"] = metrics.most_confused(confusion)
    return Measured(result, said, confusion, calibration)


def _probe(train: Predictions, test: Predictions, classes: int, probes: Sequence[str]) -> dict[str, Any]:
    if train.features is None or test.features is None:
        raise ConfigError("probes read the features of the model, which this task does not compute.")
    data = (train.features, train.labels, test.features, test.labels, classes)
    return {name: {**probe.PROBES[name](*data), "train_examples": len(train)} for name in probes}
