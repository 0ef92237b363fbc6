"""The configuration of a training run, as frozen dataclasses whose ranges are checked when they are made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jax.sharding import Mesh
from ml_collections.config_dict import ConfigDict

from tokenlab.core import names
from tokenlab.core.config import from_dataclass, to_dataclass
from tokenlab.core.errors import ConfigError, NameLookupError
from tokenlab.sharding import recipes
from tokenlab.sharding.axes import SIZES
from tokenlab.sharding.mesh import make_mesh
from tokenlab.sharding.plan import ParallelPlan
from tokenlab.sharding.rules import named


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"config.{key} is {value!r}: expected {expected}.")


def _whole(key: str, value: object, least: int, what: str) -> None:
    _require(isinstance(value, int) and not isinstance(value, bool) and value >= least, key, value, what)


def _number(key: str, value: object, inside: bool, expected: str) -> None:
    _require(isinstance(value, int | float) and not isinstance(value, bool), key, value, expected)
    _require(math.isfinite(value) and inside, key, value, expected)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run (`tokenlab.train.schedule` has the equations).

    A number of steps is an int (that many steps) or a float in [0, 1) (that fraction of `config.steps`). With a clock
    that counts tokens, "steps" are dense steps: the tokens that so many steps of the dense model compute.

    Attributes:
        name: constant, linear, cosine, rsqrt or wsd.
        warmup_steps: linear warm-up from 0 to the peak, for every schedule.
        final: learning rate at the end as a fraction of the peak, in [0, 1] (linear, cosine and wsd).
        decay_steps: length of the last, falling part (wsd, None = 0.2; rsqrt, None = there is none).
        timescale: steps over which 1/sqrt falls (rsqrt only; None = `warmup_steps`).
        clock: what the learning rate follows: "steps"; "layer_tokens", the tokens that entered blocks so far, which a
            stack whose numbers change knows beforehand; "effective_tokens", their mean over blocks rounded down in each
            step, as Megatron counts. See `tokenlab.train.token_clock`.
        end: of the schedule by such a clock: so many dense steps, or that share, in (0, 1], of the dense run of
            `config.steps`; None = where this run ends.
    """

    name: str = "cosine"
    warmup_steps: int | float = 0.05
    final: float = 0.0
    decay_steps: int | float | None = None
    timescale: int | float | None = None
    clock: Literal["steps", "layer_tokens", "effective_tokens"] = "steps"
    end: int | float | None = None

    def __post_init__(self) -> None:
        for key in ("warmup_steps", "decay_steps", "timescale"):
            value = getattr(self, key)
            if value is not None:
                expected = "a count of steps >= 0 (int) or a fraction of all steps in [0, 1) (float)"
                key = f"optimizer.schedule.{key}"
                _number(key, value, value >= 0 and (isinstance(value, int) or value < 1), expected)
        clocks = ("steps", "layer_tokens", "effective_tokens")
        _require(self.clock in clocks, "optimizer.schedule.clock", self.clock, f"one of {', '.join(clocks)}")
        if self.end is not None:
            expected = "dense steps >= 1 (int) or a share of the dense run in (0, 1] (float)"
            inside = self.end >= 1 if isinstance(self.end, int) else 0 < self.end <= 1
            _number("optimizer.schedule.end", self.end, inside, expected)
            _require(self.clock != "steps", "optimizer.schedule.end", self.end, "None with clock='steps'")
        _number(
            "optimizer.schedule.final", self.final, 0 <= self.final <= 1, "a fraction of the peak in [0, 1]"
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, by its name in optax, and what is done to gradients before and to parameters after it.

    Attributes:
        name: an optax factory such as adamw, lamb, lion, sgd, adafactor.
        learning_rate: peak of the schedule, > 0.
        schedule: how the learning rate changes.
        weight_decay: decay per step as a fraction of the learning rate, >= 0, of kernels only.
        decays: path -> decay in place of `weight_decay` for every parameter under it, kernel or not, such as
            {"head/classifier/kernel": 3.0}; the longest path counts.
        only: patterns of paths such as "blocks/moma/auxiliary_*" or "head/*"; * stands for any text and nothing else
            is special. Parameters that none of them fits stay as they are, and nothing is computed or remembered for
            them. () = all are trained.
        layer_decay: the k-th of L blocks learns at `learning_rate` times this to the power of L - k (k from 0), the
            embedding at the power of L + 1, all else at the whole; in (0, 1], None = 1 (BEiT, Bao et al. 2022, arXiv
            2106.08254, for fine-tuning).
        clip: largest global gradient norm, > 0; None = not clipped.
        accumulate: microbatches per step, >= 1; it must divide `config.batch_size`.
        ema: decay in (0, 1) of the moving average of parameters that evaluation uses; None = none is kept.
        offload: what the optimizer remembers of each parameter (its moments) lies in the host's memory, and comes to
            the devices for the update only.
        options: further keyword arguments of the factory, such as {"b2": 0.95}.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    weight_decay: float = 0.05
    decays: Mapping[str, float] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    layer_decay: float | None = None
    clip: float | None = 1.0
    accumulate: int = 1
    ema: float | None = None
    offload: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _number("optimizer.learning_rate", self.learning_rate, self.learning_rate > 0, "a number > 0")
        _number("optimizer.weight_decay", self.weight_decay, self.weight_decay >= 0, "a number >= 0")
        _require(
            not isinstance(self.only, str),
            "optimizer.only",
            self.only,
            "several patterns, such as ('head/*',)",
        )
        for path, decay in self.decays.items():
            _number(f"optimizer.decays[{path!r}]", decay, decay >= 0, "a number >= 0")
        if self.layer_decay is not None:
            inside = 0 < self.layer_decay <= 1
            _number("optimizer.layer_decay", self.layer_decay, inside, "a factor in (0, 1], or None for 1")
        if self.clip is not None:
            _number("optimizer.clip", self.clip, self.clip > 0, "a norm > 0, or None for no clipping")
        _whole("optimizer.accumulate", self.accumulate, 1, "a number of microbatches >= 1")
        if self.ema is not None:
            _number(
                "optimizer.ema",
                self.ema,
                0 < self.ema < 1,
                "a decay in (0, 1), or None for no moving average",
            )


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated during and after training.

    Attributes:
        split: evaluated every `config.eval_every` steps and at the end; the best checkpoint is chosen on it.
        final_split: evaluated once, after the last step; None = not evaluated.
        batch_size: examples per evaluation step, >= 1.
        stack: stack expression to evaluate with; None = the training stack less its `train_only` items.
    """

    split: str = "validation"
    final_split: str | None = "test"
    batch_size: int = 256
    stack: str | None = None

    def __post_init__(self) -> None:
        _whole("eval.batch_size", self.batch_size, 1, "a number of examples >= 1")


@dataclass(frozen=True)
class ExpertsMeshConfig:
    """How layers of experts use the devices where attention uses them otherwise; with neither set `mesh.expert` says.

    Attributes:
        expert: devices that share the experts, the nearest ones but for `tensor`; None for 1, where `tensor` is set.
        tensor: devices that share the hidden units of every expert; None for as many as `mesh.tensor`.
    """

    expert: int | None = None
    tensor: int | None = None

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if size is not None:
                _whole(f"mesh.experts.{name}", size, 1, "a number of devices >= 1, or None")


@dataclass(frozen=True)
class MeshConfig:
    """The devices: how many along each mesh axis, and what is split over which of them.

    Attributes:
        data, fsdp, tensor, expert, sequence: devices per axis; at most one of them is -1, which stands for all devices
            that are left. Along `expert` attention splits the batch.
        experts: what layers of experts do with the same devices instead (`tokenlab.sharding.plan`); `expert` is then 1.
        rules: logical axis -> mesh axis or axes that it is split over, None for none, in place of what
            `tokenlab.sharding.rules` says: {"embed": ("fsdp", "data"), "vocab": None}.
        recipe: "" or the name of a file in configs/sharding/ that gives all of these, "fsdp" or, with its arguments,
            "folded:4,16" (`tokenlab.sharding.recipes`). The others then have their defaults, or say the same.
        unsharded: the share of the state's bytes that may lie whole on every device where some axis is there to split
            parameters, in [0, 1]; leaves below a MiB do not count.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    sequence: int = 1
    experts: ExpertsMeshConfig = field(default_factory=ExpertsMeshConfig)
    rules: Mapping[str, str | tuple[str, ...] | None] = field(default_factory=dict)
    recipe: str = ""
    unsharded: float = 0.1

    def __post_init__(self) -> None:
        if self.recipe:
            self._follow()
        _number("mesh.unsharded", self.unsharded, 0 <= self.unsharded <= 1, "a share in [0, 1]")
        sizes = self.given()
        named(self.rules)
        for name, size in sizes.items():
            _require(
                size == -1 or size >= 1, f"mesh.{name}", size, "a number of devices >= 1, or -1 for the rest"
            )
        _require(list(sizes.values()).count(-1) <= 1, "mesh", sizes, "at most one axis of -1")
        if self.folds:
            _require(
                self.expert == 1, "mesh.expert", self.expert, "1 where mesh.experts says what experts lie on"
            )

    def _follow(self) -> None:
        """Takes the values of the recipe."""
        wanted = to_dataclass(
            MeshConfig, recipes.read(self.recipe), f"configs/sharding recipe {self.recipe!r}"
        )
        for entry in dataclasses.fields(self):
            mine, theirs = getattr(self, entry.name), getattr(wanted, entry.name)
            if entry.name != "recipe" and mine != theirs:
                _require(
                    mine == getattr(MeshConfig(), entry.name),
                    f"mesh.{entry.name}",
                    mine,
                    f"its default, as config.mesh.recipe={self.recipe!r} says {theirs!r}; give one of the two",
                )
                object.__setattr__(self, entry.name, theirs)

    @property
    def folds(self) -> bool:
        """Whether layers of experts use the devices in a way of their own."""
        return self.experts != ExpertsMeshConfig()

    def given(self) -> dict[str, int]:
        """Devices per axis as they are set, -1 for the rest."""
        return {axis: getattr(self, axis) for axis in SIZES}

    def sizes(self, devices: int) -> dict[str, int]:
        """Devices per axis of the mesh of so many devices, -1 worked out where it can be; axes of size 1 left out."""
        sizes = self.given()
        rest = devices // max(1, math.prod(size for size in sizes.values() if size > 0))
        sizes = {axis: rest if size == -1 else size for axis, size in sizes.items()}
        if self.folds:
            sizes = self._plan(sizes).sizes
        return {axis: size for axis, size in sizes.items() if size != 1} or {"data": 1}

    def build(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh of these devices, by default of all. Raises ShardingError as `make_mesh`."""
        if not self.folds:
            return make_mesh(self.given(), devices, rules=self.rules)
        there = make_mesh(self.given(), devices)  # says what is wrong with the sizes, and what -1 stands for
        return self._plan(dict(there.shape)).mesh(devices, rules=self.rules)

    def _plan(self, sizes: Mapping[str, int]) -> ParallelPlan:
        return ParallelPlan(
            tp=sizes["tensor"],
            cp=sizes.get("sequence", 1),
            dp=sizes["data"] * sizes["fsdp"],
            fsdp=sizes["fsdp"],
            ep=self.experts.expert or 1,
            etp=self.experts.tensor,
        )


@dataclass(frozen=True)
class HardwareRule:
    """What a run changes on some devices: where things lie and how they are worked out, not what is learned.

    Of `TrainConfig.hardware` the first rule that fits the devices holds (`tokenlab.train.hardware`).

    Attributes:
        kind: of the devices: a name of `tokenlab.cost.hardware` ("TPU v5e"), or what jax calls them ("cpu"); * stands
            for any text.
        devices: how many there are, of all processes; None = any number.
        set: key -> value, as of --config.KEY=VALUE, for keys of `tokenlab.train.hardware.MAY_SET`.
        xla: options of the compiler for train steps: {"xla_tpu_enable_latency_hiding_scheduler": "true"}.
        step_seconds: that a train step takes there, > 0.
        basis: "measured" on such devices, or "estimated": the least time by a roofline.
        source: of `step_seconds`, as a rule the command that gave it.
    """

    kind: str
    step_seconds: float
    basis: Literal["measured", "estimated"]
    source: str
    devices: int | None = None
    set: Mapping[str, Any] = field(default_factory=dict)
    xla: Mapping[str, str | bool | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _number("hardware: step_seconds", self.step_seconds, self.step_seconds > 0, "seconds > 0")
        _require(bool(self.source.strip()), "hardware: source", self.source, "where step_seconds is from")
        if self.devices is not None:
            _whole("hardware: devices", self.devices, 1, "a number of devices >= 1, or None for any")


@dataclass(frozen=True)
class InitFrom:
    """Parameters to start from.

    Attributes:
        path: workdir of another run, or one of its checkpoints; None = a fresh initialisation.
        fresh: parameter paths ("head", "items/keep") or patterns of them ("blocks/moma/auxiliary_*", as of
            `optimizer.only`) that are initialised anew instead of loaded.
        upcycle: that run is dense and this one has experts, which begin as copies of its feed-forward layers; routers
            begin anew. See `tokenlab.models.upcycle`.
        upcycle_noise: standard deviation of noise on each copy, relative to that of the parameter; >= 0.
    """

    path: str | None = None
    fresh: tuple[str, ...] = ()
    upcycle: bool = False
    upcycle_noise: float = 0.0

    def __post_init__(self) -> None:
        given = self.path is not None
        _require(given or not self.fresh, "init_from.fresh", self.fresh, "() unless path is set")
        _require(given or not self.upcycle, "init_from.upcycle", self.upcycle, "False unless path is set")
        noise = self.upcycle_noise
        _require(noise >= 0, "init_from.upcycle_noise", noise, "a number >= 0")
        _require(self.upcycle or not noise, "init_from.upcycle_noise", noise, "0 unless upcycle is True")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `default_config()` gives it as the ConfigDict that a file in configs/ starts from.

    Attributes:
        seed: >= 0; decides initialisation, the order of examples, changes to images and every random choice.
        steps: optimizer steps, >= 1.
        batch_size: examples per step over all devices and processes, >= 1.
        log_every: steps between training records, >= 1.
        eval_every: steps between evaluations; 0 = only at the end.
        checkpoint_every: steps between checkpoints; 0 = only at the end.
        sample_every: steps between pictures of what the model samples (and one at the end); 0 = none. For runs on
            pictures and text.
        keep_checkpoints: newest checkpoints that are kept (the best one is kept besides), >= 1.
        model, task, data: what `models.build`, `tasks.build` and `data.build` read.
        stack_vars: values of the names in the stack: numbers, or schedules such as "0:1.0, 1000:0.5".
        hardware: what is other on some devices: of these rules, dicts in a file, the first that fits.
        compilation_cache: True = in the user's cache directory, False = off, or a directory. The environment
            variable JAX_COMPILATION_CACHE_DIR wins over True.
        transfer_guard: implicit transfers between host and devices inside the loop are errors.
    """

    seed: int = 0
    steps: int = 1000
    batch_size: int = 64
    log_every: int = 50
    eval_every: int = 200
    checkpoint_every: int = 200
    sample_every: int = 0
    keep_checkpoints: int = 2
    model: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    stack_vars: Mapping[str, Any] = field(default_factory=dict)
    eval: EvalConfig = field(default_factory=EvalConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    init_from: InitFrom = field(default_factory=InitFrom)
    hardware: tuple[HardwareRule, ...] = ()
    compilation_cache: bool | str = True
    transfer_guard: bool = True

    def __post_init__(self) -> None:
        _whole("seed", self.seed, 0, "an int >= 0")
        _require(self.seed < 2**32, "seed", self.seed, "an int below 2**32")
        _whole("steps", self.steps, 1, "a number of steps >= 1")
        _whole("batch_size", self.batch_size, 1, "a number of examples >= 1")
        _whole("log_every", self.log_every, 1, "a number of steps >= 1")
        _whole("sample_every", self.sample_every, 0, "a number of steps >= 1, or 0 for none")
        _whole("eval_every", self.eval_every, 0, "a number of steps >= 1, or 0 for only at the end")
        _whole(
            "checkpoint_every", self.checkpoint_every, 0, "a number of steps >= 1, or 0 for only at the end"
        )
        _whole("keep_checkpoints", self.keep_checkpoints, 1, "a number of checkpoints >= 1")
        _require(
            self.batch_size % self.optimizer.accumulate == 0,
            "optimizer.accumulate",
            self.optimizer.accumulate,
            f"a divisor of config.batch_size={self.batch_size}",
        )


def default_config(model: str = "vit", task: str = "classify", data: str = "digits") -> ConfigDict:
    """Every field of a run with a default: what a file in configs/ starts from.

    A ViT on the digits, trained with AdamW, unless other names are given. `config.model`, `config.task` and
    `config.data` hold the settings of what their `name` says and are open: another name may bring keys of its own.

    Args:
        model, task, data: names of a model, a task and a source whose settings all have defaults.
    """
    return from_dataclass(
        TrainConfig(
            model={"name": model, **_settings("tokenlab.models", model, "Config")},
            task={"name": task, **_settings("tokenlab.tasks", task, "Config")},
            data={**_settings("tokenlab.data.sources", data, "Config"), "name": data},
        )
    )


def _settings(package: str, name: str, declares: str) -> dict[str, Any]:
    """The defaults of the settings that a model, task or source declares."""
    return dataclasses.asdict(names.find_attr(package, name, declares)())


def completed(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """A configuration with the defaults of the keys it lacks: one written before a key was there equals today's.

    Args:
        config: of a run; what it lacks are keys of `TrainConfig`, or of its model, task and source. Keys without a
            default, and groups whose name is not known, stay as they are.
    """
    found = dict(config)
    for key, package in (("model", "models"), ("task", "tasks"), ("data", "data.sources")):
        group = found.get(key)
        if isinstance(group, Mapping | ConfigDict) and isinstance(group.get("name"), str):
            try:
                settings = names.find_attr(f"tokenlab.{package}", group["name"], "Config")
            except NameLookupError:
                continue
            found[key] = _filled(group, settings)
    return _filled(found, TrainConfig)


def _filled(given: Mapping[str, Any] | ConfigDict, settings: Any) -> dict[str, Any]:
    """`given` with the defaults that a dataclass has for what it lacks, groups in groups included."""
    found = dict(given)
    for entry in dataclasses.fields(settings):
        if entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
        elif entry.default is not dataclasses.MISSING:
            default = entry.default
        else:
            continue
        if not dataclasses.is_dataclass(default):
            found.setdefault(entry.name, default)
        elif entry.name not in found:
            found[entry.name] = dataclasses.asdict(default)
        elif isinstance(found[entry.name], Mapping | ConfigDict):
            found[entry.name] = _filled(found[entry.name], type(default))
    return found
