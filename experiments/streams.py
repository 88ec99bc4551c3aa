"""A trained byte model that goes on learning while texts stream by, and what it knows after each of them.

A stream is read in windows that share one byte. Attention and memories start empty in each window, as in training; the
weights that learn are carried from window to window and from text to text. After each text what was learned is put
into the parameters and held-out windows are read with learning switched off.

What learns is a learner (`experiments/learners.py`). All its inner learning rates are one program (`vmap`), so a cell
is a whole curve. A model that diverges, or knows less than nothing of a text, counts as 8 bits per byte.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import text
from experiments.cells import RAW_BITS
from experiments.context_use import windows
from experiments.learners import Moving, learner, moving
from experiments.options import BYTES, Options, at_least, fingerprint, model_config
from experiments.published import FORGOTTEN, GAINED
from experiments.running import Job
from experiments.sources import label
from experiments.training import Batch, Model, Scores, Trained, cross_entropy, language_model, train
from hope_jax.models import ModelConfig
from hope_jax.training import documents
from hope_jax.training.corpus import Corpus
from hope_jax.training.errors import UserError
from hope_jax.training.overrides import one_line


@dataclasses.dataclass(frozen=True)
class StreamOptions(Options):
    """Streams after training.

    Attributes:
      learners: what learns, see `experiments/learners.py`.
      rates: inner learning rates of each learner.
      meta_rate: inner learning rate while meta-learners are trained.
      levels: CMS levels of a block.
      length: bytes of a window.
      windows: of each streamed text.
      test_windows: of each held-out text, spread evenly over it.
      data: the texts, see `experiments/sources.py`.
    """

    models: tuple[str, ...] = ("hope_attention",)
    learners: tuple[str, ...] = ()
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    meta_rate: float = 0.1
    learning_rates: tuple[float, ...] = (1e-2,)
    warmup: int = 20
    chunks: tuple[int, ...] = (16,)
    steps: int = 200
    batch_size: int = 4
    levels: int = 3
    length: int = 512
    windows: int = 32
    test_windows: int = 16
    data: tuple[str, ...] = ()

    GRID: ClassVar[tuple[str, ...]] = ("models", "learners", "learning_rates", "weight_decays", "chunks", "seeds")
    KNOWN_MODELS: ClassVar[tuple[str, ...]] = ("hope_attention", "hope", "transformer")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, dict.fromkeys(("levels", "length", "windows", "test_windows"), 1))
        for name in self.learners:
            learner(name)
        if not self.rates or min(self.rates) < 0:
            raise UserError(f"rates must be one or more numbers of at least 0; got {list(self.rates)}")


class AtRates(NamedTuple):
    """Learners that differ in their learning rate alone; R of them."""

    rates: Sequence[float]  # [R]
    start: Callable[[Any], Any]  # params -> weights [R, ...]
    learn: Callable[[Any, Any, np.ndarray], Any]  # (params, weights, windows [N, T + 1]) -> weights
    measure: Callable[[Any, Any, np.ndarray], np.ndarray]  # (params, weights, held-out windows [M, T + 1]) -> bits [R]
    at: Callable[[Any, Any, int], Any]  # (params, weights, i) -> the parameters with what the i-th has learned


def at_rates(base: ModelConfig, moving: Moving, rates: Sequence[float]) -> AtRates:
    """How texts stream through learners with these rates, and what held-out windows cost with what they learned.

    Args:
      base: the model without fast levels.
      moving: the weights that learn.
      rates: [R].
    """
    model, etas_R = language_model(base), jnp.asarray(rates, jnp.float32)

    def start(params: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(rates), *leaf.shape)), moving.start(params))

    @jax.jit
    def learn(params: Any, weights_R: Any, windows_NT: jax.Array) -> Any:
        def one(weights: Any, eta: jax.Array) -> Any:
            def window(weights: Any, tokens_T: jax.Array) -> tuple[Any, None]:
                return moving.read(params, weights, tokens_T.astype(jnp.int32), eta), None

            return moving.rest(params, jax.lax.scan(window, weights, windows_NT)[0], windows_NT)

        return jax.vmap(one)(weights_R, etas_R)

    @jax.jit
    def measure(params: Any, weights_R: Any, windows_MT: jax.Array) -> jax.Array:
        tokens_MT = windows_MT.astype(jnp.int32)

        def one(at: tuple[Any, jax.Array]) -> jax.Array:
            logits_MTV = model.apply(moving.put(params, at[0]), tokens_MT[:, :-1])
            bits = documents.cross_entropy(logits_MTV, tokens_MT[:, 1:]).mean() / math.log(2)
            return jnp.where(bits < RAW_BITS, bits, RAW_BITS)

        return jax.lax.map(one, (weights_R, etas_R))

    def at(params: Any, weights_R: Any, number: int) -> Any:
        return moving.put(params, jax.tree.map(lambda leaf_R: leaf_R[number], weights_R))

    return AtRates(rates, start, learn, measure, at)


def stages(learners: AtRates, params: Any, texts: Sequence[np.ndarray]) -> Iterator[Any]:
    """The weights before the first text, windows [N, T + 1], and after each."""
    weights = learners.start(params)
    yield weights
    for streamed in texts:
        weights = learners.learn(params, weights, streamed)
        yield weights


def measured(learners: AtRates, params: Any, weights: Iterable[Any], tests: Sequence[np.ndarray]) -> np.ndarray:
    """[R, stages, tests] bits per byte of every held-out text at each of the stages."""
    found = [[learners.measure(params, stage, shown) for shown in tests] for stage in weights]
    return np.asarray(found).transpose(2, 0, 1)


def trace(learners: AtRates, params: Any, texts: Sequence[np.ndarray], tests: Sequence[np.ndarray]) -> np.ndarray:
    """[R, 1 + texts, tests] bits per byte of every held-out text before the first text and after each.

    Args:
      learners: R of them.
      params: trained.
      texts: windows [N, T + 1] each, streamed in this order.
      tests: held-out windows [M, T + 1] each.
    """
    return measured(learners, params, stages(learners, params, texts), tests)


class TradeOff(NamedTuple):
    """[R] each, bits per byte."""

    forgotten: np.ndarray  # of the first text: what it costs in the end, less the least it ever cost before
    gained: np.ndarray  # on the second: the least it ever cost before, less what it costs in the end
    both: np.ndarray  # what the two cost in the mean in the end


def trade_off(bits_RPT: np.ndarray) -> TradeOff:
    """From the bits of the (first, second) text at the start, then after each text up to the second.

    Before means at best: a learner that ruins the first text while it streams that one has not forgotten nothing.

    >>> trade_off(np.array([[[3.0, 5.0], [3.25, 5.5], [3.5, 4.0]]]))
    TradeOff(forgotten=array([0.5]), gained=array([1.]), both=array([3.75]))
    """
    before_RT, after_RT = bits_RPT[:, :-1].min(axis=1), bits_RPT[:, -1]
    return TradeOff(after_RT[:, 0] - before_RT[:, 0], before_RT[:, 1] - after_RT[:, 1], after_RT.mean(axis=1))


def curve(rates: Sequence[float], found: TradeOff) -> tuple[int, Scores]:
    """The best rate's number, that with the fewest bits of both texts, and the scores of all rates and of this one."""
    best = int(found.both.argmin())
    scores = {name: float(getattr(found, name.removeprefix("bits_"))[best]) for name in SUMMARY}
    for i, rate in enumerate(rates):
        scores |= {f"{FORGOTTEN}{rate:g}": float(found.forgotten[i]), f"{GAINED}{rate:g}": float(found.gained[i])}
    return best, scores


