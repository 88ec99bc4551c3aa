"""Matryoshka heads: what a prefix of a language model's final representation is worth, trained for it or not.

    python -m experiments.matryoshka --data FOLDER [--heads plain matryoshka] [--models transformer] [--tiny]

A byte language model is trained with the plain head, c = (0, 0, 0, 1), or with the prefixes D/8, D/4, D/2 and D of its
final representation each predicting the next byte through the shared rows of the head, c = (1, 1, 1, 1) / 4
(`hope_jax.models.matryoshka`, spec 11.5, arXiv:2205.13147). Of each prefix, as a share of D, is measured

    bits_1/8      bits per byte of the prefix on held-out text
    recall_1/8    of test sentences: is the nearest training sentence one of the same intent? Nearest by the cosine of
                  those channels in the mean over bytes of the representation, less the mean training sentence

FOLDER holds labelled sentences and is called clinc150 or banking77, with the files that `intents` reads. The model is
trained on the training sentences, shuffled, one a line and without their labels, but for the last tenth, which are the
held-out text. With --data embedded, the default, it is trained on the library's own text, and there is no recall.

The report draws the curves (plots/matryoshka_width.png).

CLINC150 (150 intents), a transformer of width 64 and two layers, 600 steps, one learning rate, mean of seeds 0, 1, 2:

    share of the width    bits: plain    matryoshka    recall, percent: plain    matryoshka
    1/8                   5.98           2.60          7.5                       7.9
    1/4                   4.75           2.39          18.1                      16.9
    1/2                   3.21           2.31          29.2                      24.8
    1                     2.25           2.29          37.5                      31.4

The standard deviations are up to 0.18 bits and 1.7 percent. Trained for it, a prefix of 1/8, 1/4 or 1/2 loses 0.31,
0.10 or 0.03 bits against the whole, which itself loses 0.03 by it (the plain runs spread by 0.05). To search with it is
no better: within the spread at 1/8 and 1/4, worse beyond. The steps of a run take 24 s of processor time (plain) and
26 s, without compilation and evaluation (Intel Xeon).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments import intents, text
from experiments.intents import DataSet, Labelled
from experiments.options import BYTES, TINY_RESULTS, Options, model_config
from experiments.published import PREFIXES
from experiments.running import Job, main
from experiments.training import Batch, Model, Scores, summed
from hope_jax.models import ModelConfig, matryoshka, matryoshka_losses, prefix_widths
from hope_jax.training.documents import cross_entropy
from hope_jax.training.errors import UserError
from hope_jax.training.overrides import unknown

HEADS = {"plain": (0.0, 0.0, 0.0, 1.0), "matryoshka": (0.25, 0.25, 0.25, 0.25)}
FOLDERS = ("clinc150", "banking77")
ROWS = 50  # sentences read at once


@dataclasses.dataclass(frozen=True)
class MatryoshkaOptions(Options):
    """Prefixes of a representation.

    Attributes:
      heads: names in `HEADS`.
      length: bytes of a window, in training and on held-out text.
      data: a folder of labelled sentences, or "embedded".
      test_batches: of held-out windows, at most.
      per_intent: training sentences of each intent that are searched, and half as many that are looked for.
      sentence: bytes of a sentence that are read; longer ones are cut.
    """

    models: tuple[str, ...] = ("transformer",)
    heads: tuple[str, ...] = tuple(HEADS)
    steps: int = 600
    batch_size: int = 8
    length: int = 128
    eval_every: int = 600
    data: str = "embedded"
    test_batches: int = 32
    per_intent: int = 20
    sentence: int = 64

    GRID: ClassVar[tuple[str, ...]] = ("models", "heads", "learning_rates", "weight_decays", "chunks", "seeds")

    def __post_init__(self) -> None:
        super().__post_init__()
        for head in self.heads:
            if head not in HEADS:
                raise UserError(unknown("head", head, list(HEADS)))


TINY = MatryoshkaOptions(
    heads=("matryoshka",),
    steps=2,
    eval_every=2,
    dim=16,
    layers=1,
    batch_size=2,
    length=16,
    test_batches=2,
    results=TINY_RESULTS,
)


@functools.cache
def labelled(folder: Path) -> DataSet:
    """Sentences to train on and to search in, and sentences to look for.

    Raises:
      UserError: the folder is not called after one of `FOLDERS`, or does not hold its files.
    """
    if folder.name not in FOLDERS:
        raise UserError(f"data {folder} is neither a folder {' nor '.join(FOLDERS)} of `intents`, nor embedded")
    return intents.load(folder.name, str(folder.parent))


def some(sentences: Labelled, per_intent: int) -> Labelled:
    """The first `per_intent` of every label.

    >>> some(Labelled(["a", "b", "c"], np.array([0, 0, 1])), 1).texts
    ['a', 'c']
    """
    order = np.argsort(sentences.labels_N, kind="stable")
    _, begins, counts = np.unique(sentences.labels_N[order], return_index=True, return_counts=True)
    places = np.concatenate([order[b : b + min(n, per_intent)] for b, n in zip(begins, counts, strict=True)])
    return Labelled([sentences.texts[i] for i in places], sentences.labels_N[places])


def lines(texts: Sequence[str]) -> np.ndarray:
    """One sentence a line, uint8."""
    return np.frombuffer("".join(f"{one}\n" for one in texts).encode(), np.uint8)


def vectors(read: Callable[[jax.Array], jax.Array], texts: Sequence[str], length: int) -> np.ndarray:
    """[N, D]: the mean of what `read` says of each byte of a sentence, which begins after a line break."""
    encoded = [f"\n{one}\n".encode()[:length] for one in texts]
    tokens_NT = np.zeros((-(-len(texts) // ROWS) * ROWS, length), np.int32)
    counts_N = np.ones(len(tokens_NT), int)
    for row, one in enumerate(encoded):
        tokens_NT[row, : len(one)] = list(one)
        counts_N[row] = len(one)
    mask_NT = np.arange(length) < counts_N[:, None]
    pooled = [
        np.einsum("btd,bt->bd", read(jnp.asarray(tokens_NT[i : i + ROWS])), mask_NT[i : i + ROWS])
        for i in range(0, len(tokens_NT), ROWS)
    ]
    return (np.concatenate(pooled) / counts_N[:, None])[: len(texts)]


def recall(searched: np.ndarray, labels: np.ndarray, wanted: np.ndarray, intents: np.ndarray) -> float:
    """The share of `wanted` [M, D] whose nearest of `searched` [N, D] by cosine has its label.

    >>> points = np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> recall(points, np.array(["a", "b"]), np.array([[3.0, 1.0], [2.0, 1.0]]), np.array(["a", "b"]))
    0.5
    """
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (searched, wanted)]
    return float((labels[(unit[1] @ unit[0].T).argmax(axis=1)] == intents).mean())


def evaluation(config: ModelConfig, model: Model, held_out: np.ndarray, cell: MatryoshkaOptions) -> Callable:
    """params -> bits, and recall where there are labels, of every prefix."""
    windows = text.windows(held_out, rows=cell.batch_size, length=cell.length, limit=cell.test_batches)
    widths = prefix_widths(config, len(PREFIXES))

    @jax.jit
    def measure(params: Any, batch: Batch) -> jax.Array:
        _, logits = model.apply(params, jnp.asarray(batch.tokens))
        nats = [(cross_entropy(one, batch.targets) * batch.weights).sum() for one in logits]
        return jnp.stack([*nats, jnp.asarray(batch.weights).sum()])

    read = jax.jit(lambda params, tokens_BT: model.apply(params, tokens_BT)[0])

    def evaluate(params: Any) -> Scores:
        *nats, count = summed(measure, params, windows)
        scores = {f"bits_{share}": float(n / count) / math.log(2) for share, n in zip(PREFIXES, nats, strict=True)}
        if cell.data == "embedded":
            return scores
        data = labelled(Path(cell.data))
        searched, wanted = some(data.train, cell.per_intent), some(data.test, -(-cell.per_intent // 2))
        one, two = (vectors(functools.partial(read, params), s.texts, cell.sentence) for s in (searched, wanted))
        mean = one.mean(axis=0)
        for share, m in zip(PREFIXES, widths, strict=True):
            cut = ((one - mean)[:, :m], searched.labels_N, (two - mean)[:, :m], wanted.labels_N)
            scores[f"recall_{share}"] = recall(*cut)
        return scores

    return evaluate


def prefix_model(config: ModelConfig) -> Model:
    """The language model of `config` that returns its representation and the logits of every prefix."""
    lm = matryoshka(config, len(PREFIXES))

    def apply(params: Any, tokens_BT: jax.Array) -> Any:
        return lm.apply(params, lm.init_state(params, tokens_BT.shape[0]), tokens_BT, phase=0)[1]

    return Model(lm.init, apply)


def texts_of(data: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on and held-out ones."""
    if data == "embedded":
        corpus = text.corpus(data)
        return corpus.train, corpus.validation
    texts = labelled(Path(data)).train.texts
    shuffled = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    kept = len(texts) * 9 // 10
    return lines(shuffled[:kept]), lines(shuffled[kept:])


def prepare(cell: MatryoshkaOptions) -> Job:
    """What one cell computes."""
    [name], [head], [seed] = cell.models, cell.heads, cell.seeds
    config = model_config(cell, vocab_size=BYTES, length=max(cell.length, cell.sentence))
    train, held_out = texts_of(cell.data)
    try:
        model = prefix_model(config)
    except ValueError as error:
        raise UserError(str(error)) from error

    def loss(outputs: Any, batch: Batch) -> jax.Array:
        losses_BT = matryoshka_losses(HEADS[head], outputs, jnp.asarray(batch.targets))
        return (losses_BT * batch.weights).sum() / batch.weights.sum()

    batches = text.stream(train, seed, cell.batch_size, cell.length)
    column = f"{name}, {Path(cell.data).name}"
    return Job(column, "", config, model, batches, loss, evaluation(config, model, held_out, cell), cell, row=head)


if __name__ == "__main__":
    main("matryoshka", MatryoshkaOptions, TINY, prepare)
