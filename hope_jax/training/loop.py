"""The training loop: batches in, steps, evaluations, checkpoints, and the records of all of them."""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from hope_jax.training import distributed
from hope_jax.training.checkpoint import Checkpoints, describe, fingerprints, saved_step
from hope_jax.training.config import TrainConfig
from hope_jax.training.corpus import Corpus, load_corpus
from hope_jax.training.data import TrainBatches
from hope_jax.training.errors import RunFailed, UserError
from hope_jax.training.evaluate import evaluate
from hope_jax.training.interrupt import Interruption, Stop
from hope_jax.training.metrics import MetricsWriter, plot_loss, read_metrics
from hope_jax.training.progress import Display
from hope_jax.training.run_dir import LOSS_PLOT, claim, full_disk_named, holds_run, resolve
from hope_jax.training.step import Metrics, Program, TrainState, bits, build_program
from hope_jax.training.watchdog import Watchdog


class Result(NamedTuple):
    """What a run came to."""

    run_dir: Path
    config: TrainConfig
    program: Program
    corpus: Corpus
    state: TrainState
    started_at: int  # the step this call began with; config.steps when there was nothing left to do
    stop: Stop  # why it stopped before the end
    validation_bpb: float | None  # of the whole validation text; None when interrupted before
    tokens_per_second: float | None  # of training steps alone: no compilation, evaluation or saving
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
) -> Result:
    """Trains a model, or continues its training.

    In a run of several processes each of them calls this; process 0 writes and prints.

    Args:
      config: what to train; `steps` is the step to stop at, counted from the beginning of the run.
      run_dir: where the run lies (see `run_dir.py`).
      resume: continue from the latest checkpoint. The steps that follow are those of an uninterrupted run,
        bit for bit. None: continue if there is a run, else start one.
      overwrite: remove a run that is already there.
      console: where to print; None prints nothing.
    Returns:
      A `Result`. After Ctrl-C or SIGTERM the state is saved and `interrupted` is True.
    Raises:
      UserError: the config, the data or the run directory cannot be used.
      RunFailed: loss, gradient or parameters became infinite or not a number; the message names the last good
        checkpoint. Or a checkpoint could not be saved.
    """
    began = time.perf_counter()
    primary = distributed.is_primary()
    console = console if console and primary else Console(quiet=True)
    resume = holds_run(run_dir) if resume is None else resume
    corpus = load_corpus(config.data)
    batches = TrainBatches(corpus.train, seed=config.seed, batch=config.batch_size, length=config.seq_len)
    config = resolve(config, run_dir, resume=resume, overwrite=overwrite)
    program = build_program(config)
    distributed.check_mesh(program.mesh)
    saved = saved_step(run_dir) if resume else None
    if saved is not None and saved > config.steps:
        raise UserError(f"{run_dir} is at step {saved}, beyond steps={config.steps}; give a larger steps")
    distributed.barrier("start")  # all have looked at the directory
    if primary:
        claim(config, corpus, run_dir, overwrite=overwrite and not resume)
    distributed.barrier("run directory")
    console.print(_opening(config, program), markup=False)
    with (
        full_disk_named(run_dir),
        Interruption() as interruption,
        Checkpoints(run_dir, config.keep_checkpoints, config.keep_every) as checkpoints,
    ):
        state = _start(program, checkpoints, fingerprints(config, corpus.sha256))
        start = int(state.step)
        label = config.model.name
        with (
            MetricsWriter(run_dir, start) if primary else contextlib.nullcontext() as writer,
            Display(console, label, config.steps, start) as display,
            Watchdog(config.stall_seconds, run_dir) as watchdog,
        ):
            run = _Run(config, program, corpus, checkpoints, writer, display, watchdog, run_dir)
            state = run.steps(state, batches, lambda: interruption.requested)
            stop = Stop(distributed.greatest(interruption.requested))
            validation_bpb = None
            if stop == Stop.NO:
                validation_bpb = run.evaluate(state, config.final_eval_batches)
                stop = Stop(distributed.greatest(interruption.requested))  # during the evaluation counts too
    if primary:
        plot_loss({label: run_dir}, run_dir / LOSS_PLOT)
    speed = run.speed or _recorded_speed(run_dir)
    seconds = time.perf_counter() - began
    return Result(run_dir, config, program, corpus, state, start, stop, validation_bpb, speed, seconds)


def _opening(config: TrainConfig, program: Program) -> str:
    tokens = config.steps * config.batch_size * config.seq_len
    devices = list(program.mesh.devices.flat)
    return (
        f"{config.model.name}, {count(program.abstract_state.params):,} parameters, {config.steps} steps of "
        f"{config.batch_size} x {config.seq_len} bytes ({tokens / 1e6:.1f} MB) "
        f"on {len(devices)} x {devices[0].device_kind}"
    )


