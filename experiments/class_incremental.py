"""Classes that come a task at a time, once, with no task's name at test time: what is left at the end?

    python -m experiments.class_incremental --data FOLDER [--datasets clinc150 ...] [--methods ncm ewc ...]
        [--models transformer ...] [--seeds 0 1 2] [--tiny]

Every model is first trained as a byte language model on `text`, which holds nothing of the tasks. Then one pass over
the tasks in an order drawn by the seed. Whatever a method is, its classes are those of all tasks from the start and it
predicts among all of them; `classifiers` says how. After each task it is tested on every task so far. "accuracy" is the
mean over tasks after the last one, "forgetting" the mean over earlier tasks of the best accuracy each ever had minus
that at the end. The record's curve is the accuracy matrix, a row per task learned.

    ncm, lda        nearest class mean, in Euclid's metric or that of the covariance within classes; no gradient (lda is
                    what the external learner of InCA does, arXiv:2412.15563, here in our representation)
    retrieval       a vote of the most similar examples; all of them are kept
    probe           the class head alone is trained
    finetune        everything is trained
    ewc             with a penalty on leaving the parameters of earlier tasks
    replay          beside each batch as many examples from a reservoir of `buffer`
    joint           everything is trained on all tasks at once, one pass: the bound that no order limits

and with a continuum memory system (hope, hope_attention), whose level l is written every `clocks[l]` batches with the
mean gradient since, while the rest of the backbone is never written again (paper 9.1; spec 6.4),

    clocks          the class head is written every batch, the levels at theirs, by the loss of the classes
    replay_clocks   the same with replay
    adapt_clocks    lda while the levels, at their clocks, go on learning to predict the bytes that are read
    one_clock, adapt_one_clock    every level every batch: what the clocks themselves do

Data sets and their tasks: `intents`. Rates are constant: a learner does not know when the stream ends.

Paper, Figure 6: Hope above EWC, InCA and learning in context on all three data sets, with adapted models of 3B and 8B
parameters; a plot only.

One pass over CLINC150 takes, in minutes of one core, 0.1 (no gradient, probe), 0.5 (finetune, clocks, one_clock, joint,
adapt_clocks) or 1.3 (replay); a backbone takes 0.5 more, once per model and seed in a process, tests come on top.
Expect clocks ahead of one clock and of fine-tuning, and nearest means, LDA and retrieval ahead of all of these
(RESULTS.md).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console

from experiments import text
from experiments.classifiers import (
    Learner,
    Network,
    adapting,
    as_it_is,
    by_means,
    by_search,
    gradient,
    network,
    replay,
    whitening,
    with_classes,
)
from experiments.continual_baselines import discriminant, nearest_mean
from experiments.intents import HUB, SOURCES, DataSet, Examples, encode, load, tasks_of
from experiments.one_pass import Stream, learn
from experiments.options import BYTES, TINY_RESULTS, Options, model_config
from experiments.running import main
from experiments.training import Model, Trained, cross_entropy, language_model, percent, say, train
from hope_jax import cms_schedule
from hope_jax.models import ModelConfig
from hope_jax.training.errors import UserError
from hope_jax.training.optimizer import decay_mask
from hope_jax.training.overrides import unknown

WINDOW = 64  # of the text on which backbones are trained
WINDOWS = 2048  # of it that whitening is made from
TEXT_SEED = 1_000_003  # of those
HEAD, NEVER = "head", "never"  # labels of parameters


@dataclasses.dataclass(frozen=True)
class IncrementalOptions(Options):
    """Class-incremental learning.

    Attributes:
      datasets: names in `intents.SOURCES`.
      methods: names in `METHODS`.
      learning_rates: of everything but the class head, in the stream; constant.
      head_rate: of the class head.
      data: the folder with a folder per data set, or "hub".
      text: what backbones are trained on: "embedded", or a text file or folder with one.
      steps: of the backbone's training; the stream has as many as it has batches.
      backbone_rate: learning rate of the backbone's training, at the end of its warm-up.
      clocks: batches per write of each CMS level, fastest first; as many levels as numbers.
      buffer: examples that replay keeps.
      ewc_strength: lambda of EWC.
      neighbours: of retrieval.
      test_examples: of each class, at most.
    """

    datasets: tuple[str, ...] = ("clinc150", "banking77", "dbpedia14")
    methods: tuple[str, ...] = ("ncm", "lda", "retrieval", "probe", "finetune", "ewc", "replay", "joint")
    models: tuple[str, ...] = ("transformer",)
    learning_rates: tuple[float, ...] = (3e-4,)
    head_rate: float = 3e-3
    steps: int = 500
    eval_every: int = 500
    data: str = HUB
    text: str = "embedded"
    backbone_rate: float = 3e-3
    clocks: tuple[int, ...] = (1, 4, 16)
    buffer: int = 500
    ewc_strength: float = 1e3
    neighbours: int = 5
    test_examples: int = 100

    GRID: ClassVar[tuple[str, ...]] = ("datasets", "methods", *Options.GRID)
    COUNTS: ClassVar[tuple[str, ...]] = ("buffer", "neighbours", "test_examples", *Options.COUNTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind, names, known in (("data set", self.datasets, SOURCES), ("method", self.methods, METHODS)):
            for name in names:
                if name not in known:
                    raise UserError(unknown(kind, name, list(known)))
        if not self.clocks or min(self.clocks) < 1:
            raise UserError(f"clocks must be numbers of batches, at least 1, one for each level; got {self.clocks}")


class Start(NamedTuple):
    """What a method is given."""

    cell: IncrementalOptions
    net: Network
    params: Any  # of the backbone
    classes: int


type Method = Callable[[Start], Learner]


# --- methods ----------------------------------------------------------------------------------------------------------


def _trained(start: Start, periods: Mapping[str, int], strength: float = 0.0) -> Learner:
    params = with_classes(start.params, start.classes)
    tx = written_every(periods, start.cell, params)
    return gradient(start.net, params, tx, batch_size=start.cell.batch_size, strength=strength)


def _adapted(start: Start, periods: Mapping[str, int]) -> Learner:
    tx = written_every(periods, start.cell, start.params)
    return adapting(start.net, start.params, tx, start.classes, discriminant)


def _levels(clocks: Sequence[int]) -> dict[str, int]:
    return {f"level_{i}": clock for i, clock in enumerate(clocks)}


def _one_clock(start: Start) -> dict[str, int]:
    return _levels([1] * len(start.cell.clocks))


def _everything(start: Start) -> dict[str, int]:
    return dict.fromkeys(jax.tree.leaves(labels(start.params)), 1)


METHODS: dict[str, Method] = {
    "ncm": lambda start: by_means(start.net, start.params, start.classes, nearest_mean),
    "lda": lambda start: by_means(start.net, start.params, start.classes, discriminant),
    "retrieval": lambda start: by_search(start.net, start.params, start.classes, start.cell.neighbours),
    "probe": lambda start: _trained(start, {HEAD: 1}),
    "finetune": lambda start: _trained(start, _everything(start)),
    "ewc": lambda start: _trained(start, _everything(start), start.cell.ewc_strength),
    "replay": lambda start: replay(_trained(start, _everything(start)), start.cell.buffer, start.cell.seeds[0]),
    "joint": lambda start: _trained(start, _everything(start)),
    "clocks": lambda start: _trained(start, {HEAD: 1} | _levels(start.cell.clocks)),
    "one_clock": lambda start: _trained(start, {HEAD: 1} | _one_clock(start)),
    "replay_clocks": lambda start: replay(
        _trained(start, {HEAD: 1} | _levels(start.cell.clocks)), start.cell.buffer, start.cell.seeds[0]
    ),
    "adapt_clocks": lambda start: _adapted(start, _levels(start.cell.clocks)),
    "adapt_one_clock": lambda start: _adapted(start, _one_clock(start)),
}
OF_LEVELS = ("clocks", "one_clock", "replay_clocks", "adapt_clocks", "adapt_one_clock")
TINY = IncrementalOptions(
    datasets=("toy",),
    methods=("clocks",),
    models=("hope_attention",),
    clocks=(1, 2),
    steps=6,
    eval_every=6,
    batch_size=16,
    dim=16,
    layers=1,
    results=TINY_RESULTS,
)


def labels(params: Any) -> Any:
    """A tree of "head" (of classes or bytes), "level_0", "level_1", ... (CMS, fastest first) and "base"."""

    def label(path: Any, _: Any) -> str:
        names = [key.key for key in path]
        return HEAD if names == [HEAD] else names[names.index("cms") + 1] if "cms" in names else "base"

    return jax.tree_util.tree_map_with_path(label, params)


def written_every(periods: Mapping[str, int], cell: IncrementalOptions, params: Any) -> optax.GradientTransformation:
    """Clipped AdamW every `periods[label]` batches, on the mean gradient since; other labels never."""
    [rate], [decay] = cell.learning_rates, cell.weight_decays

    def rule(label: str) -> optax.GradientTransformation:
        one_rate = cell.head_rate if label == HEAD else rate
        adamw = optax.adamw(one_rate, b1=0.9, b2=0.95, weight_decay=decay, mask=decay_mask)
        return optax.chain(optax.clip_by_global_norm(cell.clip), adamw)

    marks = jax.tree.map(lambda label: label if label in periods else NEVER, labels(params))
    rules = {label: rule(label) for label in periods}
    if NEVER in jax.tree.leaves(marks):
        periods, rules = {**periods, NEVER: 1}, {**rules, NEVER: optax.set_to_zero()}
    return cms_schedule(periods, rules, marks, reduce="mean")


# --- the stream -------------------------------------------------------------------------------------------------------


@functools.cache
def _data(name: str, folder: str) -> DataSet:
    return load(name, folder)


def stream_of(cell: IncrementalOptions) -> Stream:
    """The tasks of a cell in its order; for "joint" a single one."""
    [name], [method], [seed] = cell.datasets, cell.methods, cell.seeds
    data, source = _data(name, cell.data), SOURCES[name]
    tasks = tasks_of(data, source, seed)
    tests = [_at_most(encode(data.test, source.length, classes), cell.test_examples) for classes in tasks]
    trains = [encode(data.train, source.length, classes) for classes in ([None] if method == "joint" else tasks)]
    return Stream(trains, tests, len(data.classes))


def _at_most(examples: Examples, count: int) -> Examples:
    """The first `count` of each class."""
    same_NN = np.tril(examples.labels_N[:, None] == examples.labels_N)
    return examples.rows(same_NN.sum(axis=1) <= count)


# --- backbones --------------------------------------------------------------------------------------------------------


def backbone_config(cell: IncrementalOptions) -> ModelConfig:
    """The model of a cell; a CMS has as many levels as clocks, together as large as the SwiGLU of others."""
    longest = max(WINDOW, *(source.length for source in SOURCES.values()))
    levels = len(cell.clocks)
    config = model_config(cell, vocab_size=BYTES, length=WINDOW)
    config = dataclasses.replace(config, max_length=longest)
    if not config.has_cms:
        return config
    return dataclasses.replace(config, cms_hidden=(3 * config.mlp_width // (2 * levels),) * levels)


@functools.cache
def backbone(config: ModelConfig, data: str, seed: int, batch_size: int, steps: int, rate: float) -> Any:
    """Parameters of a byte language model, trained on windows of a text."""
    cell = Options(seeds=(seed,), learning_rates=(rate,), steps=steps, batch_size=batch_size, eval_every=max(steps, 1))
    model, half = language_model(config), text.corpus(data)
    windows = text.stream(half.train, seed, batch_size, WINDOW)
    evaluate = text.evaluation(model, half.validation, rows=batch_size, length=WINDOW, limit=8)
    trained = train(model, windows, cross_entropy, evaluate, cell)
    if trained.failed:
        raise UserError(f"the {config.name} backbone was {trained.failed}; lower --backbone-rate")
    return trained.params


def start_of(cell: IncrementalOptions, config: ModelConfig, classes: int) -> Start:
    """A trained backbone, from this process's memory if it has one, and its whitened representation."""
    params = backbone(config, cell.text, cell.seeds[0], cell.batch_size, cell.steps, cell.backbone_rate)
    raw = network(config, as_it_is(config.dim))
    windows = text.stream(text.corpus(cell.text).train, TEXT_SEED, cell.batch_size, WINDOW)
    read = [_as_examples(next(windows).tokens) for _ in range(-(-WINDOWS // cell.batch_size))]
    white = whitening(np.concatenate([np.asarray(raw.represent(params, batch)) for batch in read]))
    return Start(cell, network(config, white), params, classes)


def _as_examples(tokens_NT: np.ndarray) -> Examples:
    """Texts without classes."""
    return Examples(tokens_NT, np.ones(tokens_NT.shape, bool), np.zeros(len(tokens_NT), int), np.ones(len(tokens_NT)))


class StreamJob(NamedTuple):
    """What one cell computes (as `running.Job`)."""

    column: str
    row: str
    config: ModelConfig
    model: Model
    cell: IncrementalOptions
    setting: str = ""

    def train(self, label: str, console: Console) -> Trained:
        """The backbone, if this process has not trained it yet, and then the stream."""
        cell, stream = self.cell, stream_of(self.cell)
        say(console, f"{label}  backbone ...")
        learner = METHODS[cell.methods[0]](start_of(cell, self.config, stream.classes))
        return learn(
            learner, stream, cell, lambda step, scores: say(console, f"{label}  step {step}  {percent(scores)}")
        )


def prepare(cell: IncrementalOptions) -> StreamJob:
    """What one cell computes."""
    [column], [method], [name] = cell.datasets, cell.methods, cell.models
    config, data = backbone_config(cell), _data(column, cell.data)
    if method in OF_LEVELS and not config.has_cms:
        raise UserError(f"{method} needs a model with CMS levels, hope or hope_attention; {name} has none")

    def init(key: jax.Array) -> Any:
        return with_classes(language_model(config).init(key), len(data.classes))

    model = Model(init, language_model(config).apply)
    return StreamJob(column, f"{method}, {name}", config, model, cell)


if __name__ == "__main__":
    main("class_incremental", IncrementalOptions, TINY, prepare)
