"""Trained with one chunk size, served with another: what does it cost, and does a little training repair it?

    python -m experiments.chunk_transfer [--what memory clock] [--chunks 4 16 64] [--seeds 0 1 2] [--tiny]

A memory that is written every C bytes has learned to be read at the starts of such chunks; served with another C the
same weights compute something else. Each cell trains a byte language model at one chunk size and measures it at every
one of `serve`: "bits_at_16" are bits per byte of held-out text read with chunks of 16, "bits_tuned_16" the same after
`tune_steps` more steps at that chunk (further batches, learning rate `tune_rate`, a short schedule of its own). What is
tuned at the training chunk has been trained longer, nothing else: compare a tuned column with itself. A chunk at which
the model or its tuning diverges has the 8 bits of one that knows nothing.

What is cut into chunks:

- "memory": the memories of titans, hope and dla (`chunk_proj`, `chunk_mem`).
- "clock": the fast CMS level of hope_attention or hope (`cms_chunks`); its step is `cms_eta` times the mean gradient of
  the chunk, so half the chunk makes twice as many steps of the same size.

The report draws the matrix, training chunk by serving chunk (plots/chunk_transfer_matrix.png).

Cost in seconds of one core of a busy machine: a step of dla 0.11; each chunk size in `serve` compiles a training step
(18 for dla) and a reader.
"""

import dataclasses
import itertools
from typing import Any, ClassVar

from experiments import text
from experiments.cells import RAW_BITS, capped
from experiments.context_use import by_place, windows
from experiments.options import BYTES, TINY_RESULTS, Options, at_least, model_config
from experiments.running import Job, main
from experiments.streaming import reader
from experiments.training import Model, Scores, Trained, cross_entropy, language_model, train
from hope_jax.models import ModelConfig, check_sequence_length
from hope_jax.training.errors import UserError
from hope_jax.training.overrides import one_line, unknown

WHAT = {"memory": ("titans", "hope", "dla"), "clock": ("hope_attention", "hope")}  # -> models that have such chunks


@dataclasses.dataclass(frozen=True)
class TransferOptions(Options):
    """Training chunk by serving chunk.

    Attributes:
      what: "memory" or "clock": whose chunks.
      models: of those that have such chunks; "auto" = titans for "memory", hope_attention for "clock".
      chunks: in training.
      serve: in use.
      tune_steps: of training at the serving chunk, for "bits_tuned_...".
      tune_rate: the learning rate of those.
      length: bytes of a window, in training and in use.
      eta: inner learning rate of a fast level.
      data: the text, "embedded" or a file.
      test_windows: how many, spread evenly over the held-out text.
    """

    what: tuple[str, ...] = ("memory", "clock")
    models: tuple[str, ...] = ("auto",)
    chunks: tuple[int, ...] = (4, 16, 64)
    serve: tuple[int, ...] = (4, 16, 64)
    batch_size: int = 8
    steps: int = 300
    eval_every: int = 300
    tune_steps: int = 50
    tune_rate: float = 1e-3
    dim: int = 48
    length: int = 257
    eta: float = 0.3
    data: str = "embedded"
    test_windows: int = 32

    GRID: ClassVar[tuple[str, ...]] = ("what", *Options.GRID)
    KNOWN_MODELS: ClassVar[tuple[str, ...]] = ("auto", "dla", "titans", "hope", "hope_attention")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.what:
            if name not in WHAT:
                raise UserError(unknown("kind of chunk", name, list(WHAT)))
            for model in self.models:
                if model not in ("auto", *WHAT[name]):
                    raise UserError(f"{model} has no chunks of the kind {name!r}; use {' or '.join(WHAT[name])}")
        at_least(self, {"tune_steps": 1, "test_windows": 1})


TINY = TransferOptions(
    what=("memory",),
    models=("dla",),  # quick to compile
    chunks=(4,),
    serve=(8,),
    overrides=("remat=none",),
    steps=2,
    eval_every=2,
    tune_steps=1,
    dim=8,
    head_width=8,
    layers=1,
    batch_size=2,
    length=17,
    test_windows=2,
    results=TINY_RESULTS,
)


def with_chunk(config: ModelConfig, what: str, chunk: int) -> ModelConfig:
    """The same model, written every `chunk` tokens.

    Raises:
      UserError: it cannot be.
    """
    fields: dict[str, Any] = {"chunk_proj": chunk, "chunk_mem": chunk} if what == "memory" else {"cms_chunks": (chunk,)}
    try:
        return dataclasses.replace(config, **fields)
    except ValueError as error:
        raise UserError(one_line(error)) from error


def prepare(cell: TransferOptions) -> Job:
    """What one cell computes."""
    [what], [name], [chunk], [seed] = cell.what, cell.models, cell.chunks, cell.seeds
    name = WHAT[what][0] if name == "auto" else name
    corpus = text.corpus(cell.data)
    named = dataclasses.replace(cell, models=(name,), chunks=(chunk if what == "memory" else 16,))
    base = with_chunk(model_config(named, vocab_size=BYTES, length=cell.length, cms_eta=cell.eta), what, chunk)
    served = {size: with_chunk(base, what, size) for size in cell.serve}
    try:
        for config in (base, *served.values()):
            check_sequence_length(config, cell.length)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    tests = windows(corpus.validation, cell.test_windows, cell.length)
    batches = text.stream(corpus.train, seed, cell.batch_size, cell.length)
    fresh = text.stream(corpus.train, seed, cell.batch_size, cell.length)
    unseen = list(itertools.islice(fresh, cell.steps + 1, cell.steps + 2 + cell.tune_steps))

    def tuned(config: ModelConfig, params: Any) -> Trained:
        model = Model(lambda _: params, language_model(config).apply)
        short = dataclasses.replace(
            cell,
            steps=cell.tune_steps,
            eval_every=cell.tune_steps,
            learning_rates=(cell.tune_rate,),
            warmup=cell.tune_steps // 10,
        )
        return train(model, iter(unseen), cross_entropy, lambda _: {}, short)

    def evaluate(params: Any) -> Scores:
        scores = {}
        for size, config in served.items():
            read = reader(config)
            after = tuned(config, params)
            scores[f"bits_at_{size}"] = capped(float(by_place(read, params, tests).mean()))
            scores[f"bits_tuned_{size}"] = (
                RAW_BITS if after.failed else capped(float(by_place(read, after.params, tests).mean()))
            )
        return scores

    row = f"{name}, trained at {chunk}"
    return Job(what, "", base, language_model(base), batches, cross_entropy, evaluate, cell, row=row)


if __name__ == "__main__":
    main("chunk_transfer", TransferOptions, TINY, prepare)