SUMMARY = ("bits_both", "bits_forgotten", "bits_gained")


def configs(cell: StreamOptions) -> tuple[ModelConfig, ModelConfig]:
    """The model of a cell without and with the levels of its learner.

    Raises:
      UserError: the model has no such levels, or its windows are not whole chunks of them.
    """
    who = learner(cell.learners[0])
    base = model_config(cell, vocab_size=BYTES, length=cell.length + 1, levels=cell.levels)
    for clock in who.clocks:
        if cell.length % clock:
            raise UserError(f"length must be a multiple of every clock; got {cell.length} and {clock}")
    if base.cms_variant == "nested":
        raise UserError("nested levels start again with every window; stream sequential or independent ones")
    if who.kind == "all":
        slowest = 1 if base.architecture.cache else max(base.chunk_proj, base.chunk_mem)
        if who.clocks[0] % slowest:
            raise UserError(
                f"the clock of 'all' must be a multiple of the memories' chunk {slowest}; got {who.clocks[0]}"
            )
        return base, base
    field = "cms_chunks" if base.has_cms else "mlp_chunks"
    clocks = who.clocks if base.has_cms or not who.clocks else (*who.clocks, *[None] * (base.layers - len(who.clocks)))
    try:
        if who.kind == "sleep" and not base.has_cms:
            raise UserError(f"sleep needs a CMS chain; {base.name} has none, hope_attention and hope have")
        return base, dataclasses.replace(base, **{field: clocks}, cms_eta=cell.meta_rate)
    except ValueError as error:
        raise UserError(one_line(error)) from error


