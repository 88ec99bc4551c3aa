"""Two new languages, one after the other, as sentence pairs: how well is the first still translated?

    python -m experiments.translation [--data FOLDER --languages en de fr] [--shots 2] [--tiny]

The paper's continual translation at our scale. A byte model is trained on home sentences, each paired with itself
("home<tab>home"): so it knows what a pair looks like, the tab included, which learners that leave the embedding alone
could not learn, and no other language. Then it streams pairs home → first and home → second, learning as its learner
does (`experiments/learners.py`). No sentence is in two of the three parts of the training data.

Read with learning switched off, as in `experiments/languages.py`: bits per byte of held-out pairs at every inner
learning rate. And, at the rate with the fewest bits of both, chrF (Popović 2015, by `sacrebleu`) of held-out sentences,
greedily translated:

    chrf_first_between   into the first language right after its pairs were streamed
    chrf_first_end       into the first after the second, too
    chrf_second_end      into the second

In front of each sentence stand `shots` example pairs, for all learners: they say which language is wanted, which
after both nothing else does, and "none" with them is the learner in context. Its chrF is that of the model trained
at home, before and after alike.

Training costs 110 s of processor time at `--length 256 --steps 600 --batch-size 8`, shared by the learners of one call;
then a few minutes per learner.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import languages
from experiments.domain_stream import TINY as DOMAIN_TINY
from experiments.niah import as_array
from experiments.options import TEST_SEED, at_least
from experiments.pairs import GENERATED, GENERATED_LANGUAGES, between, line, parallel, text_of
from experiments.running import Job, main
from experiments.sources import label
from experiments.streaming import greedy
from experiments.streams import (
    AtRates,
    StreamOptions,
    configs,
    curve,
    cut,
    held_out,
    measured,
    prepare_streams,
    stages,
    trace,
    trade_off,
)
from experiments.training import Scores
from hope_jax.models import ModelConfig, build_lm
from hope_jax.training.corpus import Corpus
from hope_jax.training.errors import UserError

type Chrf = Callable[[Sequence[str], Sequence[str]], float]  # (said, expected) -> share


@dataclasses.dataclass(frozen=True)
class TranslationOptions(StreamOptions):
    """Pairs of two languages after sentences of a third.

    Attributes:
      data: a folder of files whose lines belong together, or "generated"; see `experiments/pairs.py`.
      languages: at home, first and second: the ends of the files' names.
      sentences: that are translated each time.
      shots: example pairs in front of each.
    """

    learners: tuple[str, ...] = ("none", "16", "16,64", "16,64,256", "64,64,64", "all:64")
    data: tuple[str, ...] = (GENERATED,)
    languages: tuple[str, ...] = GENERATED_LANGUAGES
    sentences: int = 64
    shots: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, {"sentences": 1, "shots": 0})
        if len(self.data) != 1:
            raise UserError(f"data is one folder, or {GENERATED}; got {list(self.data)}")
        if len(set(self.languages)) != 3 or len(self.languages) != 3:
            raise UserError(f"languages are three, at home, first and second; got {list(self.languages)}")

    @property
    def room(self) -> int:
        """Bytes that a pair may have: with as many in front as there are shots it fits into a window."""
        return self.length // (self.shots + 1)


_same = {field.name: getattr(DOMAIN_TINY, field.name) for field in dataclasses.fields(DOMAIN_TINY)}
TINY = TranslationOptions(**{**_same, "data": (GENERATED,), "length": 64}, sentences=2, shots=1)


class Questions(NamedTuple):
    """N sentences to be translated.

    Nothing stands on their left, so that the chunks of a memory (of hope) begin elsewhere in each.
    """

    tokens_NT: np.ndarray  # [N, length] int32: example pairs, a sentence and a tab, at the end of the row
    mask_NT: np.ndarray  # [N, length] bool, False where there is nothing
    answers: list[str]


def questions(examples: list[tuple[str, str]], asked: list[tuple[str, str]], cell: TranslationOptions) -> Questions:
    """Held-out sentences, evenly spread, each after other examples; the same for all seeds.

    Args:
      examples: pairs of the training data.
      asked: held-out pairs.
      cell: one cell; pairs longer than its `room` are left out.

    Raises:
      UserError: too few are short enough.
    """
    examples, asked = ([pair for pair in pairs if len(line(pair)) <= cell.room] for pairs in (examples, asked))
    if len(asked) < cell.sentences or len(examples) < cell.shots:
        raise UserError(
            f"{len(asked)} held-out pairs and {len(examples)} examples have {cell.room} bytes or fewer, of which "
            f"{cell.shots + 1} fit into a window; raise --length {cell.length}, lower --sentences {cell.sentences} or "
            f"--shots {cell.shots}"
        )
    asked = [asked[i] for i in np.linspace(0, len(asked) - 1, cell.sentences).astype(int)]
    rng = np.random.default_rng(TEST_SEED)
    prompts = []
    for home, _ in asked:
        shown = rng.choice(len(examples), cell.shots, replace=False)
        prompts.append(b"".join(line(examples[i]) for i in shown) + f"{home}\t".encode())
    begins_N = np.array([cell.length - len(prompt) for prompt in prompts])
    tokens_NT = as_array([prompt.rjust(cell.length, b"\0") for prompt in prompts]).astype(np.int32)
    return Questions(tokens_NT, np.arange(cell.length) >= begins_N[:, None], [answer for _, answer in asked])


def translator(config: ModelConfig, cell: TranslationOptions) -> Callable[[Any, Questions], list[str]]:
    """(params, questions) -> what the model says to each, up to the end of the line; one compiled program."""
    lm = build_lm(dataclasses.replace(config, max_length=cell.length + cell.room))

    @jax.jit
    def say(params: Any, tokens_NT: jax.Array, mask_NT: jax.Array) -> jax.Array:
        state = lm.init_state(params, len(tokens_NT))
        state, logits_NTV = lm.apply(params, state, tokens_NT, phase=0, mask_BT=mask_NT)
        return greedy(lm, params, state, logits_NTV[:, -1], cell.room)

    def translate(params: Any, asked: Questions) -> list[str]:
        return list(map(until_the_line_ends, np.asarray(say(params, *map(jnp.asarray, asked[:2])))))

    return translate


def until_the_line_ends(said_T: np.ndarray) -> str:
    """The text of some bytes, of which halves of letters may be missing.

    >>> until_the_line_ends(np.frombuffer("été\\na".encode(), np.uint8))
    'été'
    """
    return bytes(said_T.tolist()).partition(b"\n")[0].decode(errors="replace")


def chrf() -> Chrf:
    """chrF2 of a corpus, as a share.

    Raises:
      UserError: sacrebleu is not there.
    """
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise UserError("chrF comes with sacrebleu; pip install sacrebleu") from error
    metric = CHRF()
    return lambda said, expected: metric.corpus_score(said, [expected]).score / 100


def prepare(cell: TranslationOptions) -> Job:
    """What one cell computes."""
    [data], metric = cell.data, chrf()
    sentences = parallel(data, cell.languages)
    third = len(sentences.train) // 3
    train = [between(sentences.train[i * third : (i + 1) * third], i) for i in range(3)]
    test = [between(sentences.test, i) for i in range(3)]
    corpora = [Corpus(f"{data}, {name}", text_of(train[i]), text_of(test[i])) for i, name in enumerate(cell.languages)]
    texts = [cut(corpus.train, cell) for corpus in corpora[1:]]
    tests = [held_out(corpus, cell) for corpus in corpora]
    first, second = (questions(train[i], test[i], cell) for i in (1, 2))
    translate = translator(configs(cell)[0], cell)

    def score(learners: AtRates, params: Any) -> Scores:
        weights = list(stages(learners, params, texts))
        bits_RPT = measured(learners, params, weights, tests)
        alone_R = trace(learners, params, texts[1:], tests[2:])[:, -1, 0]
        best, _ = curve(learners.rates, trade_off(bits_RPT[:, :, 1:]))
        _, halfway, end = (learners.at(params, stage, best) for stage in weights)
        asked = {"first_between": (halfway, first), "first_end": (end, first), "second_end": (end, second)}
        found = {f"chrf_{name}": metric(translate(knows, to), to.answers) for name, (knows, to) in asked.items()}
        return found | languages.scores(bits_RPT, alone_R, learners.rates)

    column = f"{label(data)}, {' → '.join(cell.languages)}"
    return prepare_streams(cell, corpora[0].train, score)._replace(column=column)


if __name__ == "__main__":
    main("translation", TranslationOptions, TINY, prepare)
