"""`tokenlab cost`: the cost table of a configuration beside the dense stack of as many blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections.config_dict import ConfigDict
from rich.console import Group, RenderableType
from rich.text import Text

from tokenlab import data, models, tasks
from tokenlab.core.config import to_dataclass
from tokenlab.cost import CostTable
from tokenlab.evaluate.roofline import Rooflines, peaks_of
from tokenlab.train import schedule
from tokenlab.train.config import TrainConfig
from tokenlab.train.costs import cost_table


@dataclass(frozen=True)
class CostReport:
    """A cost table that knows what it is compared with.

    Attributes:
      table: of the stack, per example.
      dense: of `block*L`, the dense stack of as many blocks, in a masked autoencoder that sees every patch; None for a
        model without a stack.
      title: one line: the stack, and of what.
      rooflines: of the stack on the chip that was asked for, or None.
    """

    table: CostTable
    dense: CostTable | None
    title: str
    rooflines: Rooflines | None = None

    def to_json(self) -> dict[str, Any]:
        """Rows and total, and of the dense one, if any, its total and the ratios; FLOPs and bytes are integers."""
        found = {"title": self.title, **self.table.to_json(self.dense)}
        return found if self.rooflines is None else {**found, "roofline": self.rooflines.to_json()}

    def to_rich(self, width: int | None = None) -> RenderableType:
        """For a terminal of `width` columns, see `CostTable.to_rich`; the roofline below."""
        table = self.table.to_rich(self.dense, title=self.title, width=width)
        return table if self.rooflines is None else Group(table, Text(self.rooflines.text))

    def to_markdown(self) -> str:
        """In Markdown."""
        below = "" if self.rooflines is None else f"\n```text\n{self.rooflines.text}\n```\n"
        return f"{self.title}\n\n{self.table.to_markdown(self.dense)}{below}"


def cost_report(
    config: Mapping[str, Any] | ConfigDict | TrainConfig, *, chip: str | None = None
) -> CostReport:
    """What a configuration costs per example, forward and in training, layer by layer; nothing is trained.

    Numbers in the stack that change during training (`config.stack_vars` schedules) count as in the last step, and
    those that alternate as in most steps.

    Args:
      config: of a run.
      chip: whose roofline is wanted for a batch of `config.batch_size`, see `roofline.peaks_of`; None for none.

    Raises:
      ConfigError, StackError, NameLookupError, ShapeError, DataError: what is wrong with the configuration.
      CostError: the model holds an operation of unknown cost, or no datasheet of the chip is known.
    """
    config = to_dataclass(TrainConfig, config)
    dtype = config.model.get("dtype", "float32")
    peaks = None if chip is None else peaks_of(chip, dtype)
    task, source = tasks.build(config.task), data.build(config.data)
    facts = {"spec": source.spec, "num_outputs": task.num_outputs(source)}
    values = schedule.stack_vars(config.stack_vars, config.steps).usual(config.steps - 1)
    model = models.build(config.model, stack_vars=values, **facts)
    title, beside = (
        f"{model.stack_text or config.model.get('name')}: cost of one example of {source.name}",
        None,
    )
    if model.program is not None:
        own = getattr(model, "dense_settings", {})
        dense = models.build({**config.model, **own}, stack=f"block*{model.program.depth}", **facts)
        told = "".join(f" with {key}={value}" for key, value in own.items())
        title, beside = f"{title}, beside {dense.stack_text}{told}", cost_table(dense, task, source.spec)
    rooflines, only = None, config.optimizer.only
    if peaks is not None:
        batch = cost_table(model, task, source.spec, config.batch_size, only)
        rooflines = Rooflines(batch, config.batch_size, peaks, dtype)
    return CostReport(cost_table(model, task, source.spec, only=only), beside, title, rooflines)