def prepare_streams(cell: StreamOptions, train: np.ndarray, scores: Callable[[AtRates, Any], Scores]) -> Job:
    """What one cell computes: a model trained on `train`, and its `scores` after streams.

    Args:
      cell: one cell.
      train: the text of the training.
      scores: (learners, params) -> scores, of the learner at its rates and the trained parameters.
    """
    [seed], [name] = cell.seeds, cell.learners
    who = learner(name)
    base, config = configs(cell)
    rates = cell.rates if who.clocks else (0.0,)
    streaming = at_rates(base, moving(config, who), rates)

    def evaluate(params: Any) -> Scores:
        return scores(streaming, params)

    return Job(
        " → ".join(map(label, cell.data)),
        "",
        config,
        language_model(config if who.kind == "meta" else base),
        text.stream(train, seed, cell.batch_size, cell.length),
        cross_entropy,
        evaluate,
        dataclasses.replace(cell, eval_every=cell.steps),  # the streams are read once, after training
        row=f"{cell.models[0]}, {name}",
        how=train_once,
    )


TRAINED: dict[str, Trained] = {}  # by the settings that training depends on


def train_once(
    model: Model, batches: Iterator[Batch], loss: Any, evaluate: Any, cell: StreamOptions, **how: Any
) -> Trained:
    """As `train`, but learners that start at the same parameters share their training."""
    who = cell.learners[0] if learner(cell.learners[0]).kind == "meta" else "plain"
    key = fingerprint(dataclasses.replace(cell, learners=(), rates=(0.0,), windows=1, test_windows=1)) + who
    if key not in TRAINED:
        TRAINED[key] = train(model, batches, loss, lambda params: {}, cell, **how)
    found = TRAINED[key]
    return found if found.failed else found._replace(curve=[(found.steps, evaluate(found.params))])


def cut(streamed: np.ndarray, cell: StreamOptions) -> np.ndarray:
    """[windows, length + 1] of a text, one after the other, from a place that the seed draws.

    Raises:
      UserError: the text is too short.
    """
    size = cell.windows * cell.length
    if streamed.size <= size:
        raise UserError(
            f"a text of {streamed.size} bytes has no {cell.windows} windows of {cell.length}; lower --windows or give "
            "a longer one"
        )
    begin = np.random.default_rng(cell.seeds).integers(streamed.size - size)
    return np.stack([streamed[i : i + cell.length + 1] for i in range(begin, begin + size, cell.length)])


def held_out(corpus: Corpus, cell: StreamOptions) -> np.ndarray:
    """[test_windows, length + 1] of the held-out part of a text; the same for all seeds.

    Raises:
      UserError: the part is shorter than a window.
    """
    size = corpus.validation.size
    if size <= cell.length:
        raise UserError(f"{corpus.name} has {size} held-out bytes; lower --length {cell.length} or give a longer text")
    return windows(corpus.validation, cell.test_windows, cell.length)
