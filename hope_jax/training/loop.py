"""The training loop: batches in, steps, evaluations, checkpoints, and the records of all of them."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from hope_jax.training import distributed
from hope_jax.training.checkpoint import Checkpoints, describe, fingerprints, saved_step
from hope_jax.training.config import TrainConfig, config_hash
from hope_jax.training.data import Batches, feed, training_batches
from hope_jax.training.errors import RunFailed, UserError
from hope_jax.training.evaluate import evaluate
from hope_jax.training.goodput import Clock
from hope_jax.training.ingest import INGEST_SECONDS
from hope_jax.training.interrupt import Interruption, Stop
from hope_jax.training.level_health import Health
from hope_jax.training.metrics import MetricsWriter, Sink, WeightsAndBiases, check_wandb, read_metrics
from hope_jax.training.mixture import Mixture, load_mixture
from hope_jax.training.origin import begin, describe_origin, find_origin
from hope_jax.training.plots import plot_loss
from hope_jax.training.profile import Profile, Steps, check_steps
from hope_jax.training.progress import Display
from hope_jax.training.run_dir import LOSS_PLOT, claim, full_disk_named, holds_run, resolve, tokenizer_of
from hope_jax.training.step import Metrics, Program, TrainState, build_program
from hope_jax.training.telemetry import Telemetry, finite
from hope_jax.training.utilisation import seconds_at_peak
from hope_jax.training.watchdog import Watchdog


class Result(NamedTuple):
    """What a run came to."""

    run_dir: Path
    config: TrainConfig
    program: Program
    corpus: Mixture
    state: TrainState
    started_at: int  # the step this call began with; config.steps when there was nothing left to do
    stop: Stop  # why it stopped before the end
    validation_bpb: float | None  # of the whole validation text; None when interrupted before
    tokens_per_second: float | None  # of the last training steps alone: no compilation, evaluation or saving
    seconds: float  # everything, compilation included

    @property
    def interrupted(self) -> bool:
        """Whether it was stopped before the end, by whatever signal."""
        return self.stop != Stop.NO

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return count(self.state.params)


def train(
    config: TrainConfig,
    run_dir: Path,
    *,
    resume: bool | None = False,
    overwrite: bool = False,
    console: Console | None = None,
    profile: Steps | None = None,
) -> Result:
    """Trains a model, or continues its training.

    In a run of several processes each of them calls this; process 0 writes and prints.

    Args:
      config: what to train; `steps` is the step to stop at, counted from the beginning of the run.
      run_dir: where the run lies (see `run_dir.py`).
      resume: continue from the latest checkpoint. The steps that follow are those of an uninterrupted run,
        bit for bit. None, of a launcher: continue if there is a run, else start one; the first step is saved too, so
        that a run that is killed again and again before a save is due moves on nevertheless.
      overwrite: remove a run that is already there.
      console: where to print; None prints nothing.
      profile: steps to write a trace of.
    Returns:
      A `Result`. After Ctrl-C or SIGTERM the state is saved and `interrupted` is True.
    Raises:
      UserError: the config, the data or the run directory cannot be used.
      RunFailed: loss, gradient or parameters became infinite or not a number; the message names the last good
        checkpoint. Or a checkpoint could not be saved.
    """
    clock = Clock()
    primary = distributed.is_primary()
    console = console if console and primary else Console(quiet=True)
    found = resume is None  # whether to resume was for us to find out
    resume = holds_run(run_dir) if resume is None else resume
    check_wandb(config)
    config = resolve(config, run_dir, resume=resume, overwrite=overwrite)
    program = build_program(config)
    distributed.check_mesh(program.mesh)
    saved = saved_step(run_dir) if resume else None
    if saved is not None and saved > config.steps:
        raise UserError(f"{run_dir} is at step {saved}, beyond steps={config.steps}; give a larger steps")
    origin = find_origin(config, program, run_dir) if saved is None else None
    profile = _still_to_trace(profile, saved or 0, config.steps, found)
    tokenizer = tokenizer_of(config, run_dir) if resume else config.tokenizer
    corpus = load_mixture(dataclasses.replace(config, tokenizer=tokenizer), lambda x: console.print(x, markup=False))
    batches = training_batches(corpus, config)
    _claim(config, corpus, run_dir, overwrite=overwrite and not resume)
    console.print(_opening(config, program), markup=False)
    if origin is not None:
        console.print(describe_origin(origin, config), markup=False)
    with (
        full_disk_named(run_dir),
        clock.keep(run_dir, saved or 0) if primary else contextlib.nullcontext(),
        Interruption() as interruption,
        Checkpoints(run_dir, config.keep_checkpoints, config.keep_every) as checkpoints,
    ):
        first = program.init if origin is None else functools.partial(begin, origin, config, program, run_dir)
        state = _start(program, checkpoints, fingerprints(config, corpus.sha256), clock, first)
        start = int(state.step)
        clock.starts_at(start)
        with clock.doing("compile"):
            at_peak = seconds_at_peak(config, list(program.mesh.devices.flat))
            telemetry = Telemetry(config, clock, at_peak, corpus.bytes_per_token("train"))
        label = config.model.name
        others = _other_places(config, run_dir, clock, start) if primary else []
        with (
            MetricsWriter(run_dir, start, *others) if primary else contextlib.nullcontext() as writer,
            Display(console, label, config.steps, start) as display,
            Profile(run_dir, profile, clock) as trace,
            Watchdog(config.stall_seconds, run_dir) as watchdog,
        ):
            run = _Run(config, program, corpus, checkpoints, writer, display, watchdog, run_dir, telemetry, trace)
            if origin is not None:
                run.save(state)  # its beginning is kept
            state = run.steps(state, batches, lambda: interruption.requested, save_first=found)
            stop = Stop(distributed.greatest(interruption.requested))
            validation_bpb = None
            if stop == Stop.NO:
                validation_bpb = run.evaluate(state, config.final_eval_batches)
                stop = Stop(distributed.greatest(interruption.requested))  # during the evaluation counts too
        if primary:
            plot_loss({label: run_dir}, run_dir / LOSS_PLOT)
        clock.finished = stop == Stop.NO
    speed = telemetry.tokens_per_second or _recorded_speed(run_dir)
    return Result(run_dir, config, program, corpus, state, start, stop, validation_bpb, speed, clock.elapsed)


def _still_to_trace(steps: Steps | None, saved: int, last: int, found: bool) -> Steps | None:
    """The steps to trace; None for those that were traced before a launcher `found` the run and continues it."""
    if steps is None or (found and saved >= steps.last):
        return None
    check_steps(steps, saved, last)
    return steps


def _claim(config: TrainConfig, corpus: Mixture, run_dir: Path, *, overwrite: bool) -> None:
    """All have read the same; the first process takes the run directory, and says what keeps it from that."""
    distributed.barrier("text", INGEST_SECONDS)  # and all have looked at the directory
    distributed.agree("config or text", f"{config_hash(config)} {config.mesh.describe()} {corpus.sha256[:16]}")
    problem = None
    if distributed.is_primary():
        try:
            claim(config, corpus, run_dir, overwrite=overwrite)
        except UserError as error:
            problem = str(error)
    problem = distributed.first_of(problem)
    if problem is not None:
        raise UserError(problem)


def _opening(config: TrainConfig, program: Program) -> str:
    tokens = config.steps * config.batch_size * config.seq_len
    unit = "bytes" if config.tokenizer == "bytes" else "tokens"
    devices = list(program.mesh.devices.flat)
    return (
        f"{config.model.name}, {count(program.abstract_state.params):,} parameters, {config.steps} steps of "
        f"{config.batch_size} x {config.seq_len} {unit} ({tokens / 1e6:.1f} M{unit[0].upper()}) "
        f"on {len(devices)} x {devices[0].device_kind}"
    )


def count(params: Any) -> int:
    """How many numbers a tree of arrays holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _start(
    program: Program,
    checkpoints: Checkpoints,
    expected: dict[str, Any],
    clock: Clock,
    first: Callable[[], TrainState],
) -> TrainState:
    if checkpoints.latest_step() is None:
        checkpoints.check_none_is_damaged()
        with clock.doing("compile"):
            return first()
    with clock.doing("restore"):
        return checkpoints.restore(program.abstract_state, expected)[0]


