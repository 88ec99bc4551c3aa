"""What a run reads: the corpora that `data` names, each with its share."""

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hope_jax.training.corpus import Corpus, load_corpus
from hope_jax.training.errors import UserError
from hope_jax.training.ingest import ingest
from hope_jax.training.sources import EMBEDDED, is_table, parse_sources
from hope_jax.training.vocabulary import BYTES, Vocabulary, load_vocabulary

if TYPE_CHECKING:
    from hope_jax.training.config import TrainConfig


class Mixture(NamedTuple):
    """One corpus or several; validation reads all of them, one after the other."""

    corpora: tuple[Corpus, ...]
    shares: tuple[float, ...]  # of the training windows, all above 0, sum 1
    vocabulary: Vocabulary

    @property
    def name(self) -> str:
        """The names, with the shares if there are several."""
        if len(self.corpora) == 1:
            return self.corpora[0].name
        return ", ".join(f"{corpus.name} {share:.1%}" for corpus, share in zip(self.corpora, self.shares, strict=True))

    @property
    def validation(self) -> np.ndarray:
        """[tokens], of all corpora."""
        parts = [corpus.validation for corpus in self.corpora]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @property
    def validation_starts(self) -> np.ndarray:
        """[documents] int64, where each begins in `validation`."""
        before = np.cumsum([0, *(corpus.validation.size for corpus in self.corpora)])
        parts = [corpus.validation_starts + first for corpus, first in zip(self.corpora, before, strict=False)]
        return np.concatenate(parts)

    @property
    def train_tokens(self) -> int:
        """Tokens of training text."""
        return sum(corpus.train.size for corpus in self.corpora)

    @property
    def seen_bytes(self) -> list[int]:
        """The byte values (or tokens) that occur in training, ascending."""
        return sorted(set().union(*(corpus.seen_bytes for corpus in self.corpora)))

    @property
    def sha256(self) -> str:
        """A fingerprint of all text."""
        parts = [corpus.sha256 for corpus in self.corpora]
        return parts[0] if len(parts) == 1 else hashlib.sha256(json.dumps([parts, self.shares]).encode()).hexdigest()

    def bytes_per_token(self, half: str) -> float:
        """Bytes of text per token of "train" (as they are mixed) or "validation"; 1 for bytes without end tokens."""
        rates = [corpus.bytes(half) / max(1, getattr(corpus, half).size) for corpus in self.corpora]
        sizes = [corpus.validation.size for corpus in self.corpora]
        weights = self.shares if half == "train" else [size / sum(sizes) for size in sizes]
        return sum(rate * weight for rate, weight in zip(rates, weights, strict=True))

    def describe(self) -> str:
        """One line with the sizes."""
        if len(self.corpora) == 1:
            return self.corpora[0].describe()
        return f"{self.name}: {self.train_tokens:,} training tokens, {self.validation.size:,} validation tokens"


def load_mixture(config: "TrainConfig", say: Callable[[str], None] = lambda line: None) -> Mixture:
    """The text that a configuration names, tokenised.

    The embedded corpus and a single text file are read into memory, as bytes; everything else is ingested.

    Args:
      config: `data`, `text_column`, `tokenizer` and the model's vocabulary are looked at.
      say: is told what takes a while.
    Raises:
      UserError: a source cannot be read, or the model's vocabulary is not that of the tokenizer.
    """
    vocabulary = load_vocabulary(config.tokenizer)
    if vocabulary.size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {vocabulary.size} tokens of "
            f"tokenizer={config.tokenizer}; set model.vocab_size={vocabulary.size}"
        )
    sources = parse_sources(config.data)
    corpora = tuple(_load(source.name, len(sources) == 1, config, vocabulary, say) for source in sources)
    total = sum(source.weight for source in sources)
    return Mixture(corpora, tuple(source.weight / total for source in sources), vocabulary)


def _load(name: str, alone: bool, config: "TrainConfig", vocabulary: Vocabulary, say: Callable[[str], None]) -> Corpus:
    in_memory = vocabulary.name == BYTES and (name == EMBEDDED or (alone and not is_table(name)))
    if in_memory:
        return load_corpus(name)
    if name == EMBEDDED:
        raise UserError(f"data={config.data}: the embedded corpus is bytes; leave out tokenizer={config.tokenizer}")
    return ingest(name, config.text_column, vocabulary, say)
