"""Does more context help? Bits per byte against the place in the context, far beyond the training length.

    python -m experiments.context_use [--models hope ...] [--context 2048] [--data FILE] [--tiny]

A byte language model is trained on windows of `length` bytes and tested on windows of `context` bytes, read piece by
piece with the recurrent state. "bits_from_64" is the mean over bytes with 64 to 127 bytes before them in the window.
A model that manages its memory well goes down all the way; one that does not goes up again somewhere beyond the
training length. The same windows of held-out text, spread over all of it, are read by every model, so compare models
at one place, and one model between places only by what exceeds the spread of the text: the first places average over
16 bytes of each window, the last over half of it.

The report draws the curves (plots/context_use_curve.png).

Cost of 1,000 steps at the defaults, compilation apart, in minutes of one core (AMD EPYC): 10 (transformer), 11 (hope).
The held-out text has 6.9 bits per byte at every place after 6 steps; a curve with a slope needs some hundreds.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import text
from experiments.options import BYTES, TINY_RESULTS, Options, model_config
from experiments.published import FROM
from experiments.running import Job, main
from experiments.streaming import Reader, reader, split
from experiments.training import Scores, cross_entropy, language_model
from hope_jax.models import ARCHITECTURES
from hope_jax.training import documents
from hope_jax.training.errors import UserError

FIRST = 16  # bytes of the first bin; every later one begins where twice as much has been read


@dataclasses.dataclass(frozen=True)
class ContextOptions(Options):
    """Loss against the place in the context.

    Attributes:
      length: bytes of a training window.
      context: bytes of a test window.
      data: the text, "embedded" or a file.
      test_windows: how many, spread evenly over the held-out text.
    """

    models: tuple[str, ...] = tuple(ARCHITECTURES)
    chunks: tuple[int, ...] = (16,)
    batch_size: int = 8
    length: int = 512
    context: int = 2048
    data: str = "embedded"
    test_windows: int = 64
    eval_every: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context < 1 or self.test_windows < 1:
            raise UserError(f"context and test_windows must be at least 1; got {self.context}, {self.test_windows}")


TINY = ContextOptions(
    models=("transformer",),
    steps=2,
    eval_every=2,
    dim=16,
    layers=1,
    batch_size=2,
    length=32,
    context=64,
    test_windows=2,
    results=TINY_RESULTS,
)


def windows(held_out: np.ndarray, count: int, context: int) -> np.ndarray:
    """[count, context + 1] uint8, evenly spread over a text, overlapping where it is short.

    Raises:
      UserError: the text is shorter than one window.
    """
    if held_out.size <= context:
        raise UserError(f"the held-out text has {held_out.size} bytes; lower --context {context} or give a longer one")
    begins = np.linspace(0, held_out.size - context - 1, count).astype(int)
    return held_out[begins[:, None] + np.arange(context + 1)]


@jax.jit
def bits(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """[T]: of each place, the mean over rows."""
    return documents.cross_entropy(logits_BTV, targets_BT).mean(axis=0) / math.log(2)


def by_place(read: Reader, params: Any, windows_BT: np.ndarray) -> np.ndarray:
    """[T] bits per byte of each place of the windows."""
    batch = text.next_byte(windows_BT)
    pieces, targets = split(batch.tokens, read.size), split(batch.targets, read.size)
    return np.concatenate(
        [bits(logits, jnp.asarray(ts)) for (_, logits), ts in zip(read.read(params, pieces), targets, strict=True)]
    )


def binned(bits_T: np.ndarray) -> Scores:
    """The mean of all places and of each bin.

    >>> binned(np.array([8.0] * 16 + [4.0] * 16))
    {'bits': 6.0, 'bits_from_0': 8.0, 'bits_from_16': 4.0}
    """
    begins = [0, *(FIRST * 2**i for i in range(64) if FIRST * 2**i < bits_T.size)]
    parts = np.split(bits_T, begins[1:])
    means = {f"{FROM}{begin}": float(part.mean()) for begin, part in zip(begins, parts, strict=True)}
    return {"bits": float(bits_T.mean()), **means}


def prepare(cell: ContextOptions) -> Job:
    """What one cell computes."""
    [seed] = cell.seeds
    corpus = text.corpus(cell.data)
    config = model_config(cell, vocab_size=BYTES, length=cell.length)
    config = dataclasses.replace(config, max_length=max(cell.length, cell.context))
    read, tests = reader(config), windows(corpus.validation, cell.test_windows, cell.context)

    def evaluate(params: Any) -> Scores:
        return binned(by_place(read, params, tests))

    batches = text.stream(corpus.train, seed, cell.batch_size, cell.length)
    return Job(cell.data, "", config, language_model(config), batches, cross_entropy, evaluate, cell)


if __name__ == "__main__":
    main("context_use", ContextOptions, TINY, prepare)
