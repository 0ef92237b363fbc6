"""The training loop: one for every model, task and data source.

What a step does is in `step.py`; here steps follow each other, and at some of them a record is written, the model is
evaluated or the state is saved. Between those the host only hands out work: it fetches nothing, and it runs at most
`AHEAD` steps before the devices.

A run that was stopped, by a signal or by a crash, goes on from its last whole checkpoint and repeats bit for bit what
an uninterrupted run does: batches and random keys are functions of the step, and the sums of the next record are part
of the state.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections.config_dict import ConfigDict

from tokenlab import tasks
from tokenlab.core.errors import ConfigError
from tokenlab.sharding import agree, watch
from tokenlab.train import compilation, initialize, places
from tokenlab.train import experiment as experiments
from tokenlab.train import mirror as mirrors
from tokenlab.train.checkpoint import Checkpoints
from tokenlab.train.evaluation import means
from tokenlab.train.experiment import TRAIN_SPLIT, Experiment
from tokenlab.train.interrupt import Interrupt
from tokenlab.train.profile import Profiler, window
from tokenlab.train.progress import Progress
from tokenlab.train.records import Workdir
from tokenlab.train.state import TrainState, check_health, evaluation_params
from tokenlab.train.step import Report
from tokenlab.train.stopwatch import Stopwatch

Sampler = Callable[[Any, int], str]
"""Draws what a model samples: of weights (`evaluation_params` of the train state) and steps done; returns a line."""

AHEAD = 4
"""Steps the host may run before the devices: enough to keep them busy, and few enough that their batches are no burden
and that a signal is answered soon."""


def run(
    config: ConfigDict,
    workdir: str | Path,
    *,
    experiment: experiments.Experiment | None = None,
    profile: bool = False,
    sampler: Callable[[Experiment, Path], Sampler] | None = None,
) -> dict[str, Any]:
    """Trains what `config` describes, or goes on with it where `workdir` holds a part of that run.

    Args:
        config: see `tokenlab.train.config.TrainConfig`.
        workdir: folder of the run, or its address (`gs://BUCKET/FOLDER`); made when missing. It then holds config.json,
            run.json, metrics.jsonl, TensorBoard events and checkpoints/.
        experiment: built of `config` already, by one who trains it from several seeds; None builds it.
        profile: trace a few steps into `workdir`/profile, see `tokenlab.train.profile`.
        sampler: makes what draws samples every `config.sample_every` steps (`tokenlab.generate.Samples`), of the
            experiment and the workdir; it raises what makes that impossible, and is not called where that is 0.

    Returns:
        "step", "flops", "tokens", "layer_tokens" (of a model with a stack), "seconds" and "data_seconds" (of these,
        with no step to do for want of batches) of the run, and under the name of each split its last record: "train",
        `config.eval.split` and `config.eval.final_split`.

    Raises:
        TokenLabError: what is wrong, in one line. Whatever can be known before training is said before the workdir is
            touched. NonFiniteError stops a run whose values are no longer finite; its last checkpoint is from before.
        SystemExit: 143 after SIGTERM and 130 after SIGINT, when the state of the step under way has been saved.
    """
    begun = time.perf_counter()
    experiment = experiments.build(config) if experiment is None else experiment
    if profile:
        window(0, experiment.config.steps, experiment.stack_vars.alternations(0, experiment.config.steps))
    with contextlib.ExitStack() as stack:
        mirror = stack.enter_context(mirrors.opened(workdir))
        draws = _sampler(experiment, mirror.path if mirror else Path(workdir), sampler)
        loaded: Mapping[str, Any] = {}
        told: list[str] = []
        if not agree.from_primary(_has_checkpoint(workdir)):
            model = experiment.model
            loaded = initialize.load(experiment.config.init_from, model.abstract_state(), model, notes=told)
        compilation.use_cache(experiment.config.compilation_cache)
        folder = stack.enter_context(Workdir(mirror or workdir, config))
        folder.keep_tokenizer(experiment.source.tokenizer)
        if jax.process_count() > 1:  # the first process alone decides whether the workdir may be used
            agree.meet()
            folder.check_shared()
        checkpoints = stack.enter_context(
            Checkpoints(
                folder.checkpoints,
                keep=experiment.config.keep_checkpoints,
                best=experiment.task.better,
                metric=experiment.task.primary,
                before=folder.secure,
            )
        )
        progress = stack.enter_context(
            Progress(
                experiment.config.steps,
                batch_size=experiment.config.batch_size,
                examples=tasks.examples_of(experiment.task, experiment.source),
            )
        )
        interrupt = stack.enter_context(Interrupt())
        trainer = Trainer(experiment, folder, checkpoints, progress, interrupt, begun, draws)
        trainer.start(loaded, told)
        traced = folder.path / "profile" if profile and jax.process_index() == 0 else None
        return trainer.train(stack.enter_context(Profiler(traced, trainer.stopwatch.paused)))


def _sampler(
    experiment: Experiment, workdir: Path, made_by: Callable[[Experiment, Path], Sampler] | None
) -> Sampler | None:
    """What draws samples, where the configuration asks for them."""
    every = experiment.config.sample_every
    if not every:
        return None
    if made_by is None:
        raise ConfigError(
            f"config.sample_every is {every}, and nothing that draws samples was given: expected 0, or "
            "train.run(..., sampler=tokenlab.generate.Samples), as `tokenlab train` does."
        )
    return made_by(experiment, workdir)


def _has_checkpoint(workdir: str | Path) -> bool:
    """Whether there is one, whole or not; the first process alone looks."""
    return jax.process_index() == 0 and bool(places.in_workdir(workdir).steps())


class Trainer:
    """One run under way: its state, its totals and where it writes.

    Args:
        experiment: what to train.
        folder, checkpoints, progress: where to write, save and report.
        interrupt: tells of signals.
        begun: `time.perf_counter()` at the start of the run.
        sampler: draws samples at every `config.sample_every`-th step; None where that is 0.

    Attributes:
        step: steps done.
        state: the train state after `step` steps.
        flops, tokens: counted model FLOPs and tokens of training so far.
        stopwatch: seconds of training so far.
        waited: of these, seconds spent waiting for batches while the devices had no more steps to do, or ran out of
            them.
        results: last record by split.
    """

    state: TrainState

    def __init__(
        self,
        experiment: Experiment,
        folder: Workdir,
        checkpoints: Checkpoints,
        progress: Progress,
        interrupt: Interrupt,
        begun: float,
        sampler: Sampler | None = None,
    ) -> None:
        self.experiment, self.config = experiment, experiment.config
        self.folder, self.checkpoints = folder, checkpoints
        self.progress, self.interrupt, self._sampler = progress, interrupt, sampler
        self.step, self.flops, self.tokens = 0, 0, 0
        self.results: dict[str, dict[str, Any]] = {}
        self.stopwatch, self.waited = Stopwatch(), 0.0
        self._begun = begun
        self._left_out: dict[str, dict[int, str]] = {}
        self._prepared: dict[str, experiments.CompiledStep] = {}
        self._facts: dict[str, Any] = {"compile_seconds": {}, "train_flops_per_step": {}, "peak_bytes": {}}
        self._leaf_names = experiment.leaf_names()

    def start(self, loaded: Mapping[str, Any], told: Sequence[str] = ()) -> None:
        """Restores the newest whole checkpoint, or begins at step 0 with the parameters in `loaded`, if any.

        `told` are notes on what was loaded.
        """
        notes = [*self.folder.notes, *told]
        if self.experiment.hardware is not None:
            notes.append(str(self.experiment.hardware))
        restored = self.checkpoints.restore_latest(self.experiment.abstract_state)
        if restored is None:
            self.state = self.experiment.init(loaded)
        else:
            self.state, meta, self.step, passed_over = restored
            self._check_step()
            self.experiment.stream.check(meta["data"])
            self.flops, self.tokens, self.results = meta["flops"], meta["tokens"], meta["results"]
            self.stopwatch, self.waited = Stopwatch(meta["seconds"]), meta["data_seconds"]
            done = self.step == self.config.steps
            notes += [
                *passed_over,
                f"all {self.step} steps are done" if done else f"going on from step {self.step}",
            ]
        notes += self.folder.begin_run(self.experiment.facts(), self.step)
        notes += self.folder.rewind(self.step)
        for note in notes:
            self.progress.note(note)

    def _check_step(self) -> None:
        if self.step > self.config.steps:
            raise ConfigError(
                f"config.steps is {self.config.steps}, but the run in {self.folder.name} has done {self.step} already: "
                "give at least as many, or another workdir."
            )

    def train(self, profiler: Profiler) -> dict[str, Any]:
        """Runs the steps that are left; see `run` for what it returns and raises."""
        config, experiment = self.config, self.experiment
        if self.step < config.steps:
            changes = experiment.stack_vars.alternations(self.step, config.steps)
            profiler.plan(self.step, config.steps, changes)
        tokens = experiment.tokens_per_step
        in_flight: deque[jax.Array] = deque()
        guard = jax.transfer_guard("disallow") if config.transfer_guard else contextlib.nullcontext()
        with experiment.batches(self.step) as batches, guard, self.stopwatch.running():
            for batch in self._waiting(batches, in_flight):
                watch.progress("in a train step")
                train_step, flops = self._prepare(batch)
                profiler.before(self.step, in_flight)
                self.state, report = train_step(self.state, batch)
                self.step += 1
                self.flops += flops
                self.tokens += tokens
                in_flight.append(report.loss)
                if note := profiler.after(self.step, train_step, in_flight):
                    self.progress.note(note)
                if len(in_flight) > AHEAD:
                    in_flight.popleft().block_until_ready()
                stop = self.interrupt.requested(self.step)
                if stop or self._is_due():
                    self._visit(report, stop=stop)
        return {**self._totals(), **self.results}

    def _waiting(self, batches: Iterator[Any], in_flight: Sequence[jax.Array]) -> Iterator[Any]:
        """The batches; the wait for one is added up when the devices had nothing left to do before it came."""
        while True:
            watch.progress("waits for a batch", self.step)
            asked = time.perf_counter()
            batch = next(batches, None)
            came = time.perf_counter()
            if not in_flight or in_flight[-1].is_ready():
                self.waited += came - asked
            if batch is None:
                return
            yield batch

    def _tell_left_out(self, split: str, records: Iterable[int]) -> None:
        """Names records that could not be read (`config.data.corrupt="skip"`) as they turn up, and counts them."""
        known = self._left_out.setdefault(split, {})
        new = sorted(set(records) - known.keys())
        for index in new:
            known[index] = self.experiment.source.why(split, index)
            self.progress.note(f"left out: record {index} of split {split!r}: {known[index]}")
        if new:
            listed = {
                split: {str(index): why for index, why in records.items()}
                for split, records in self._left_out.items()
                if records
            }
            self.folder.update_run({"skipped_records": listed})

    def _totals(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "flops": self.flops,
            "tokens": self.tokens,
            **self._layer_tokens(),
            "seconds": self.stopwatch.seconds,
            "data_seconds": self.waited,
        }

    def _layer_tokens(self) -> dict[str, int]:
        """Tokens that entered blocks so far, a function of the step alone; nothing for a model without a stack."""
        done = self.experiment.layer_tokens(self.step)
        return {"layer_tokens": done} if done else {}

    def _prepare(self, batch: Mapping[str, jax.Array]) -> tuple[Callable[..., Any], int]:
        """The compiled step for the numbers in the stack at this step, and its model FLOPs."""
        key = self.experiment.values(self.step)
        if key not in self._prepared:
            with self.stopwatch.paused():
                known = self.experiment.is_compiled(self.step)
                found = self.experiment.compiled_step(self.step, self.state, batch)
                self._prepared[key] = found
                self._facts["compile_seconds"][key] = found.seconds
                self._facts["train_flops_per_step"][key] = found.flops
                self._facts["peak_bytes"][key] = found.peak_bytes
                seconds = self._facts["compile_seconds"].values()
                self._facts["compilations"] = {"count": len(seconds), "seconds": sum(seconds)}
                self._facts.setdefault("seconds_to_first_step", time.perf_counter() - self._begun)
                self.folder.update_run(self._facts)
                agree.meet()
            what = f"train step {len(self._prepared)}{f' for {key}' if key else ''}"
            how = "was compiled before" if known else f"compiled in {found.seconds:.1f} s"
            self.progress.note(f"step {self.step}: {what} {how}")
        found = self._prepared[key]
        return found.run, found.flops

    def _is_due(self) -> bool:
        config, step = self.config, self.step
        every = (config.log_every, config.eval_every, config.checkpoint_every, config.sample_every)
        return step == config.steps or any(count and step % count == 0 for count in every)

    def _visit(self, report: Report, *, stop: bool) -> None:
        """What happens after some steps: record, evaluation, samples, checkpoint, stop.

        In this order, so that a checkpoint of a step stands for all its records: what is lost with a process that
        dies in between is done again.
        """
        config, step = self.config, self.step
        last = step == config.steps
        stop = stop and not last
        if last or step % config.log_every == 0:
            self._log(report)
        report.loss.block_until_ready()
        with self.stopwatch.paused():
            metrics = None
            if last or (config.eval_every and step % config.eval_every == 0):
                metrics = self._evaluate(config.eval.split)
            if last and config.eval.final_split is not None:
                self._evaluate(config.eval.final_split)
            watch.progress("records and saves")
            if self._sampler and (last or step % config.sample_every == 0):
                self._sample(self._sampler)
            if last or stop or (config.checkpoint_every and step % config.checkpoint_every == 0):
                self._save(metrics, wait=last or stop)
        if stop:
            self.progress.note(
                f"{self.interrupt.name}: step {step} is saved; the same command goes on from there"
            )
            raise SystemExit(self.interrupt.exit_code)

    def _log(self, report: Report) -> None:
        """Writes what was summed since the last record, and begins a new sum."""
        fetched = jax.device_get((self.state.metrics, self.state.health, report.learning_rate))
        sums, health, rate = fetched
        check_health(health, self._leaf_names)
        self._tell_left_out(TRAIN_SPLIT, self.experiment.left_out(self.experiment.skipped))
        self.state = self.state.replace(metrics=self.experiment.zero_metrics())
        self._record("train", {**means(sums, self.experiment.task), "learning_rate": float(rate)})

    def _evaluate(self, split: str) -> dict[str, float]:
        check_health(jax.device_get(self.state.health), self._leaf_names)
        found = self.experiment.evaluate(evaluation_params(self.state), split, self.step)
        self._tell_left_out(split, self.experiment.left_out(found.skipped))
        self._record(split, found.metrics)
        return found.metrics

    def _sample(self, sampler: Sampler) -> None:
        check_health(jax.device_get(self.state.health), self._leaf_names)
        with jax.transfer_guard(
            "allow"
        ):  # prompts and drawn tokens go back and forth, and nothing waits for them
            self.progress.note(sampler(evaluation_params(self.state), self.step))

    def _record(self, split: str, metrics: Mapping[str, float]) -> None:
        record = {"step": self.step, "split": split, **metrics, **self._totals()}
        self.results[split] = record
        self.folder.record(record)
        self.progress.record(record)

    def _save(self, metrics: Mapping[str, float] | None, *, wait: bool) -> None:
        check_health(jax.device_get(self.state.health), self._leaf_names)
        meta = {
            **self._totals(),
            "data": self.experiment.stream.state(self.step),
            "stack_vars": self.experiment.stack_vars.at(self.step),
            "ema": self.state.ema is not None,
            "statistics": self.state.statistics is not None,
            "results": self.results,
        }
        self.checkpoints.save(self.step, self.state, meta, metrics, wait=wait)
