"""MAD, the mechanistic design benchmark: five small tasks, each at several difficulties.

    python -m experiments.mad [--difficulties small] [--models hope ...] [--tiny]

A difficulty changes one thing of a task's baseline: vocabulary, length, number of training examples, tokens to copy.
A task's score is the mean over its difficulties, for each the best of the learning rates and weight decays tried.
`--difficulties` takes "baseline" (5 settings), "small" (15: the baselines and the next harder of each kind but
length), "full" (the benchmark's 52), a task with all of its settings, or one setting such as `compression:vocab=32`.
The benchmark's own protocol is

    python -m experiments.mad --difficulties full --epochs 200 --batch-size 128 --dim 128
        --learning-rates 1e-4 5e-4 1e-3 --weight-decays 0 0.1

"score" is the benchmark's: accuracy averaged over classes, in which a class that is predicted but never right counts
as zero; "accuracy" is over positions. Benchmark: Poli et al. 2024, arXiv:2403.17844.

Cost of a cell at the defaults, compilation apart, in minutes of one core (Intel Xeon): under 0.5 at 32 tokens, 0.6
(transformer) to 2 (titans) at 128, 3 to 5 at 256 (selective copying). In-context recall at length 32: delta_net 91%
after 300 steps at learning rate 1e-2; the transformer, which has no short convolution, 35% after 600.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments import mad_tasks
from experiments.autoencoder import autoencoder
from experiments.options import TEST_SEED, TINY_RESULTS, Options, model_config
from experiments.running import Job, main
from experiments.training import Batch, Scores, cross_entropy, language_model, summed
from hope_jax.training.errors import UserError
from hope_jax.training.overrides import unknown

BASELINE = "baseline"


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """One setting of a task."""

    vocab: int = 16
    length: int = 128
    examples: int = 12_800
    copies: int = 0


_SPREAD = {"vocab": (32, 64, 128), "length": (256, 512, 1024), "examples": (6400, 3200, 1600, 800)}
TASKS: dict[str, tuple[Difficulty, dict[str, tuple[int, ...]]]] = {
    "compression": (Difficulty(length=32), _SPREAD | {"length": (64, 128, 256)}),
    "in_context_recall": (Difficulty(), _SPREAD),
    "fuzzy_recall": (Difficulty(), _SPREAD),
    "selective_copying": (
        Difficulty(length=256, copies=16),
        _SPREAD | {"length": (512, 1024), "copies": (32, 64, 96)},
    ),
    "memorisation": (Difficulty(vocab=256, length=32, examples=256), {"vocab": (512, 1024, 2048, 4096, 8192)}),
}


def expand(name: str) -> list[str]:
    """A subset, a task or a setting -> names of settings, "task:baseline" or "task:kind=value".

    >>> len(expand("baseline")), len(expand("small")), len(expand("full")), len(expand("memorisation"))
    (5, 15, 52, 6)

    Raises:
      UserError: there is no such task or kind, or the value is not a number.
    """
    if name in ("baseline", "small", "full"):
        return [setting for task in TASKS for setting in _settings(task, name)]
    if name in TASKS:
        return _settings(name, "full")
    difficulty(name)  # refuses what does not exist
    return [name]


def _settings(task: str, subset: str) -> list[str]:
    """Those of one task, the baseline first."""
    changes = {
        "baseline": {},
        "small": {kind: values[:1] for kind, values in TASKS[task][1].items() if kind != "length"},
        "full": TASKS[task][1],
    }[subset]
    return [f"{task}:{BASELINE}", *(f"{task}:{kind}={n}" for kind in changes for n in changes[kind])]


def difficulty(setting: str) -> Difficulty:
    """What "task:kind=value" describes; any value is allowed.

    >>> difficulty("compression:vocab=32")
    Difficulty(vocab=32, length=32, examples=12800, copies=0)
    """
    task, _, change = setting.partition(":")
    if task not in TASKS:
        raise UserError(unknown("task", task, ["baseline", "small", "full", *TASKS]))
    base = TASKS[task][0]
    kinds = [field.name for field in dataclasses.fields(base)]
    changes = {}
    for part in change.split(",") if change != BASELINE else []:
        kind, _, value = part.partition("=")
        if kind not in kinds or not value.isdecimal():
            raise UserError(f"{setting!r} is not a setting; write task:kind=number, kinds: {', '.join(kinds)}")
        changes[kind] = int(value)
    return dataclasses.replace(base, **changes)


@dataclasses.dataclass(frozen=True)
class MadOptions(Options):
    """MAD tasks.

    Attributes:
      difficulties: subsets, tasks or single settings.
      epochs: passes over the training examples, in the place of `steps`; none = `steps` decides.
      test_examples: fixed examples that are scored, in batches of 128 (a last one is filled).
    """

    difficulties: tuple[str, ...] = ("small",)
    models: tuple[str, ...] = ("transformer", "rwkv7", "comba", "titans", "hope")
    chunks: tuple[int, ...] = (16,)
    learning_rates: tuple[float, ...] = (5e-3,)
    batch_size: int = 16
    steps: int = 1500
    eval_every: int = 500
    dim: int = 32
    epochs: int | None = None
    test_examples: int = 1280

    GRID: ClassVar[tuple[str, ...]] = ("difficulties", *Options.GRID)
    COUNTS: ClassVar[tuple[str, ...]] = ("test_examples", *Options.COUNTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        settings = [setting for name in self.difficulties for setting in expand(name)]
        object.__setattr__(self, "difficulties", tuple(dict.fromkeys(settings)))
        for setting in self.difficulties:
            level = difficulty(setting)
            shortest = mad_tasks.shortest(setting.partition(":")[0], level.copies)
            if level.length < shortest:
                raise UserError(f"{setting} needs length={shortest} or more; got {level.length}")


TINY = MadOptions(
    difficulties=("compression:length=8", "fuzzy_recall:length=24,examples=64"),
    models=("transformer",),
    steps=2,
    eval_every=2,
    batch_size=4,
    dim=16,
    layers=1,
    chunks=(4,),
    test_examples=8,
    results=TINY_RESULTS,
)


def examples(task: str, level: Difficulty, rng: np.random.Generator, count: int, *, training: bool) -> Batch:
    """`count` examples of a task."""
    sizes = {"vocab": level.vocab, "length": level.length}
    match task:
        case "compression":
            return mad_tasks.compression(rng, count, **sizes)
        case "in_context_recall":
            return mad_tasks.in_context_recall(rng, count, training=training, **sizes)
        case "fuzzy_recall":
            return mad_tasks.fuzzy_recall(rng, count, training=training, **sizes)
        case "selective_copying":
            return mad_tasks.selective_copying(rng, count, copies=level.copies, **sizes)
        case _:
            return mad_tasks.memorisation(rng, count, **sizes)


def epochs(pool: Batch, rng: np.random.Generator, batch_size: int) -> Iterator[Batch]:
    """Batches of a finite set, for ever: every example once per epoch, in a new order each time."""
    waiting = np.zeros(0, int)
    while True:
        while waiting.size < batch_size:
            waiting = np.concatenate([waiting, rng.permutation(len(pool.tokens))])
        rows, waiting = np.split(waiting, [batch_size])
        yield Batch(*(array[rows] for array in pool))


def class_counts(logits_BTV: jax.Array, batch: Batch) -> jax.Array:
    """[3, V] float32: per class the weight of right positions, of targets, of predictions."""
    vocab = logits_BTV.shape[-1]
    guess_BT = logits_BTV.argmax(axis=-1)
    targets_BT, weights_BT = jnp.asarray(batch.targets), jnp.asarray(batch.weights)

    def count(classes_BT: jax.Array, weight_BT: jax.Array) -> jax.Array:
        return jnp.zeros(vocab).at[classes_BT.ravel()].add(weight_BT.ravel())

    right_BT = (guess_BT == targets_BT) * weights_BT
    return jnp.stack([count(targets_BT, right_BT), count(targets_BT, weights_BT), count(guess_BT, weights_BT)])


def scores(counts: np.ndarray) -> Scores:
    """Accuracy over classes that occur as target or prediction, and over positions."""
    right, target, guess = counts
    occurring = (target + guess) > 0
    per_class = right[occurring] / np.maximum(target[occurring], 1)
    return {"score": float(per_class.mean()), "accuracy": float(right.sum() / target.sum())}


def prepare(cell: MadOptions) -> Job:
    """What one cell computes."""
    [setting], [seed] = cell.difficulties, cell.seeds
    task, _, change = setting.partition(":")
    level = difficulty(setting)
    rng = np.random.default_rng(seed)
    pool = examples(task, level, rng, level.examples, training=True)
    rows = min(cell.test_examples, 128)
    held_out = np.random.default_rng(TEST_SEED)
    tests = [examples(task, level, held_out, rows, training=False) for _ in range(-(-cell.test_examples // rows))]
    config = model_config(cell, vocab_size=level.vocab, length=level.length)
    model = autoencoder(config, level.length) if task == "compression" else language_model(config)
    measure = jax.jit(lambda params, batch: class_counts(model.apply(params, batch.tokens), batch))

    def evaluate(params: Any) -> Scores:
        return scores(summed(measure, params, tests))

    steps = cell.steps if cell.epochs is None else -(-cell.epochs * level.examples // cell.batch_size)
    trained = dataclasses.replace(cell, steps=steps)
    batches = epochs(pool, rng, cell.batch_size)
    # A setting of one's own is no part of the benchmark's mean.
    column = task if setting in expand(task) else f"{task}, {change}"
    return Job(column, change, config, model, batches, cross_entropy, evaluate, trained)


if __name__ == "__main__":
    main("mad", MadOptions, TINY, prepare)
