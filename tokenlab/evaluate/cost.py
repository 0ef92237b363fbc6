"""`tokenlab cost`: the cost table of a configuration beside the dense stack of as many blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections.config_dict import ConfigDict
from rich.table import Table

from tokenlab import data, models, tasks
from tokenlab.core.config import to_dataclass
from tokenlab.cost import CostTable
from tokenlab.train import schedule
from tokenlab.train.config import TrainConfig
from tokenlab.train.costs import cost_table


@dataclass(frozen=True)
class CostReport:
    """A cost table that knows what it is compared with.

    Attributes:
      table: of the stack, per example.
      dense: of `block*L`, the dense stack of as many blocks.
      title: one line: the stack, and of what.
    """

    table: CostTable
    dense: CostTable
    title: str

    def to_json(self) -> dict[str, Any]:
        """Rows, total, the dense total and what each group costs of the dense one's; FLOPs and bytes are integers."""
        return {"title": self.title, **self.table.to_json(self.dense)}

    def to_rich(self, width: int | None = None) -> Table:
        """For a terminal of `width` columns, see `CostTable.to_rich`."""
        return self.table.to_rich(self.dense, title=self.title, width=width)

    def to_markdown(self) -> str:
        """In Markdown."""
        return f"{self.title}\n\n{self.table.to_markdown(self.dense)}"


def cost_report(config: Mapping[str, Any] | ConfigDict | TrainConfig) -> CostReport:
    """What a configuration costs per example, forward and in training, layer by layer; nothing is trained.

    Numbers in the stack that change during training (`config.stack_vars` schedules) count as in the last step.

    Raises:
      ConfigError, StackError, NameLookupError, ShapeError, DataError: what is wrong with the configuration.
      CostError: the model holds an operation of unknown cost.
    """
    config = to_dataclass(TrainConfig, config)
    task, source = tasks.build(config.task), data.build(config.data)
    facts = {"spec": source.spec, "num_outputs": task.num_outputs(source)}
    values = schedule.stack_vars(config.stack_vars).at(config.steps - 1)
    model = models.build(config.model, stack_vars=values, **facts)
    dense = models.build(config.model, stack=f"block*{model.program.depth}", **facts)
    title = f"{model.stack_text}: cost of one example of {source.name}, beside {dense.stack_text}"
    return CostReport(cost_table(model, task, source.spec), cost_table(dense, task, source.spec), title)
