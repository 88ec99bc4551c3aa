"""A training loop for small tasks: a stream of (tokens, targets, weights), AdamW, one compiled step."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.options import Options
from hope_jax.models import ModelConfig, build_lm
from hope_jax.training import documents
from hope_jax.training.optimizer import decay_mask

type Scores = dict[str, float]


class Batch(NamedTuple):
    """Examples of one step; every batch of a stream has the same shapes."""

    tokens: np.ndarray  # [B, T] int32
    targets: np.ndarray  # [B, T] int32, or whatever the loss of the task takes
    weights: np.ndarray  # [B, T] float32, 0 where nothing is predicted


class Model(NamedTuple):
    """What is trained, as pure functions."""

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]  # (params, tokens) -> outputs


class Trained(NamedTuple):
    """What a run came to."""

    params: Any
    steps: int
    curve: list[tuple[int, Scores]]  # an evaluation every now and then, the last one after the last step
    seconds: float  # of training steps after the first; compilation and evaluations are not in it
    cpu_seconds: float  # of processor time in `seconds`, all cores: what a shared machine makes no larger
    compile_seconds: float  # of the first step
    tokens_per_second: float | None  # None after a single step
    failed: str | None  # at which step a loss or gradient was infinite or not a number

    @property
    def scores(self) -> Scores:
        """Of the trained parameters; empty if the run failed."""
        return {} if self.failed else self.curve[-1][1]


def language_model(config: ModelConfig) -> Model:
    """A language model of the library that reads every sequence with an empty memory."""
    lm = build_lm(config)

    def apply(params: Any, tokens_BT: jax.Array) -> jax.Array:
        return lm.apply(params, lm.init_state(params, tokens_BT.shape[0]), tokens_BT, phase=0)[1]

    return Model(lm.init, apply)


def state_bytes(config: ModelConfig) -> int:
    """Bytes of what a model keeps of one sequence: memories, caches, convolution tails, clocks."""
    lm = build_lm(config)
    state = jax.eval_shape(lambda: lm.init_state(lm.init(jax.random.key(0)), 1))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def cross_entropy(logits_BTV: jax.Array, batch: Batch) -> jax.Array:
    """Mean nats of the targets, weighted."""
    nats_BT = documents.cross_entropy(logits_BTV, batch.targets)
    return (nats_BT * batch.weights).sum() / batch.weights.sum()


def schedule(cell: Options) -> optax.Schedule:
    """Linear warm-up and a cosine to a hundredth of the learning rate."""
    [rate] = cell.learning_rates
    warmup = min(cell.warmup, cell.steps // 2)
    return optax.warmup_cosine_decay_schedule(rate / (warmup + 1), rate, warmup, cell.steps, rate / 100)


def optimizer(cell: Options) -> optax.GradientTransformation:
    """Clipped AdamW under `schedule`."""
    [decay] = cell.weight_decays
    adamw = optax.adamw(schedule(cell), b1=0.9, b2=0.95, weight_decay=decay, mask=decay_mask)
    return optax.chain(optax.clip_by_global_norm(cell.clip), adamw)


def make_step(model: Model, loss: Callable[[jax.Array, Batch], jax.Array], tx: optax.GradientTransformation) -> Any:
    """`step(params, opt_state, batch) -> (params, opt_state, loss, gradient norm)`, jitted, arguments donated."""

    def step(params: Any, opt_state: Any, batch: Batch):
        value, grads = jax.value_and_grad(lambda p: loss(model.apply(p, jnp.asarray(batch.tokens)), batch))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value, optax.tree.norm(grads)

    return jax.jit(step, donate_argnums=(0, 1))


def start(model: Model, tx: optax.GradientTransformation, seed: int) -> tuple[Any, Any]:
    """Parameters and optimizer state before the first step."""

    def init():
        # A weakly typed leaf would be strong after the first update, and the step would compile a second time.
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), model.init(jax.random.key(seed)))
        return params, tx.init(params)

    return jax.jit(init)()


def train(
    model: Model,
    batches: Iterator[Batch],
    loss: Callable[[jax.Array, Batch], jax.Array],
    evaluate: Callable[[Any], Scores],
    cell: Options,
    *,
    tx: optax.GradientTransformation | None = None,
    label: str = "",
    console: Console | None = None,
) -> Trained:
    """Trains until `steps`, or until every share among the scores reaches `stop_at`.

    Args:
      model: what is trained.
      batches: an endless stream of batches of one shape.
      loss: (outputs, batch) -> scalar.
      evaluate: params -> scores, called every `eval_every` steps and at the end.
      cell: the options of one cell.
      tx: the optimizer; None takes that of `optimizer(cell)`.
      label: name of the run, for the display.
      console: where to show progress; None shows nothing.

    Returns:
      A `Trained`. A loss or gradient that is infinite or not a number ends the run; `failed` says at which step.
    """
    [seed] = cell.seeds
    tx = tx or optimizer(cell)
    step = make_step(model, loss, tx)
    params, opt_state = start(model, tx, seed)
    batch = next(batches)
    curve: list[tuple[int, Scores]] = []
    times: list[tuple[float, float]] = []  # wall clock and processor time of each step
    failed = None
    with _Display(console or Console(quiet=True), label, cell.steps) as display:
        for taken in range(1, cell.steps + 1):
            began = time.perf_counter(), time.process_time()
            params, opt_state, *numbers = step(params, opt_state, batch)
            batch = next(batches)  # made while the device works
            value, norm = map(float, numbers)
            times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
            if not (math.isfinite(value) and math.isfinite(norm)):
                failed = f"not finite at step {taken}: loss {value:g}, gradient norm {norm:g}"
                break
            display.update(taken, value)
            if taken % cell.eval_every == 0 or taken == cell.steps:
                curve.append((taken, evaluate(params)))
                display.evaluated(taken, curve[-1][1])
                if cell.stop_at is not None and _all_reach(curve[-1][1], cell.stop_at):
                    break
    seconds, cpu_seconds = (sum(column[1:]) for column in zip(*times, strict=True))
    speed = batch.tokens.size * (len(times) - 1) / seconds if seconds else None
    return Trained(params, len(times), curve, seconds, cpu_seconds, times[0][0], speed, failed)


def summed(measure: Callable[[Any, Batch], Any], params: Any, batches: Sequence[Batch]) -> Any:
    """The sums over test batches of what `measure(params, batch)`, a jitted function, counts in each."""
    counts = [measure(params, batch) for batch in batches]
    return jax.tree.map(lambda *leaves: np.sum([np.asarray(leaf) for leaf in leaves], axis=0), *counts)


def in_bits(score: str) -> bool:
    """Whether a score of this name is a number of bits per byte, of which fewer are better, and not a share."""
    return score.startswith("bits")


def show_score(score: str, value: float) -> str:
    """Shares in percent, bits as they are.

    >>> show_score("accuracy", 0.982), show_score("bits_per_byte", 2.4876)
    ('98.2', '2.488')
    """
    return f"{value:.3f}" if in_bits(score) else f"{100 * value:.1f}"


def percent(scores: Mapping[str, float]) -> str:
    """ "bin0 98.2  bin1 10.1" for shares; bits are not in percent."""
    return "  ".join(f"{name} {show_score(name, value)}" for name, value in scores.items())


def _all_reach(scores: Scores, least: float) -> bool:
    shares = [value for name, value in scores.items() if not in_bits(name)]
    return bool(shares) and min(shares) >= least


def say(console: Console, text: str) -> None:
    """Prints one line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Display:
    """A live line on a terminal, a line per evaluation anywhere."""

    def __init__(self, console: Console, label: str, steps: int):
        self.console, self.label, self.steps = console, label, steps
        self._progress = Progress(
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task(label, total=steps, loss="compiling ...")

    def update(self, step: int, loss: float) -> None:
        self._progress.update(self._task, completed=step, loss=f"loss {loss:.4f}")

    def evaluated(self, step: int, scores: Scores) -> None:
        say(self.console, f"{self.label}  step {step}/{self.steps}  {percent(scores)}")

    def __enter__(self) -> "_Display":
        self._progress.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._progress.stop()
