"""AdamW, Muon, AdaMuon and M3 on a byte language model, each with its own learning rate from one sweep.

    python -m experiments.optimizer_lm [--models hope transformer] [--optimizers adamw muon adamuon m3]
        [--learning-rates 1e-3 3e-3 1e-2] [--seeds 0 1 2] [--steps 400] [--tiny]

The text is that of `hope train tiny`. The best learning rate of each optimizer is chosen on the held-out text that it
is reported on, the same way for all. The report draws the curves over steps and over processor time, and a record has
the time of its steps; for a comparison at equal time give each optimizer the `--steps` that fit into it and all of
them the same `--column`. The paper (Figure 12) compares times of training only, on models of 140M and 1.3B parameters;
it says M3 is slower than Muon and on par with AdaMuon.

Cost of 400 steps at the defaults, compilation apart, in minutes of one core (AMD EPYC): 1.2 (transformer), 2.4 (hope).
"""

import dataclasses

from experiments import text
from experiments.optimizer_comparison import ComparisonOptions, rule
from experiments.options import BYTES, TINY_RESULTS, model_config
from experiments.running import Job, main
from experiments.training import cross_entropy, language_model


@dataclasses.dataclass(frozen=True)
class LanguageOptions(ComparisonOptions):
    """Optimizers on text.

    Attributes:
      length: bytes of a window, in training and on held-out text.
      data: the text, "embedded" or a file.
      test_batches: of held-out windows, at most, spread over all of it.
      column: of the table, for runs that belong together though their steps differ; none = model and steps.
    """

    models: tuple[str, ...] = ("hope",)
    chunks: tuple[int, ...] = (16,)
    weight_decays: tuple[float, ...] = (0.1,)
    batch_size: int = 8
    steps: int = 400
    length: int = 256
    data: str = "embedded"
    test_batches: int = 16
    column: str | None = None


TINY = LanguageOptions(
    models=("transformer",),
    optimizers=("m3_period_8",),
    learning_rates=(3e-3,),
    steps=4,
    eval_every=4,
    dim=16,
    layers=1,
    batch_size=2,
    length=16,
    test_batches=2,
    results=TINY_RESULTS,
)


def prepare(cell: LanguageOptions) -> Job:
    """What one cell computes."""
    [name], [optimizer], [seed] = cell.models, cell.optimizers, cell.seeds
    corpus = text.corpus(cell.data)
    config = model_config(cell, vocab_size=BYTES, length=cell.length)
    model = language_model(config)
    batches = text.stream(corpus.train, seed, cell.batch_size, cell.length)
    evaluate = text.evaluation(
        model, corpus.validation, rows=cell.batch_size, length=cell.length, limit=cell.test_batches
    )
    column = cell.column or f"{name}, {cell.steps} steps"
    return Job(column, "", config, model, batches, cross_entropy, evaluate, cell, row=optimizer, tx=rule(cell))


if __name__ == "__main__":
    main("optimizer_lm", LanguageOptions, TINY, prepare)
