"""`hope data inspect`: what a run would read, in numbers and in three samples."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hope_jax.training.config import TrainConfig
from hope_jax.training.corpus import Corpus
from hope_jax.training.data import Batches, DocumentBatches, LaneBatches, training_batches
from hope_jax.training.mixture import Mixture, load_mixture
from hope_jax.training.overrides import apply_overrides
from hope_jax.training.packing import Batch, efficiency
from hope_jax.training.presets import PRESETS, preset
from hope_jax.training.vocabulary import BYTES, load_vocabulary

SAMPLES = 3
SHOWN = 400  # tokens of a sample
BEGINS, CUT = "▐", "…"  # before a document, and before what is not its beginning


def inspect(what: str, overrides: Sequence[str], console: Console) -> None:
    """Prints what a run of a config would read.

    Args:
      what: a preset, or a source as in `data=`.
      overrides: key=value.
      console: where to.
    Raises:
      UserError: the config or a source cannot be used.
    """
    if what in PRESETS:
        config = preset(what, overrides)
    else:
        config = apply_overrides(TrainConfig(data=what), [*overrides, *_vocabulary_size(overrides)])
    mixture = load_mixture(config, lambda line: console.print(line, markup=False))
    batches = [training_batches(_alone(corpus, mixture), config) for corpus in mixture.corpora]
    console.print(_table(mixture, config, batches))
    console.print(
        f"{mixture.vocabulary.name}: {mixture.vocabulary.size:,} tokens; steps of {config.batch_size} x "
        f"{config.seq_len}; in the samples {BEGINS} begins a document and {CUT} goes on with one",
        markup=False,
    )
    for i in range(SAMPLES):
        corpus = mixture.corpora[i % len(mixture.corpora)]
        console.rule(f"sample {i + 1}: {corpus.name}")
        console.print(_sample(corpus, mixture, config, i))
    console.rule()


def _vocabulary_size(overrides: Sequence[str]) -> list[str]:
    """Without a preset there is no model to fit: its vocabulary is that of the tokenizer."""
    given = {key: value for key, _, value in (override.partition("=") for override in overrides)}
    tokenizer = given.get("tokenizer", BYTES)
    if tokenizer == BYTES or "model.vocab_size" in given:
        return []
    return [f"model.vocab_size={load_vocabulary(tokenizer).size}"]


def _alone(corpus: Corpus, mixture: Mixture) -> Mixture:
    return Mixture((corpus,), (1.0,), mixture.vocabulary)


def _table(mixture: Mixture, config: TrainConfig, batches: Sequence[Batches]) -> Table:
    table = Table(title=f"Training text, documents={config.documents}", title_justify="left")
    table.add_column("")
    for corpus in mixture.corpora:
        table.add_column(corpus.name, justify="right")
    columns = []
    for corpus, share, made in zip(mixture.corpora, mixture.shares, batches, strict=True):
        columns.append(
            {
                "share of the rows": f"{share:.1%}",
                "documents": f"{corpus.train_starts.size:,}",
                "tokens": f"{corpus.train.size:,}",
                "bytes per token": f"{_alone(corpus, mixture).bytes_per_token('train'):.2f}",
                "packing efficiency": f"{_packing(made):.1%}",
                "steps per epoch": f"{_steps(made) / share:,.0f}",
                "held out: documents": f"{corpus.validation_starts.size:,}",
                "held out: tokens": f"{corpus.validation.size:,}",
            }
        )
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _packing(made: Any) -> float:
    """Share of the places in all windows that predict a token."""
    if isinstance(made, DocumentBatches):
        return efficiency(made.pieces, made.length)
    if isinstance(made, LaneBatches):
        [lanes] = made.lanes
        return lanes.targets / (lanes.steps * lanes.lanes * lanes.length)
    return 1.0  # windows are cut anywhere


def _steps(made: Any) -> float:
    """Steps that an epoch takes when every row is of this text."""
    return made.lanes[0].steps if isinstance(made, LaneBatches) else made.windows / made.batch


class _Places:
    """Stands for a text: the token at a place is the place, so that batches of it say what is read from where."""

    def __init__(self, size: int):
        self.size, self.dtype = size, np.dtype(np.int64)

    def __getitem__(self, part: slice) -> np.ndarray:
        return np.arange(*part.indices(self.size))


def _sample(corpus: Corpus, mixture: Mixture, config: TrainConfig, row: int) -> Text:
    """What a row of the first step reads, its documents marked."""
    places: Any = _Places(corpus.train.size)
    rows = training_batches(_alone(corpus._replace(train=places), mixture), config)
    batch = rows.rows(0, [row % config.batch_size])
    read = batch.tokens[batch.weights > 0] if isinstance(batch, Batch) else batch[0, :-1]
    read = read[:SHOWN]
    first = np.isin(read, corpus.train_starts)
    cuts = np.flatnonzero(first | (np.diff(read, prepend=-2) != 1))
    text = Text()
    for begin, end in zip(cuts, [*cuts[1:], read.size], strict=True):
        tokens = [int(corpus.train[place]) for place in read[begin:end]]
        text.append(BEGINS if first[begin] else CUT, style="bold red")
        text.append(mixture.vocabulary.decode([token for token in tokens if token != mixture.vocabulary.end]))
    return text