def _other_places(config: TrainConfig, run_dir: Path, clock: Clock, start: int) -> list[Sink]:
    """Where the records go besides the run directory. A place that is shut does not keep a run from going on."""
    if not config.wandb:
        return []
    try:
        return [WeightsAndBiases(run_dir, config, clock.began)]
    except UserError as error:
        if not start:
            raise
        distributed.say(f"warning: {error}; the run goes on without it")
        return []


def _recorded_speed(run_dir: Path) -> float | None:
    speeds = [record["tokens_per_second"] for record in read_metrics(run_dir) if record.get("tokens_per_second")]
    return speeds[-1] if speeds else None


class _Run:
    """The steps of one call of `train`: what is sent to the device, and what is read back one step later."""

    def __init__(
        self,
        config: TrainConfig,
        program: Program,
        corpus: Mixture,
        checkpoints: Checkpoints,
        writer: MetricsWriter | None,
        display: Display,
        watchdog: Watchdog,
        run_dir: Path,
        telemetry: Telemetry,
        trace: Profile,
    ):
        self.config, self.program, self.corpus = config, program, corpus
        self.checkpoints, self.writer, self.display = checkpoints, writer, display
        self.watchdog, self.run_dir, self.telemetry, self.trace = watchdog, run_dir, telemetry, trace
        self.clock, self.times = telemetry.clock, telemetry.times
        self.health = Health()
        self._evaluated = {r["step"] for r in read_metrics(run_dir) if "validation_bits_per_byte" in r}

    def steps(self, state: TrainState, batches: Batches, asked: Callable[[], Stop], *, save_first: bool) -> TrainState:
        """Runs to the end or until one process is asked to stop; the state it returns is saved, or is being saved."""
        config, vote = self.config, distributed.Vote(self.program.mesh)
        step = int(state.step)
        first = step + 1 if save_first else None
        sent: Metrics | None = None  # of the step that the device is working on
        kind = "compile"  # what the next call of the step does
        rows = self.program.rows_here(config.batch_size)
        made = feed(batches, step, config.steps, rows)
        if step and self._evaluation_is_due(step) and distributed.greatest(step not in self._evaluated):
            self._evaluate_on_the_way(state, step)  # the process before this one ended in it
        with self.clock.doing("step"):
            while step < config.steps:
                stop, link = vote(asked(), state.step)
                state = state._replace(step=link)
                if stop != Stop.NO:
                    break
                if self.trace.begins(step + 1, state):
                    self.times.pause()
                with self.clock.doing(kind), self.trace.step(step + 1):
                    batch = self.program.put_batch(next(made), rows, config.batch_size)
                    state, metrics = self.program.train_step(state, batch)
                # The host waits for the previous step only: the device already has this one.
                if sent is not None:
                    self._read(step, sent)
                if kind == "step" and not self.trace.running:  # the first step makes files and programs
                    self.times.step()
                sent, step, kind = metrics, step + 1, "step"
                self.watchdog.beat(step)
                self.checkpoints.check()
                if self.trace.ends(step, state):
                    self.times.pause()
                saves = step % config.checkpoint_every == 0 or step == first
                if saves or step % config.eval_every == 0:
                    self._read(step, metrics)
                    sent = None
                    self.times.pause()
                    self._pause(state, step, saves)
            if sent is not None:
                self._read(step, sent)
        self.save(state)
        return state

    def _pause(self, state: TrainState, step: int, saves: bool) -> None:
        if saves:
            self.save(state)
        if self._evaluation_is_due(step):
            self._evaluate_on_the_way(state, step)

    def _evaluation_is_due(self, step: int) -> bool:
        """During training; the one at the end is another."""
        return step % self.config.eval_every == 0 and step < self.config.steps

    def _evaluate_on_the_way(self, state: TrainState, step: int) -> None:
        bpb = self.evaluate(state, self.config.eval_batches)
        self.display.print(f"step {step}: validation {bpb:.3f} bits per byte")

    def evaluate(self, state: TrainState, batches: int) -> float:
        """Validation bits per byte, written down if it is news; 0 batches read everything."""
        with self.clock.doing("eval"):
            bpb = evaluate(
                self.program,
                state.params,
                self.corpus.validation,
                self.config,
                batches or None,
                starts=self.corpus.validation_starts,
                bytes_per_token=self.corpus.bytes_per_token("validation"),
            )
            distances = self._distances(state)
        step = int(state.step)
        self.watchdog.beat(step)
        if self.writer is None:
            return bpb
        if step not in self._evaluated:
            self._evaluated.add(step)
            self.writer.write(step, **self.telemetry.of_evaluation(bpb, distances))
        return bpb

    def _distances(self, state: TrainState) -> dict[str, Any]:
        """From where the run began; nothing if that was another run and the checkpoint of step 0 is gone."""
        start = None
        if self.config.start.run:
            start = self.checkpoints.beginning(self.program.abstract_state.params)
            if start is None:
                return {}
        return jax.device_get(self.program.distances(state.params, start))

    def _read(self, step: int, metrics: Metrics) -> None:
        """Waits for a step, stops the run if its numbers are not finite, and writes them down."""
        metrics = jax.device_get(metrics)
        if not finite(metrics):
            raise RunFailed(self._describe_failure(step, metrics))
        self.clock.step(step)
        record = self.telemetry.of_step(metrics)
        if self.writer is not None:
            self.writer.write(step, **record)
        self.display.update(step, record)
        for warning in self.health.news(record):
            self.display.print(f"step {step}: {warning}")

    def _describe_failure(self, step: int, metrics: Metrics) -> str:
        with contextlib.suppress(RunFailed):
            self.checkpoints.wait()
        good = self.checkpoints.latest_step()
        saved = "no checkpoint was saved before it"
        if good is not None:
            saved = f"the last good checkpoint is step {good} in {self.checkpoints.directory / str(good)}"
        return (
            f"step {step} gave loss {metrics.loss}, gradient norm {metrics.grad_norm}, "
            f"parameter norm {metrics.params_norm}; {saved}; "
            f"try a smaller learning_rate (now {self.config.learning_rate:g}) or clip_norm"
        )

    def save(self, state: TrainState) -> None:
        """Begins to save a state."""
        meta = describe(int(state.step), self.config, self.corpus.sha256, self.program.mesh)
        with self.clock.doing("save"):
            self.checkpoints.save(state, meta)
            if self.config.sync_checkpoints:
                self.checkpoints.wait()
