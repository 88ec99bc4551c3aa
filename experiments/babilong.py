"""bAbI questions whose facts lie scattered in a long text: does the state keep them over a million bytes?

    python -m experiments.babilong [--tasks qa1 ...] [--models hope ...] [--babi FOLDER] [--longest 10M] [--tiny]

A document is lines of background with the facts of one story between them, in their order and at random places, and
at its end the question, which the model answers greedily, byte by byte. Trained on documents of `length` bytes (loss
on the answer alone), tested on that length and on 4K, 16K, 64K, 256K, 1M and, asked for, 10M bytes (K = 1,024). A
document is made and read piece by piece with a carried state: memory does not grow with its length. "exact_64K" is
the share of answers that are right to their last byte. Models with an attention cache are not given documents longer
than it (`cache`). The stories are equally long at every length, so what changes is the background alone.

Stories come from a generator of three of the tasks (`babi`), or from the files of the data set, all twenty. Background
is real text, of which training and test see different halves. A length is tested on as many documents as
`test_bytes` allow, four of 1M: raise it for numbers to be compared. Task: Kuratov et al. 2024, arXiv:2406.10149.

Cost in minutes of one core (AMD EPYC), compilation apart: 1,000 steps of 16 documents 17 (transformer), 26 (hope);
reading 4 MiB, which is one of the longer tests, 1 (gated_delta_net, titans), 2 to 4 (hope). A document of 10M bytes
took gated_delta_net 3 minutes, with a peak memory of the process of 443 MiB against 439 MiB for one of 4K. Attention
pays for its cache with every byte: a cache of 16K is 16 times as dear as the default. Of the stories in bAbI's files
37% of qa2 and 6% of qa3 are short enough for the default length, with `--length 2048` 100% and 63%.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from experiments import text
from experiments.babi import Story, source
from experiments.niah import as_array
from experiments.options import BYTES, TEST_SEED, TINY_RESULTS, Options, model_config
from experiments.running import Job, main
from experiments.streaming import answers, reader
from experiments.training import Batch, Scores, cross_entropy, language_model
from hope_jax.training.errors import UserError
from hope_jax.training.overrides import unknown

ROWS = 16  # documents that are read side by side
MOST_ANSWER = 64  # bytes
LENGTHS = {"4K": 2**12, "16K": 2**14, "64K": 2**16, "256K": 2**18, "1M": 2**20, "10M": 10 * 2**20}


@dataclasses.dataclass(frozen=True)
class LongOptions(Options):
    """bAbI questions in a long text.

    Attributes:
      tasks: "qa1" to "qa3", with `babi` to "qa20".
      length: bytes of a training document, answer included.
      longest: name of the longest test: 4K, 16K, 64K, 256K, 1M or 10M; "train" tests the training length alone.
      babi: folder with the files of bAbI (its `en`); none = the built-in generator.
      data: background: "embedded", or a text file.
      test_documents: per length, at most.
      test_bytes: per length, for the number of documents; one is always read.
      cache: bytes of the longest document for models with an attention cache.
    """

    tasks: tuple[str, ...] = ("qa1", "qa2", "qa3")
    models: tuple[str, ...] = ("transformer", "gated_delta_net", "titans", "hope")
    chunks: tuple[int, ...] = (16,)
    batch_size: int = 8
    steps: int = 750
    eval_every: int = 750
    length: int = 512
    longest: str = "1M"
    babi: str | None = None
    data: str = "embedded"
    test_documents: int = 96
    test_bytes: int = 2**22
    cache: int = 2**12

    GRID: ClassVar[tuple[str, ...]] = ("tasks", *Options.GRID)
    COUNTS: ClassVar[tuple[str, ...]] = ("test_documents", "test_bytes", *Options.COUNTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longest not in ("train", *LENGTHS):
            raise UserError(unknown("length", self.longest, ["train", *LENGTHS]))
        if self.cache < self.length:
            raise UserError(f"cache must hold a training document of {self.length} bytes; got {self.cache}")

    @property
    def most(self) -> int:
        """Bytes that a story may have: three quarters of a training document."""
        return 3 * self.length // 4

    def lengths(self) -> dict[str, int]:
        """Name -> bytes of the documents of each test."""
        names = list(LENGTHS)[: 1 + list(LENGTHS).index(self.longest)] if self.longest != "train" else []
        return {"train": self.length} | {name: LENGTHS[name] for name in names if LENGTHS[name] > self.length}


TINY = LongOptions(
    tasks=("qa1",),
    models=("delta_net",),
    steps=2,
    eval_every=2,
    dim=16,
    layers=1,
    batch_size=2,
    length=256,
    longest="4K",
    test_documents=2,
    results=TINY_RESULTS,
)


def background(corpus: np.ndarray) -> list[bytes]:
    """The lines of a text with something in them."""
    return [line.strip() + b"\n" for line in corpus.tobytes().splitlines() if line.strip()]


def document(story: Story, lines: list[bytes], length: int, rng: np.random.Generator) -> Iterator[bytes]:
    """A document of `length` bytes that ends with the question, line by line: nothing longer is ever made.

    Facts stand between lines of the background, each at the first such place after a random one. The line that would
    be too long is cut.

    Args:
      story: facts and question; its `size` must not exceed `length`.
      lines: the background, read from a random line on, again and again.
      length: bytes, question included, answer not.
      rng: of the places.
    """
    question = f"{story.question} ".encode()
    facts = [f"{fact}\n".encode() for fact in story.facts]
    room = length - len(question) - sum(map(len, facts))
    places = np.sort(rng.integers(room + 1, size=len(facts))).tolist()
    at = int(rng.integers(len(lines)))
    told = 0  # bytes of background
    for place, fact in zip([*places, room], [*facts, question], strict=True):
        while told < place:
            line = lines[at % len(lines)]
            if told + len(line) > room:
                line = line[: room - told - 1] + b"\n"
            yield line
            told, at = told + len(line), at + 1
        yield fact


def pieces(documents: list[Iterator[bytes]], size: int) -> Iterator[np.ndarray]:
    """[B, size] int32 tokens of documents of one length side by side, the last piece shorter."""
    buffers = [bytearray() for _ in documents]
    while True:
        for buffer, document in zip(buffers, documents, strict=True):
            while len(buffer) < size and (line := next(document, b"")):
                buffer += line
        if not buffers[0]:
            return
        yield as_array([bytes(buffer[:size]) for buffer in buffers]).astype(np.int32)
        for buffer in buffers:
            del buffer[:size]


def stream(cell: LongOptions) -> Iterator[Batch]:
    """Training batches of a cell, for ever."""
    [task], [seed] = cell.tasks, cell.seeds
    rng = np.random.default_rng(seed)
    draw, lines = source(task, cell.babi, "train", cell.most), background(text.corpus(cell.data).train)
    while True:
        yield batch_of([draw(rng) for _ in range(cell.batch_size)], lines, cell.length, rng)


def batch_of(stories: list[Story], lines: list[bytes], length: int, rng: np.random.Generator) -> Batch:
    """A document of `length` bytes per story, answer and the end of its line included; only those have weight."""
    replies = [reply(story) for story in stories]
    prompts = [
        b"".join(document(story, lines, length - len(said), rng)) for story, said in zip(stories, replies, strict=True)
    ]
    batch = text.next_byte(as_array([prompt + said for prompt, said in zip(prompts, replies, strict=True)]))
    begins_B = np.array([len(prompt) - 1 for prompt in prompts])
    return batch._replace(weights=(np.arange(length - 1) >= begins_B[:, None]).astype(np.float32))


def reply(story: Story) -> bytes:
    """What has to be said: the answer and the end of the line."""
    return f"{story.answer}\n".encode()


def exact(said_BA: np.ndarray, stories: list[Story]) -> list[bool]:
    """Which answers are right to the end of their line; what is said after it does not count."""
    return [bytes(said.tolist()).startswith(reply(story)) for said, story in zip(said_BA, stories, strict=True)]


def groups(cell: LongOptions, length: int) -> list[int]:
    """How many documents of a length are read, in groups of one size.

    >>> groups(LongOptions(), 2**14), groups(LongOptions(), 2**20)
    ([16, 16, 16, 16, 16, 16], [4])
    """
    count = max(1, min(cell.test_documents, cell.test_bytes // length))
    rows = min(ROWS, count)
    return [rows] * (count // rows)


def prepare(cell: LongOptions) -> Job:
    """What one cell computes."""
    [task] = cell.tasks
    draw, lines = source(task, cell.babi, "test", cell.most), background(text.corpus(cell.data).validation)
    config = model_config(cell, vocab_size=BYTES, length=cell.length)
    config = dataclasses.replace(config, max_length=cell.cache + MOST_ANSWER)
    read = reader(config)
    longest = cell.cache if config.architecture.cache else max(LENGTHS.values())

    def test(params: Any, length: int) -> float:
        rng = np.random.default_rng(TEST_SEED)
        right = []
        for rows in groups(cell, length):
            stories = [draw(rng) for _ in range(rows)]
            documents = [
                document(story, lines, length, own) for story, own in zip(stories, rng.spawn(rows), strict=True)
            ]
            said_BA = answers(read, params, pieces(documents, read.size), max(len(reply(one)) for one in stories))
            right += exact(said_BA, stories)
        return sum(right) / len(right)

    def evaluate(params: Any) -> Scores:
        return {f"exact_{name}": test(params, length) for name, length in cell.lengths().items() if length <= longest}

    return Job(task, "", config, language_model(config), stream(cell), cross_entropy, evaluate, cell)


if __name__ == "__main__":
    main("babilong", LongOptions, TINY, prepare)
