"""Text for the experiments that need some: background for documents, and batches of a byte language model."""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.training import Batch, Model, Scores, cross_entropy, summed
from hope_jax.training.corpus import Corpus, file_corpus, load_corpus
from hope_jax.training.data import TrainBatches, eval_batches
from hope_jax.training.errors import UserError


@functools.cache
def corpus(data: str) -> Corpus:
    """ "embedded" or the path of a text file, or of a folder with one: its text in two halves that share nothing.

    Raises:
      UserError: there is no text at this path, or a folder does not hold exactly one file that ends in .txt.
    """
    if data != "embedded" and Path(data).is_dir():
        texts = sorted(Path(data).glob("*.txt"))
        if len(texts) != 1:
            names = ", ".join(path.name for path in texts) or "none"
            raise UserError(f"{data} should hold one .txt file; it holds {names}: give the path of a file")
        return file_corpus(texts[0])
    return load_corpus(data)


def stream(text: np.ndarray, seed: int, batch_size: int, length: int) -> Iterator[Batch]:
    """Windows of `length` bytes, each to be predicted from those before, for ever."""
    windows = TrainBatches(text, seed=seed, batch=batch_size, length=length)
    step = 0
    while True:
        yield next_byte(windows[step])
        step += 1


def next_byte(windows_BT: np.ndarray) -> Batch:
    """Every byte but the first is a target."""
    tokens_BT = windows_BT.astype(np.int32)
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], np.ones((len(tokens_BT), tokens_BT.shape[1] - 1), np.float32))


def windows(held_out: np.ndarray, *, rows: int, length: int, limit: int) -> list[Batch]:
    """A text in windows of `length`, in at most `limit` batches spread over it."""
    batches = eval_batches(held_out, batch=rows, length=length, limit=limit)
    return [next_byte(batch.tokens)._replace(weights=batch.weights) for batch in batches]


def evaluation(model: Model, held_out: np.ndarray, *, rows: int, length: int, limit: int) -> Callable[[Any], Scores]:
    """params -> bits per byte of a text in windows of `length`, in at most `limit` batches spread over it."""
    tests = windows(held_out, rows=rows, length=length, limit=limit)

    @jax.jit
    def measure(params: Any, batch: Batch) -> jax.Array:
        total = jnp.asarray(batch.weights).sum()
        return jnp.stack([cross_entropy(model.apply(params, jnp.asarray(batch.tokens)), batch) * total, total])

    def evaluate(params: Any) -> Scores:
        nats, count = summed(measure, params, tests)
        return {"bits_per_byte": float(nats / count) / math.log(2)}

    return evaluate