def count(params: Any) -> int:
    """How many numbers a tree of arrays holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _start(program: Program, checkpoints: Checkpoints, expected: dict[str, Any]) -> TrainState:
    if checkpoints.latest_step() is None:
        return program.init()
    return checkpoints.restore(program.abstract_state, expected)[0]


def _recorded_speed(run_dir: Path) -> float | None:
    speeds = [record["tokens_per_second"] for record in read_metrics(run_dir) if record.get("tokens_per_second")]
    return speeds[-1] if speeds else None


class _Run:
    """The steps of one call of `train`: what is sent to the device, and what is read back one step later."""

    def __init__(
        self,
        config: TrainConfig,
        program: Program,
        corpus: Corpus,
        checkpoints: Checkpoints,
        writer: MetricsWriter | None,
        display: Display,
        watchdog: Watchdog,
        run_dir: Path,
    ):
        self.config, self.program, self.corpus = config, program, corpus
        self.checkpoints, self.writer, self.display = checkpoints, writer, display
        self.watchdog, self.run_dir = watchdog, run_dir
        self._timed_steps, self._timed_seconds = 0, 0.0

    @property
    def speed(self) -> float | None:
        """Bytes per second of training steps, None before the second step."""
        tokens = self._timed_steps * self.config.batch_size * self.config.seq_len
        return tokens / self._timed_seconds if self._timed_steps else None

    def steps(self, state: TrainState, batches: TrainBatches, asked: Callable[[], Stop]) -> TrainState:
        """Runs to the end or until one process is asked to stop; the state it returns is saved, or is being saved."""
        config, vote = self.config, distributed.Vote(self.program.mesh)
        step = int(state.step)
        sent: Metrics | None = None  # of the step that the device is working on
        clock = None  # None: the next step includes compilation or follows a pause
        while step < config.steps:
            stop, link = vote(asked(), state.step)
            state = state._replace(step=link)
            if stop != Stop.NO:
                break
            state, metrics = self.program.train_step(state, self.program.put_batch(batches[step]))
            # The host waits for the previous step only: the device already has this one.
            if sent is not None:
                self._read(step, sent)
            sent, step = metrics, step + 1
            self.watchdog.beat(step)
            self.checkpoints.check()
            now = time.perf_counter()
            if clock is not None:
                self._timed_steps, self._timed_seconds = (
                    self._timed_steps + 1,
                    self._timed_seconds + now - clock,
                )
            clock = now
            if step % config.eval_every == 0 or step % config.checkpoint_every == 0:
                self._read(step, metrics)
                sent = clock = None
                self._pause(state, step)
        if sent is not None:
            self._read(step, sent)
        self._save(state)
        return state

    def _pause(self, state: TrainState, step: int) -> None:
        config = self.config
        if step % config.checkpoint_every == 0:
            self._save(state)
        if step % config.eval_every == 0 and step < config.steps:
            bpb = self.evaluate(state, config.eval_batches)
            self.display.print(f"step {step}: validation {bpb:.3f} bits per byte")

    def evaluate(self, state: TrainState, batches: int) -> float:
        """Validation bits per byte, written down if it is news; 0 batches read everything."""
        bpb = evaluate(self.program, state.params, self.corpus.validation, self.config, batches or None)
        step = int(state.step)
        self.watchdog.beat(step)
        if self.writer is None:
            return bpb
        known = {record["step"] for record in read_metrics(self.run_dir) if "validation_bits_per_byte" in record}
        if step not in known:
            self.writer.write(step, validation_bits_per_byte=bpb)
        return bpb

    def _read(self, step: int, metrics: Metrics) -> None:
        """Waits for a step, stops the run if its numbers are not finite, and writes them down."""
        loss, grad_norm, learning_rate, params_norm = (float(value) for value in metrics)
        # The loss is of the parameters before the step; what is saved are those after it.
        if not all(map(math.isfinite, (loss, grad_norm, params_norm))):
            raise RunFailed(self._describe_failure(step, loss, grad_norm, params_norm))
        speed = self.speed
        values = {"loss": loss, "bits_per_byte": bits(loss), "grad_norm": grad_norm, "learning_rate": learning_rate}
        if self.writer is not None:
            self.writer.write(step, **values, **({} if speed is None else {"tokens_per_second": speed}))
        self.display.update(step, loss, bits(loss), speed)

    def _describe_failure(self, step: int, loss: float, grad_norm: float, params_norm: float) -> str:
        with contextlib.suppress(RunFailed):
            self.checkpoints.wait()
        good = self.checkpoints.latest_step()
        saved = "no checkpoint was saved before it"
        if good is not None:
            saved = f"the last good checkpoint is step {good} in {self.checkpoints.directory / str(good)}"
        return (
            f"step {step} gave loss {loss}, gradient norm {grad_norm}, parameter norm {params_norm}; {saved}; "
            f"try a smaller learning_rate (now {self.config.learning_rate:g}) or clip_norm"
        )

    def _save(self, state: TrainState) -> None:
        meta = describe(int(state.step), self.config, self.corpus.sha256, self.program.mesh)
        self.checkpoints.save(state, meta)
