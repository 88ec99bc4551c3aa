"""Hope without one of its parts at a time, on text and on two tasks that a state has to be kept for.

    python -m experiments.ablation [--variants "w/o DGD" ...] [--tasks language_model ...] [--seeds 0 1 2] [--tiny]

Every row is one change of the same config: Hope with queries from a written box too, momentum, retention, delta
gradient descent, and two CMS levels of which the second steps with every fourth optimizer step (spec 8.4). "static"
means that k, v or q comes from an ordinary projection. Tasks: "language_model" (bits per byte of held-out text),
"mqar" (3 pairs in 24 tokens, accuracy at queries) and "parity" (whole strings right at 2-50 and 51-100 symbols, width
32, chunk 1).

In the paper's table a part is worth about ten percent of perplexity, 0.14 bits per token or a few hundredths of a bit
per byte: look at the spread over the seeds first. There the model has 1.3B parameters and saw 100B tokens, so only the
signs of differences may be compared.

Cost of 1,000 steps, compilation (two minutes) apart, in minutes of one core (AMD EPYC): 8 (language_model, reference);
parity by what it costs hope in its own experiment 9; mqar 0.9 with --dim 32 --chunks 2 --overrides memory=linear. The
whole table is 72 cells.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import jax
import optax

from experiments import formal_languages, mqar, text
from experiments.options import BYTES, TINY_RESULTS, Options, model_config
from experiments.running import Job, main
from experiments.training import Batch, Model, Scores, cross_entropy, language_model, optimizer
from hope_jax.models import ModelConfig
from hope_jax.optimizers import cms_schedule
from hope_jax.training.errors import UserError
from hope_jax.training.optimizer import period_labels
from hope_jax.training.overrides import unknown

PERIODS = (1, 4)  # optimizer steps between two writes of a CMS level
replace = dataclasses.replace

VARIANTS: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "reference": lambda base: base,
    "w/o DGD": lambda base: replace(base, dgd_decay=False),
    # A write with momentum 0.9 acts ten times, so without momentum the step starts ten times as large.
    "w/o momentum": lambda base: replace(base, momentum=None, eta_init=10 * base.eta_init),
    "w/o weight decay": lambda base: replace(base, retention=False),
    # One MLP that is as wide as all levels together and steps with the optimizer.
    "w/o CMS": lambda base: replace(base, cms_hidden=(sum(base.cms_hidden),), cms_chunks=()),
    "static k": lambda base: replace(base, static=("k",)),
    "static v": lambda base: replace(base, static=("v",)),
    "static q": lambda base: replace(base, adaptive_q=False),
}


@dataclasses.dataclass(frozen=True)
class AblationOptions(Options):
    """The ablation table.

    Attributes:
      variants: names in `VARIANTS`.
      tasks: names in `TASKS`.
      length: bytes of a sequence of text; its batches have a quarter of the rows.
      data: the text, "embedded" or a file.
      test_examples: sequences, strings per bin and windows of text that are scored.
    """

    variants: tuple[str, ...] = tuple(VARIANTS)
    tasks: tuple[str, ...] = ("language_model", "mqar", "parity")
    models: tuple[str, ...] = ("hope",)
    seeds: tuple[int, ...] = (0, 1, 2)
    chunks: tuple[int, ...] = (16,)
    eval_every: int = 250
    length: int = 256
    data: str = "embedded"
    test_examples: int = 500

    GRID: ClassVar[tuple[str, ...]] = ("tasks", "variants", *Options.GRID)

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind, names, known in (("variant", self.variants, VARIANTS), ("task", self.tasks, TASKS)):
            for name in names:
                if name not in known:
                    raise UserError(unknown(kind, name, list(known)))
        if self.models != ("hope",):
            raise UserError(f"the parts that are taken out are those of hope; got models {' '.join(self.models)}")


class Setup(NamedTuple):
    """A task as a model sees it."""

    cell: Options  # with what the task decides itself
    base: ModelConfig
    batches: Iterator[Batch]
    loss: Callable[[jax.Array, Batch], jax.Array]
    evaluation: Callable[[Model], Callable[[Any], Scores]]


def _language_model(cell: AblationOptions) -> Setup:
    corpus, [seed] = text.corpus(cell.data), cell.seeds
    cell = replace(cell, batch_size=-(-cell.batch_size // 4))

    def evaluation(model: Model) -> Callable[[Any], Scores]:
        limit = -(-cell.test_examples // cell.batch_size)
        return text.evaluation(model, corpus.validation, rows=cell.batch_size, length=cell.length, limit=limit)

    batches = text.stream(corpus.train, seed, cell.batch_size, cell.length)
    return Setup(cell, _base(cell, BYTES, cell.length), batches, cross_entropy, evaluation)


def _mqar(cell: AblationOptions) -> Setup:
    recall = mqar.RecallOptions(**_shared(cell), pairs=(3,), vocab=32, length=24, test_sequences=cell.test_examples)
    base = _base(cell, recall.vocab, recall.length)
    return Setup(cell, base, mqar.stream(recall), cross_entropy, lambda model: mqar.evaluation(recall, model))


def _parity(cell: AblationOptions) -> Setup:
    language, [seed] = formal_languages.LANGUAGES["parity"], cell.seeds
    cell = replace(cell, chunks=(1,), dim=min(32, cell.dim))
    base = _base(cell, len(language.symbols) + 1, formal_languages.BINS["bin1"][1], rope_theta=None)
    batches = formal_languages.stream(language, seed, cell.batch_size)

    def evaluation(model: Model) -> Callable[[Any], Scores]:
        return formal_languages.evaluation(language, cell.test_examples, model)

    return Setup(cell, base, batches, formal_languages.loss, evaluation)


TASKS = {"language_model": _language_model, "mqar": _mqar, "parity": _parity}
TINY = AblationOptions(
    variants=("w/o CMS",),
    tasks=("language_model",),
    seeds=(0,),
    chunks=(4,),
    steps=2,
    eval_every=2,
    batch_size=8,
    dim=8,
    head_width=8,
    layers=1,
    length=16,
    test_examples=4,
    results=TINY_RESULTS,
)


def _shared(cell: Options) -> dict[str, Any]:
    """The options that every experiment has."""
    return {field.name: getattr(cell, field.name) for field in dataclasses.fields(Options)}


def _base(cell: AblationOptions, vocab_size: int, length: int, **fields: Any) -> ModelConfig:
    return model_config(cell, vocab_size=vocab_size, length=length, adaptive_q=True, momentum=0.9, **fields)


def with_slow_levels(cell: Options, periods: tuple[int, ...]) -> optax.GradientTransformation:
    """The optimizer of a cell; CMS level i averages the gradients of `periods[i]` steps and then takes one.

    A slow level's schedule has that many fewer steps. Gradients are clipped together first; clipping those of a group
    again changes nothing.
    """

    def rule(period: int) -> optax.GradientTransformation:
        return optimizer(replace(cell, steps=max(1, cell.steps // period), warmup=cell.warmup // period))

    clocks = {f"every_{period}": period for period in {1, *periods}}
    rules = {label: rule(period) for label, period in clocks.items()}
    levels = cms_schedule(clocks, rules, lambda params: period_labels(params, periods), reduce="mean")
    return optax.chain(optax.clip_by_global_norm(cell.clip), levels)


def prepare(cell: AblationOptions) -> Job:
    """What one cell computes."""
    [task], [variant] = cell.tasks, cell.variants
    setup = TASKS[task](cell)
    config = VARIANTS[variant](setup.base)
    model = language_model(config)
    periods = PERIODS if len(config.cms_hidden) > 1 else ()
    return Job(
        task,
        "",
        config,
        model,
        setup.batches,
        setup.loss,
        setup.evaluation(model),
        setup.cell,
        row=variant,
        tx=with_slow_levels(setup.cell, periods),
    )


if __name__ == "__main__":
    main("ablation", AblationOptions, TINY, prepare)
