"""Does a model that goes on learning while it reads predict the rest of a long document better?

    python -m experiments.test_time_learning [--documents FILE ...] [--trainings meta ...] [--seeds 0 1 2] [--tiny]

A byte language model is trained on one text (`data`) and reads `test_documents` long documents from another
(`documents`). What is scored are the bits per byte of the second half of each, after its first half has been read:

- "bits_frozen": the memories or the attention cache carry the first half; no weight changes.
- "bits_eta_0.3": the first CMS level is a fast level, written every `fast` bytes with this inner learning rate, in both
  halves; other rates are other scores.
- "bits_gate_first_half" and others: the same at the rate `eta`, but only some chunks are written, "written_..." is
  their share. The bounds are bits_frozen (never) and bits_eta_... (always). Gates: those of `hope_jax.online`, and
  one that writes the first half.

Rows differ in how the model was trained; all share `pretraining` steps with ordinary levels:

- "ad hoc": `steps` more of the same; the level is switched on for the test.
- "meta-trained": `steps` with the level on, at the rate `eta`: the weights learn to be a good start for its writes.
- "window": attention over the last `length` bytes, of the width at which reading a byte costs as many operations as
  reading and learning does (`cost`, counted on the program: matrix products, all writes included). It is trained on
  the same text for as many steps in all, each of which costs it more than the rows without a fast level.

Documents: `long_texts`; those of "embedded" are of the same kind as the training text, others are a change of domain.
A rate at which a reader diverges has the 8 bits of one that knows nothing.

The report draws bits over the inner learning rate and over the share of chunks written.

At the defaults learning costs 5.3 times what reading does, and the window has width 128 against 48. Cost in seconds of
one core of a busy machine: a step of training 0.4, with the level on 1.3, before some 30 of compilation.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from experiments import text
from experiments.cells import capped
from experiments.context_use import by_place
from experiments.gated_reading import first, gated_reader
from experiments.long_texts import long_texts
from experiments.options import BYTES, TINY_RESULTS, Options, at_least, model_config
from experiments.running import Job, main
from experiments.sources import label
from experiments.streaming import reader
from experiments.training import Batch, Scores, Trained, cross_entropy, language_model, train
from hope_jax.models import ModelConfig, build_lm
from hope_jax.online import Gate, parse_gate
from hope_jax.training.errors import UserError
from hope_jax.training.flops import flops_of
from hope_jax.training.overrides import unknown

TRAININGS = {"ad_hoc": "ad hoc", "meta": "meta-trained", "window": "window"}  # option -> row
WIDEST = 16  # times the width of the learner: how far the search for a window of equal cost goes


@dataclasses.dataclass(frozen=True)
class LearningOptions(Options):
    """Learning while reading.

    Attributes:
      documents: texts to read: "embedded", files or folders (`long_texts`).
      trainings: "ad_hoc", "meta" or "window".
      models: with CMS levels: hope or hope_attention.
      steps: of training after `pretraining`.
      pretraining: steps with ordinary levels before.
      length: bytes of a training window.
      half: bytes of half a document.
      fast: bytes between two writes of the fast level.
      eta: inner learning rate of meta-training and of the gates.
      etas: inner learning rates while reading.
      threshold: bits per byte of a chunk above which the gate of this name writes it.
      share: of the chunks, the budget of the gate of this name.
      data: the training text, "embedded" or a file.
      test_documents: how many are read, side by side.
    """

    documents: tuple[str, ...] = ("embedded",)
    trainings: tuple[str, ...] = tuple(TRAININGS)
    models: tuple[str, ...] = ("hope_attention",)
    chunks: tuple[int, ...] = (16,)
    batch_size: int = 2
    steps: int = 100
    pretraining: int = 500
    eval_every: int = 100
    dim: int = 48
    length: int = 1025
    half: int = 512
    fast: int = 32
    eta: float = 0.3
    etas: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    threshold: float = 4.0
    share: float = 0.25
    data: str = "embedded"
    test_documents: int = 8

    GRID: ClassVar[tuple[str, ...]] = ("documents", "trainings", *Options.GRID)
    KNOWN_MODELS: ClassVar[tuple[str, ...]] = ("hope", "hope_attention")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.trainings:
            if name not in TRAININGS:
                raise UserError(unknown("training", name, list(TRAININGS)))
        at_least(self, {"half": 1, "fast": 1, "pretraining": 1, "test_documents": 1})
        if self.half % self.fast:
            raise UserError(
                f"half must be a multiple of fast, {self.fast}, so that it ends with a chunk; got {self.half}"
            )
        if not 0 <= self.share <= 1:
            raise UserError(f"share is a part of the chunks, from 0 to 1; got {self.share:g}")
        if min((self.eta, *self.etas)) <= 0:
            raise UserError(f"inner learning rates must be positive; got eta {self.eta:g}, etas {self.etas}")


TINY = LearningOptions(
    trainings=("ad_hoc",),
    overrides=("remat=none",),
    steps=2,
    pretraining=2,
    eval_every=2,
    dim=8,
    head_width=8,
    layers=1,
    batch_size=2,
    length=17,
    half=16,
    fast=8,
    etas=(0.1,),
    eta=0.1,
    test_documents=2,
    results=TINY_RESULTS,
)


def gates(cell: LearningOptions) -> dict[str, Gate]:
    """The gates between always and never, by the names of their scores."""
    return {
        "first_half": first(cell.half // cell.fast),
        "threshold": parse_gate(f"threshold:{cell.threshold * math.log(2)}"),
        "ema": parse_gate("ema"),
        "budget": parse_gate(f"budget:{cell.share}"),
    }


def learning(config: ModelConfig, cell: LearningOptions, eta: float) -> ModelConfig:
    """The same model with its first level fast."""
    return dataclasses.replace(config, cms_chunks=(cell.fast,), cms_eta=eta)


def cost(config: ModelConfig, cell: LearningOptions) -> float:
    """Operations of matrix products to read a byte in the middle of a document, writes included, nothing done twice."""
    lm = build_lm(dataclasses.replace(config, remat="none"))
    params = jax.eval_shape(lm.init, jax.random.key(0))
    state = jax.eval_shape(lambda params: lm.init_state(params, 1), params)
    tokens_BT = jax.ShapeDtypeStruct((1, cell.fast), jnp.int32)
    return flops_of(functools.partial(lm.apply, phase=cell.half), params, state, tokens_BT).products / cell.fast


def window_of_cost(plain: ModelConfig, cell: LearningOptions) -> ModelConfig:
    """The narrowest model with a window of `length` bytes whose byte costs no less than reading and learning one.

    Raises:
      UserError: even a very wide one costs less.
    """
    least = cost(learning(plain, cell, cell.eta), cell)
    for heads in range(plain.heads, WIDEST * plain.heads):
        dim = heads * plain.head_width
        config = dataclasses.replace(plain, name="swa", dim=dim, heads=heads, window=cell.length)
        if cost(config, cell) >= least:
            return config
    raise UserError(
        f"no model with a window of {cell.length} bytes and a width of up to {dim} costs what learning costs"
    )


@functools.cache
def pretrained(config: ModelConfig, cell: LearningOptions) -> Trained:
    """What is there after `pretraining` steps; computed once for all cells that differ in what follows."""
    cell = dataclasses.replace(cell, steps=cell.pretraining, eval_every=cell.pretraining)
    return train(language_model(config), stream(cell), cross_entropy, lambda _: {}, cell)


def stream(cell: LearningOptions) -> Iterator[Batch]:
    """Training batches, for ever."""
    [seed] = cell.seeds
    return text.stream(text.corpus(cell.data).train, seed, cell.batch_size, cell.length)


def prepare(cell: LearningOptions) -> Job:
    """What one cell computes."""
    [training], [source] = cell.trainings, cell.documents
    tests = long_texts(source, cell.test_documents, 2 * cell.half + 1)
    plain = model_config(cell, vocab_size=BYTES, length=cell.length)
    plain = dataclasses.replace(plain, max_length=max(cell.length, 2 * cell.half))
    if training == "window":
        plain = window_of_cost(plain, cell)
    trained_as = learning(plain, cell, cell.eta) if training == "meta" else plain

    def evaluate(params: Any) -> Scores:
        return scores(cell, plain, params, tests)

    defaults = LearningOptions()
    shared = dataclasses.replace(cell, documents=defaults.documents, trainings=defaults.trainings)
    begun = pretrained(plain, shared)
    model = language_model(trained_as)._replace(init=lambda _: begun.params)
    batches = itertools.islice(stream(cell), cell.pretraining, None)
    row = TRAININGS[training] + (f", eta {cell.eta:g}" if training == "meta" else "")
    job = Job(label(source), "", trained_as, model, batches, cross_entropy, evaluate, cell, row=row)
    if begun.failed is None:
        return job
    failed = begun._replace(failed=f"pre-training: {begun.failed}")
    return job._replace(how=lambda *_, **__: failed)


def scores(cell: LearningOptions, plain: ModelConfig, params: Any, tests_BT: Any) -> Scores:
    """Bits of the second halves: frozen, learning, and with gates."""

    def second(bits_T: Any) -> float:
        return capped(float(bits_T[cell.half :].mean()))

    found = {"bits_frozen": second(by_place(reader(plain), params, tests_BT))}
    if not plain.has_cms:
        return found
    for eta in cell.etas:
        found[f"bits_eta_{eta:g}"] = second(by_place(reader(learning(plain, cell, eta)), params, tests_BT))
    read = gated_reader(learning(plain, cell, cell.eta))
    for name, gate in gates(cell).items():
        reading = read(params, tests_BT, gate)
        found |= {f"bits_gate_{name}": second(reading.bits_T), f"written_{name}": reading.written}
    return found


if __name__ == "__main__":
    main("test_time_learning", LearningOptions, TINY, prepare)
