"""Evaluate trained weights over a split, with the stack they were trained in or with another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tokenlab import data, models, tasks
from tokenlab.core.errors import CheckpointError
from tokenlab.cost import pretty
from tokenlab.evaluate import settings
from tokenlab.models.state import fill, fit_state
from tokenlab.sharding.mesh import make_mesh
from tokenlab.train import compilation
from tokenlab.train.costs import forward_cost
from tokenlab.train.evaluation import Evaluator
from tokenlab.train.initialize import evaluation_params
from tokenlab.train.manifest import Which
from tokenlab.train.records import write_json


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model, ready to be evaluated.

    Attributes:
      config: of its run, with what was overridden.
      model: without `train_only` items.
      params: nested dicts of numpy arrays, the moving average where the run keeps one.
      task: of the run.
      source: of the data.
      step: steps of training behind the parameters.
      notes: what is to be told, one line each.
    """

    config: settings.TrainConfig
    model: Any
    params: Any
    task: Any
    source: data.Source
    step: int
    notes: tuple[str, ...]


def load(
    workdir: str | Path, overrides: Mapping[str, Any] | None = None, checkpoint: Which = "latest"
) -> Trained:
    """The trained model of a workdir, which may be of a run still under way; nothing there is changed.

    Args:
      workdir: of a training run.
      overrides: dotted key -> text or value; see `settings.MAY_CHANGE`.
      checkpoint: "latest", "best" or a step.

    Raises:
      ConfigError, StackError, NameLookupError, ShapeError: settings that make no sense at evaluation, or do not fit.
      CheckpointError: no such checkpoint, a damaged one, or one whose parameters do not fit the stack.
    """
    workdir = Path(workdir)
    chosen = settings.read(workdir, overrides or {})
    config = chosen.config
    task, source = tasks.build(config.task), data.build(config.data)
    if not (workdir / "checkpoints").is_dir():
        raise CheckpointError(f"{workdir} holds no checkpoints yet: train it first, or give another workdir.")
    params, meta = evaluation_params(workdir, checkpoint)
    model = models.build(
        config.model,
        spec=source.spec,
        num_outputs=task.num_outputs(source),
        stack=chosen.stack,
        stack_vars=chosen.stack_vars(meta["step"]),
        train=False,
    )
    wanted = model.abstract_state()
    leaves, notes = fit_state(params, wanted, source=f"checkpoint {meta['step']} of {workdir}")
    return Trained(config, model, fill(wanted, leaves), task, source, meta["step"], tuple(notes))


def measure(trained: Trained, split: str) -> dict[str, Any]:
    """Metrics of a trained model over a whole split, each example counted once, and what an example costs.

    Args:
      trained: from `load`.
      split: of its data.

    Returns:
      "split", the task's metrics ("loss", "accuracy"), "stack", "flops_per_example" (counted, forward),
      "tokens_per_example" (after embedding), "examples", "parameters" and "checkpoint_step".

    Raises:
      DataError: there is no such split, or its records are not what the source says.
      ShardingError: config.mesh does not fit the devices.
    """
    records = trained.source.split(split)
    mesh = {axis: getattr(trained.config.mesh, axis) for axis in ("data", "fsdp", "tensor", "expert")}
    evaluator = Evaluator(trained.model, trained.task, make_mesh(mesh))
    # Padding counts nothing, so the batch may be larger than asked for: as many rows on every device.
    rows = -(-trained.config.eval.batch_size // evaluator.shards) * evaluator.shards
    metrics = evaluator(evaluator.put(trained.params), trained.source, split, rows)
    return {
        "split": split,
        **metrics,
        "stack": trained.model.stack_text,
        "flops_per_example": forward_cost(trained.model, trained.task, trained.source.spec).model_flops,
        "tokens_per_example": trained.model.tokens_per_example,
        "examples": len(records),
        "parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(trained.params)),
        "checkpoint_step": trained.step,
    }


def run(
    workdir: str | Path,
    overrides: Mapping[str, Any] | None = None,
    split: str = "test",
    json: str | Path | None = None,
    pictures: bool = True,
    checkpoint: Which = "latest",
) -> dict[str, Any]:
    """`tokenlab evaluate`: evaluate, print a table, write what is asked for.

    Args:
      workdir: of a training run.
      overrides: dotted key -> text or value; see `settings.MAY_CHANGE`. `model.stack` and `eval.stack` both mean the
        stack to evaluate with; by default it is the one that the run evaluates with.
      split: of the data.
      json: file for the result; replaced as a whole or not at all.
      pictures: also draw report.png and, for a stack that reduces tokens, tokens.png in the workdir.
      checkpoint: "latest", "best" or a step.

    Returns:
      What `measure` returns, which is what the JSON file holds.

    Raises:
      TokenLabError: see `load` and `measure`; nothing was written then.
    """
    trained = load(workdir, overrides, checkpoint)
    if split not in trained.source.splits:
        trained.source.split(split)  # raises, with the nearest name
    compilation.use_cache(trained.config.compilation_cache)
    result = measure(trained, split)
    if jax.process_index() > 0:
        return result
    console = Console()
    for note in trained.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    console.print(table(result))
    if json is not None:
        write_json(json, result)
    if pictures:
        for path in draw(trained, Path(workdir), split):
            console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    return result


def draw(trained: Trained, workdir: Path, split: str) -> list[Path]:
    """Draw report.png and, for a stack that reduces tokens, tokens.png; returns what was written."""
    from tokenlab.evaluate import figures, tokens_picture  # here, as importing matplotlib takes a second

    written = [figures.report(workdir, workdir / "report.png")]
    batch = tokens_picture.examples(trained.source, split)
    found = tokens_picture.section(trained.model, trained.params, batch, title=trained.model.stack_text)
    if found.columns:
        written.append(tokens_picture.save(workdir / "tokens.png", batch, [found]))
    return written


def table(result: Mapping[str, Any]) -> Table:
    """The result of `measure` for a terminal."""
    found = Table(box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    found.add_column(style="bold")
    found.add_column(overflow="fold")
    costs = ("flops_per_example", "parameters")
    for name, value in result.items():
        if isinstance(value, float):
            text = f"{value:.4f}"
        else:
            text = pretty(value) if name in costs else str(value)
        found.add_row(name.replace("_", " "), text)
    return found
