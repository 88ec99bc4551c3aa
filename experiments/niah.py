"""Needles in a haystack: a model reads a long text and then says, character by character, what was hidden in it.

    python -m experiments.niah [--tasks S-NIAH-1 ...] [--models hope ...] [--data FILE] [--tiny]

Trained on documents of `length` bytes (loss on the answer alone), tested on documents of one, two and four times that
length, which are read piece by piece with the recurrent state; the answer is generated greedily, a byte at a time,
never chosen from a list. "values_2x" is RULER's score at twice the training length: the share of values that are
right from the first to the last character; "exact_2x" is the share of answers with all values right, "characters_2x"
that of characters in their place. Constructions: `needles`. Essay filler is real text, of which training and test
documents see different halves. RULER's tasks: Hsieh et al. 2024, arXiv:2404.06654.

The defaults are small: RULER's numbers have 7 digits (`--digits 7 --length 256`), the UUIDs of S-NIAH-3 36 characters
(`--length 256` at least). A value is copied digit by digit, so the induction that copies has to be learned first, and
short values show earlier what a model will do.

Cost of a cell at the defaults in minutes of one core (Intel Xeon): 2 (transformer, hope_attention) to 4 (comba, hope),
at length 256 9.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np

from experiments import text
from experiments.needles import TASKS, Document, document
from experiments.options import BYTES, TEST_SEED, TINY_RESULTS, Options, model_config
from experiments.running import Job, main
from experiments.streaming import answers, reader, split
from experiments.training import Batch, Scores, cross_entropy, language_model
from hope_jax.training.errors import UserError
from hope_jax.training.overrides import unknown

MULTIPLES = (1, 2, 4)  # of the training length


@dataclasses.dataclass(frozen=True)
class NeedleOptions(Options):
    """Needles in a haystack.

    Attributes:
      tasks: names in `needles.TASKS`.
      length: bytes of a training document, answer included.
      digits: of a number; RULER has 7.
      data: where essay filler comes from: "embedded", or a text file of at least 40 times the length.
      test_documents: per length.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    models: tuple[str, ...] = ("transformer", "hope_attention", "rwkv7", "comba", "dla", "titans", "hope")
    chunks: tuple[int, ...] = (8,)
    batch_size: int = 16
    steps: int = 1500
    eval_every: int = 500
    stop_at: float | None = 1.0
    length: int = 128
    digits: int = 3
    data: str = "embedded"
    test_documents: int = 100

    GRID: ClassVar[tuple[str, ...]] = ("tasks", *Options.GRID)
    COUNTS: ClassVar[tuple[str, ...]] = ("test_documents", *Options.COUNTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.tasks:
            if name not in TASKS:
                raise UserError(unknown("task", name, list(TASKS)))
        if not 1 <= self.digits <= 18:
            raise UserError(f"digits must lie between 1 and 18; got {self.digits}")


TINY = NeedleOptions(
    tasks=("S-NIAH-1",),
    models=("transformer",),
    steps=2,
    eval_every=2,
    dim=16,
    layers=1,
    batch_size=2,
    length=128,
    digits=2,
    test_documents=4,
    results=TINY_RESULTS,
)


class HeldOut(NamedTuple):
    """Documents of one length."""

    prompts_BT: np.ndarray  # [B, T] uint8
    answers_BA: np.ndarray  # [B, A] uint8
    values: list[slice]  # where each value stands in an answer


def documents(cell: NeedleOptions, rng: np.random.Generator, essay: np.ndarray, length: int) -> Iterator[Document]:
    """Documents of the cell's task, for ever."""
    [name] = cell.tasks
    while True:
        yield document(TASKS[name], rng, essay, length, cell.digits)


def stream(cell: NeedleOptions) -> Iterator[Batch]:
    """Training batches of a cell, for ever."""
    [seed] = cell.seeds
    made = documents(cell, np.random.default_rng(seed), text.corpus(cell.data).train, cell.length)
    while True:
        yield batch_of([next(made) for _ in range(cell.batch_size)])


def batch_of(documents: list[Document]) -> Batch:
    """Documents of one length; only the answers have weight."""
    batch = text.next_byte(as_array([one.prompt + one.answer for one in documents]))
    at_T = np.arange(batch.weights.shape[1])
    begins_B = np.array([len(one.prompt) - 1 for one in documents])
    return batch._replace(weights=(at_T >= begins_B[:, None]).astype(np.float32))


def held_out(cell: NeedleOptions, length: int) -> HeldOut:
    """The fixed test documents of a length."""
    made = documents(cell, np.random.default_rng(TEST_SEED), text.corpus(cell.data).validation, length)
    chosen = [next(made) for _ in range(cell.test_documents)]
    ends = np.cumsum([len(value) + 1 for value in chosen[0].values])
    values = [slice(end - 1 - len(value), end - 1) for end, value in zip(ends, chosen[0].values, strict=True)]
    return HeldOut(as_array([one.prompt for one in chosen]), as_array([one.answer for one in chosen]), values)


def as_array(texts: list[bytes]) -> np.ndarray:
    """[B, T] uint8 of texts of one length."""
    return np.stack([np.frombuffer(one, np.uint8) for one in texts])


def score(said_BA: np.ndarray, tests: HeldOut) -> Scores:
    """Shares of values, whole answers and characters that are right."""
    right_BA = said_BA == tests.answers_BA
    values_BN = np.stack([right_BA[:, value].all(axis=1) for value in tests.values], axis=1)
    return {
        "values": float(values_BN.mean()),
        "exact": float(right_BA.all(axis=1).mean()),
        "characters": float(right_BA.mean()),
    }


def prepare(cell: NeedleOptions) -> Job:
    """What one cell computes."""
    tests = {multiple: held_out(cell, multiple * cell.length) for multiple in MULTIPLES}
    longest = max(MULTIPLES) * cell.length
    config = dataclasses.replace(model_config(cell, vocab_size=BYTES, length=cell.length), max_length=longest)
    read = reader(config)

    def evaluate(params: Any) -> Scores:
        scores = {}
        for multiple, (prompts_BT, answers_BA, _) in tests.items():
            said_BA = answers(read, params, split(prompts_BT, read.size), answers_BA.shape[1])
            found = score(said_BA, tests[multiple])
            scores |= {f"{name}_{multiple}x": value for name, value in found.items()}
        return scores

    return Job(cell.tasks[0], "", config, language_model(config), stream(cell), cross_entropy, evaluate, cell)


if __name__ == "__main__":
    main("niah", NeedleOptions, TINY, prepare)
