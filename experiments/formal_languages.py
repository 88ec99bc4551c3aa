"""Formal languages: does a model that trained on strings of 2 to 50 symbols know the language at 51 to 100?

    python -m experiments.formal_languages [--languages parity ...] [--models hope ...] [--tiny]

After every prefix the model says which symbols may follow and whether the string may end here (sigmoid outputs,
binary cross-entropy); a string counts only if every position is right. There are no positional encodings. "bin0" is
the share of strings of 2-50 symbols, "bin1" of 51-100; training stops when both are all right. Languages with one
string per length are tested on all of them, the others on `test_strings` fixed random ones per bin. Task as in
Bhattamishra et al. 2020 (arXiv:2009.11264) and Irie et al. 2023 (arXiv:2310.16076), whose loss is squared error.

Chunks matter: a memory that reads the weights of its chunk's start sees no write of its own chunk, so state has to
come from chunk 1, from `--overrides read=before`, or from another layer. Delta rules know no sign flips unless
`--overrides erase_max=2`.

Cost of 1,000 steps at the defaults, compilation apart, in minutes of one core (AMD EPYC): 0.4 (transformer) to 0.9
(srwm), 9 (hope, chunk 1). a^n b^n: transformer 100 / 100 after 300 steps.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.formal_strings import LANGUAGES, Language
from experiments.options import TEST_SEED, TINY_RESULTS, Options, model_config
from experiments.running import Job, main
from experiments.training import Batch, Model, Scores, language_model
from hope_jax.training.errors import UserError
from hope_jax.training.overrides import unknown

BINS = {"bin0": (2, 50), "bin1": (51, 100)}


@dataclasses.dataclass(frozen=True)
class LanguageOptions(Options):
    """Formal languages, next-symbol-set prediction.

    Attributes:
      languages: names in `formal_strings.LANGUAGES`.
      test_strings: per bin, for languages with more than one string per length.
    """

    languages: tuple[str, ...] = tuple(LANGUAGES)
    models: tuple[str, ...] = ("lstm", "transformer", "linear_attention", "delta_net", "srwm", "hope")
    learning_rates: tuple[float, ...] = (3e-3,)
    chunks: tuple[int, ...] = (1,)
    steps: int = 1000
    stop_at: float | None = 1.0
    dim: int = 32
    test_strings: int = 500

    GRID: ClassVar[tuple[str, ...]] = ("languages", *Options.GRID)
    COUNTS: ClassVar[tuple[str, ...]] = ("test_strings", *Options.COUNTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.languages:
            if name not in LANGUAGES:
                raise UserError(unknown("language", name, list(LANGUAGES)))


TINY = LanguageOptions(
    languages=("(abab)*",), steps=4, eval_every=2, dim=8, layers=1, batch_size=4, results=TINY_RESULTS
)


def stream(language: Language, seed: int, batch_size: int) -> Iterator[Batch]:
    """Random strings of the lengths of bin0, for ever."""
    rng = np.random.default_rng(seed)
    low, high = BINS["bin0"]
    lengths = language.lengths(low, high)
    while True:
        yield batch_of(language, rng, rng.choice(lengths, batch_size), high)


def held_out(language: Language, bin_name: str, count: int) -> Batch:
    """The test strings of a bin, in a batch as wide as the longest of all bins."""
    lengths = language.lengths(*BINS[bin_name])
    rng = np.random.default_rng(TEST_SEED)
    if not language.unique:
        lengths = rng.choice(lengths, count)
    return batch_of(language, rng, lengths, BINS["bin1"][1])


def batch_of(language: Language, rng: np.random.Generator, lengths_B: np.ndarray, width: int) -> Batch:
    """Strings of the given lengths; what follows a string has weight 0."""
    tokens_BT = language.sample(rng, lengths_B, width)
    weights_BT = np.arange(width) < lengths_B[:, None]
    return Batch(
        tokens_BT.astype(np.int32), language.allowed(tokens_BT).astype(np.float32), weights_BT.astype(np.float32)
    )


def loss(logits_BTV: jax.Array, batch: Batch) -> jax.Array:
    """Mean binary cross-entropy of the outputs of all positions within the strings."""
    nats_BT = optax.sigmoid_binary_cross_entropy(logits_BTV, batch.targets).mean(axis=-1)
    return (nats_BT * batch.weights).sum() / batch.weights.sum()


def right_strings(logits_BTV: jax.Array, batch: Batch) -> jax.Array:
    """[B] bool: the set is right at every position of the string."""
    right_BT = ((logits_BTV > 0) == (batch.targets > 0.5)).all(axis=-1)
    return (right_BT | (batch.weights == 0)).all(axis=1)


def evaluation(language: Language, count: int, model: Model) -> Callable[[Any], Scores]:
    """params -> scores of a model on the test strings, `count` per bin."""
    tests = [held_out(language, bin_name, count) for bin_name in BINS]
    both = Batch(*map(np.concatenate, zip(*tests, strict=True)))  # one batch: one compilation
    measure = jax.jit(lambda params: right_strings(model.apply(params, jnp.asarray(both.tokens)), both))

    def evaluate(params: Any) -> Scores:
        right = np.split(np.asarray(measure(params)), [len(tests[0].tokens)])
        return {bin_name: float(share.mean()) for bin_name, share in zip(BINS, right, strict=True)}

    return evaluate


def prepare(cell: LanguageOptions) -> Job:
    """What one cell computes."""
    [name], [seed] = cell.languages, cell.seeds
    language = LANGUAGES[name]
    config = model_config(cell, vocab_size=len(language.symbols) + 1, length=BINS["bin1"][1], rope_theta=None)
    model = language_model(config)
    evaluate = evaluation(language, cell.test_strings, model)
    return Job(name, "", config, model, stream(language, seed, cell.batch_size), loss, evaluate, cell)


if __name__ == "__main__":
    main("formal_languages", LanguageOptions, TINY, prepare)
