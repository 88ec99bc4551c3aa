"""Multi-query associative recall: how many key-value pairs does a state of a given size keep?

    python -m experiments.mqar [--pairs 4 8 16] [--widths 16 32 64] [--models hope ...] [--tiny]

A sequence opens with `pairs` distinct keys, each followed by its value. After that every key comes once more, and at
that position its value must be predicted; gaps follow a power law with exponent a - 1, a = 0.01, all other tokens
are the filler 0. Accuracy is over the query positions of 1,000 fixed sequences. The report draws accuracy against the
bytes of recurrent state of one sequence, one curve per model over its widths. Task as in zoology (Arora et al. 2023,
arXiv:2312.04927), there with 8,192 tokens and up to 512 positions: `--vocab 8192 --length 512 --pairs 64`.

Cost of 1,000 steps at the defaults and width 64, compilation apart, in minutes of one core (AMD EPYC): 4 (transformer),
6 (delta_net), 13 (hope). With 3 pairs, 24 tokens and width 32 delta_net reaches 99% within 300 steps.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments.options import TEST_SEED, TINY_RESULTS, Options, model_config
from experiments.running import Job, main
from experiments.training import Batch, Model, Scores, cross_entropy, language_model, summed
from hope_jax.training.errors import UserError

FILLER = 0
POWER = 0.01


@dataclasses.dataclass(frozen=True)
class RecallOptions(Options):
    """Multi-query associative recall.

    Attributes:
      pairs: key-value pairs per sequence.
      widths: of the model, in the place of `dim`.
      vocab: number of tokens: the filler, vocab / 2 - 1 keys, vocab / 2 values.
      length: tokens per sequence.
      test_sequences: fixed sequences that are scored.
    """

    pairs: tuple[int, ...] = (4, 8, 16)
    widths: tuple[int, ...] = (16, 32, 64)
    models: tuple[str, ...] = ("transformer", "linear_attention", "delta_net", "gated_delta_net", "hope")
    chunks: tuple[int, ...] = (16,)
    stop_at: float | None = 0.99
    vocab: int = 128
    length: int = 128
    test_sequences: int = 1000

    GRID: ClassVar[tuple[str, ...]] = ("pairs", "widths", *Options.GRID)
    COUNTS: ClassVar[tuple[str, ...]] = ("test_sequences", *Options.COUNTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        for pairs in self.pairs:
            if 4 * pairs > self.length or pairs > self.vocab // 2 - 1:
                raise UserError(
                    f"{pairs} pairs need a length of {4 * pairs} and a vocab of {2 * pairs + 2} at least; got length "
                    f"{self.length} and vocab {self.vocab}"
                )


TINY = RecallOptions(
    pairs=(2,),
    widths=(16,),
    models=("transformer",),
    steps=4,
    eval_every=2,
    layers=1,
    batch_size=4,
    vocab=16,
    length=16,
    chunks=(4,),
    test_sequences=32,
    results=TINY_RESULTS,
)


def sequences(rng: np.random.Generator, count: int, *, pairs: int, vocab: int, length: int) -> Batch:
    """`count` sequences; the target of a query is its value, and only queries have weight."""
    keys_BP = 1 + _distinct(rng, count, np.ones(vocab // 2 - 1), pairs)
    values_BP = vocab // 2 + _distinct(rng, count, np.ones(vocab - vocab // 2), pairs)
    gaps = np.arange(1, (length - 2 * pairs) // 2 + 1)
    query_BP = 2 * pairs + 2 * _distinct(rng, count, gaps ** (POWER - 1), pairs)
    tokens_BT = np.full((count, length), FILLER, np.int32)
    tokens_BT[:, 0 : 2 * pairs : 2] = keys_BP
    tokens_BT[:, 1 : 2 * pairs : 2] = values_BP
    targets_BT = np.zeros((count, length), np.int32)
    weights_BT = np.zeros((count, length), np.float32)
    np.put_along_axis(tokens_BT, query_BP, keys_BP, axis=1)
    np.put_along_axis(targets_BT, query_BP, values_BP, axis=1)
    np.put_along_axis(weights_BT, query_BP, 1, axis=1)
    return Batch(tokens_BT, targets_BT, weights_BT)


def _distinct(rng: np.random.Generator, rows: int, weights: np.ndarray, count: int) -> np.ndarray:
    """[rows, count] indices drawn one after the other with these weights, none twice in a row.

    Ordering by exponential waiting times with rates `weights` is drawing without replacement.
    """
    waiting = rng.exponential(size=(rows, weights.size)) / weights
    return waiting.argsort(axis=1)[:, :count]


def stream(cell: RecallOptions) -> Iterator[Batch]:
    """Training batches of a cell, for ever."""
    [pairs], [seed] = cell.pairs, cell.seeds
    rng = np.random.default_rng(seed)
    while True:
        yield sequences(rng, cell.batch_size, pairs=pairs, vocab=cell.vocab, length=cell.length)


def held_out(cell: RecallOptions) -> list[Batch]:
    """The fixed test sequences, in batches of one shape."""
    [pairs] = cell.pairs
    rng = np.random.default_rng(TEST_SEED)
    rows = min(cell.test_sequences, 100)
    return [
        sequences(rng, rows, pairs=pairs, vocab=cell.vocab, length=cell.length)
        for _ in range(-(-cell.test_sequences // rows))
    ]


def hits(logits_BTV: jax.Array, batch: Batch) -> jax.Array:
    """[2] float32: the weight of the positions that are right, and of all."""
    right_BT = logits_BTV.argmax(axis=-1) == batch.targets
    return jnp.stack([(right_BT * batch.weights).sum(), jnp.asarray(batch.weights).sum()])


def evaluation(cell: RecallOptions, model: Model) -> Callable[[Any], Scores]:
    """params -> scores of a model on the test sequences of a cell."""
    tests = held_out(cell)
    measure = jax.jit(lambda params, batch: hits(model.apply(params, batch.tokens), batch))

    def evaluate(params: Any) -> Scores:
        right, every = summed(measure, params, tests)
        return {"accuracy": float(right / every)}

    return evaluate


def prepare(cell: RecallOptions) -> Job:
    """What one cell computes."""
    [pairs], [width] = cell.pairs, cell.widths
    cell = dataclasses.replace(cell, dim=width)
    config = model_config(cell, vocab_size=cell.vocab, length=cell.length)
    model = language_model(config)
    evaluate = evaluation(cell, model)
    return Job(f"{pairs} pairs, D {width}", "", config, model, stream(cell), cross_entropy, evaluate, cell)


if __name__ == "__main__":
    main("mqar", RecallOptions, TINY, prepare)
