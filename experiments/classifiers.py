"""Ways of learning classes from a stream of examples, each a state and functions of it.

What predicts is a network with a representation of a text, the mean over its bytes of the model's last layer after its
norm, and a class head on it, [D, classes], with all classes from the start: the simplest that every method can use.
Labels as next bytes would leave nearest means without a representation and add spelling to the task. The representation
is whitened once, by its mean and covariance on the text on which the backbone was trained: without that a few of its
directions have most of the variance, and the head alone learns almost nothing in one pass.

The loss is the cross-entropy among the classes that a batch has (Zeno et al. 2018, arXiv:1803.10123): among all classes
its gradient pushes those of other tasks down until none is predicted, whatever the rest of a method does.

    gradient    a step per batch; `tx` says which parameters learn and how often, `strength` > 0 is EWC
    replay      the same with as many old examples, from a reservoir, beside each batch
    by_means    no gradient: statistics of classes in the representation of the backbone, which stays as it is
    adapting    the same while the backbone goes on learning to predict the bytes that it reads, labels unseen: each
                example counts as it was represented when it came
    by_search   no gradient: the examples themselves; a vote of the most similar
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import continual_baselines as baselines
from experiments.continual_baselines import Anchor, Reservoir, Statistics
from experiments.intents import Examples
from hope_jax.models import ModelConfig, build_lm

type Params = dict[str, Any]

FISHER_EXAMPLES = 256  # of a task, at most


class Learner(NamedTuple):
    """A method: what it knows is its state."""

    init: Callable[[], Any]
    read: Callable[[Any, Examples], tuple[Any, float]]  # a batch of the stream; its loss, 0 if there is none
    finish: Callable[[Any, Examples], Any]  # a task ends, these were its examples
    predict: Callable[[Any, Examples], np.ndarray]  # [N] classes


class Network(NamedTuple):
    """A language model that reads texts for their class."""

    represent: Callable[[Params, Examples], jax.Array]  # [N, D]
    logits: Callable[[Params, Examples], jax.Array]  # [N, classes]
    nats: Callable[[Params, Examples], jax.Array]  # mean of the next bytes, by the model's own head


class Learned(NamedTuple):
    """What a gradient method knows."""

    params: Params
    opt_state: Any
    anchor: Anchor | None


class Whitening(NamedTuple):
    """What makes representations of a text have mean 0 and covariance 1."""

    mean_D: np.ndarray
    map_DD: np.ndarray


def as_it_is(width: int) -> Whitening:
    """Of representations that shall stay what they are."""
    return Whitening(np.zeros(width, np.float32), np.eye(width, dtype=np.float32))


def whitening(x_ND: np.ndarray) -> Whitening:
    """Of these representations; directions of almost no variance stay smaller than others.

    >>> x_ND = np.array([[1.0, 0.0], [3.0, 0.0], [1.0, 8.0], [3.0, 8.0]])
    >>> white = whitening(x_ND)
    >>> np.cov(((x_ND - white.mean_D) @ white.map_DD).T, bias=True).round(2).tolist()
    [[0.99, 0.0], [0.0, 1.0]]
    """
    mean_D = x_ND.mean(axis=0)
    variance_D, axes_DD = np.linalg.eigh(np.cov(x_ND.T, bias=True))
    map_DD = axes_DD / np.sqrt(variance_D + baselines.RIDGE * variance_D.mean())
    return Whitening(mean_D.astype(np.float32), map_DD.astype(np.float32))


def network(config: ModelConfig, white: Whitening) -> Network:
    """Of a model whose parameters have a class head in the place of its head."""
    lm = build_lm(config)
    unchanged_DD = np.eye(config.dim, dtype=np.float32)

    def represent(params: Params, examples: Examples) -> jax.Array:
        tokens_NT, mask_NT = jnp.asarray(examples.tokens_NT, jnp.int32), jnp.asarray(examples.mask_NT)
        fresh = lm.init_state(params, tokens_NT.shape[0])
        _, x_NTD = lm.apply({**params, "head": unchanged_DD}, fresh, tokens_NT, phase=0, mask_BT=mask_NT)
        read_N = jnp.maximum(mask_NT.sum(axis=1), 1)  # a filling row has no bytes
        mean_ND = jnp.where(mask_NT[..., None], x_NTD, 0).sum(axis=1) / read_N[:, None]
        return (mean_ND - white.mean_D[None]) @ white.map_DD

    def logits(params: Params, examples: Examples) -> jax.Array:
        return represent(params, examples) @ params["head"]

    def nats(params: Params, examples: Examples) -> jax.Array:
        tokens_NT, mask_NT = jnp.asarray(examples.tokens_NT, jnp.int32), jnp.asarray(examples.mask_NT)
        fresh = lm.init_state(params, tokens_NT.shape[0])
        _, logits_NTV = lm.apply(params, fresh, tokens_NT[:, :-1], phase=0, mask_BT=mask_NT[:, :-1])
        nats_NT = optax.softmax_cross_entropy_with_integer_labels(logits_NTV, tokens_NT[:, 1:])
        return jnp.where(mask_NT[:, 1:], nats_NT, 0).sum() / mask_NT[:, 1:].sum()

    return Network(jax.jit(represent), jax.jit(logits), jax.jit(nats))


def with_classes(backbone: Params, classes: int) -> Params:
    """Its parameters with a head of zeros for these classes."""
    return {**backbone, "head": jnp.zeros((len(backbone["head"]), classes), jnp.float32)}


def gradient(
    net: Network, params: Params, tx: optax.GradientTransformation, *, batch_size: int, strength: float = 0.0
) -> Learner:
    """Cross-entropy of the class, a step per batch.

    Args:
      net: what is trained.
      params: where it starts.
      tx: the optimizer.
      batch_size: of EWC's sums.
      strength: of EWC's penalty; 0 for none.
    """

    def log_p(params: Params, examples: Examples, among_C: jax.Array) -> jax.Array:
        logits_NC = jnp.where(among_C[None], net.logits(params, examples), -jnp.inf)
        return -optax.softmax_cross_entropy_with_integer_labels(logits_NC, jnp.asarray(examples.labels_N))

    def loss(params: Params, examples: Examples, anchor: Anchor | None) -> jax.Array:
        labels_N, weights_N = jnp.asarray(examples.labels_N), jnp.asarray(examples.weights_N)
        among_C = jnp.zeros(params["head"].shape[1], bool).at[labels_N].max(weights_N > 0)
        nats_N = jnp.where(weights_N > 0, -log_p(params, examples, among_C), 0)  # of filling rows they are infinite
        nats = nats_N.sum() / weights_N.sum()
        return nats if anchor is None else nats + baselines.penalty(params, anchor, strength)

    fisher = baselines.fisher(log_p)

    @jax.jit
    def step(state: Learned, examples: Examples) -> tuple[Learned, jax.Array]:
        value, grads = jax.value_and_grad(loss)(state.params, examples, state.anchor)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state), value

    def init() -> Learned:
        none = Anchor(params, jax.tree.map(jnp.zeros_like, params)) if strength else None
        return Learned(params, jax.jit(tx.init)(params), none)

    def read(state: Learned, examples: Examples) -> tuple[Learned, float]:
        state, value = step(state, examples)
        return state, float(value)

    def finish(state: Learned, task: Examples) -> Learned:
        if state.anchor is None:
            return state
        some = task.rows(slice(0, FISHER_EXAMPLES))
        among_C = np.isin(np.arange(state.params["head"].shape[1]), task.labels_N)
        new = fisher(state.params, filled(some, batch_size), among_C)
        return state._replace(anchor=Anchor(state.params, jax.tree.map(jnp.add, state.anchor.fisher, new)))

    def predict(state: Learned, examples: Examples) -> np.ndarray:
        return np.asarray(net.logits(state.params, examples)).argmax(axis=1)

    return Learner(init, read, finish, predict)


class Replaying(NamedTuple):
    """What a method knows that also reads old examples."""

    inner: Any
    buffer: Reservoir | None  # None before the first batch


def replay(learner: Learner, capacity: int, seed: int) -> Learner:
    """`learner` reads beside each batch as many examples from a reservoir of all before it."""
    rng = np.random.default_rng(seed)

    def read(state: Replaying, examples: Examples) -> tuple[Replaying, float]:
        buffer = state.buffer or baselines.reservoir(capacity, examples)
        old = baselines.draw(buffer, examples.size, rng)
        inner, value = learner.read(state.inner, baselines.joined(examples, old))
        return Replaying(inner, baselines.add(buffer, examples.rows(examples.weights_N > 0), rng)), value

    return Learner(
        init=lambda: Replaying(learner.init(), None),
        read=read,
        finish=lambda state, task: state._replace(inner=learner.finish(state.inner, task)),
        predict=lambda state, examples: learner.predict(state.inner, examples),
    )


def by_means(
    net: Network, params: Params, classes: int, nearest: Callable[[Statistics, np.ndarray], np.ndarray]
) -> Learner:
    """Statistics of classes; `nearest` is `nearest_mean` or `discriminant`."""

    def read(state: Statistics, examples: Examples) -> tuple[Statistics, float]:
        real_N = examples.weights_N > 0
        x_ND = np.asarray(net.represent(params, examples))
        return baselines.observe(state, x_ND[real_N], examples.labels_N[real_N]), 0.0

    return Learner(
        init=lambda: baselines.statistics(classes, len(params["head"])),
        read=read,
        finish=lambda state, task: state,
        predict=lambda state, examples: nearest(state, np.asarray(net.represent(params, examples))),
    )


class Adapted(NamedTuple):
    """A backbone that goes on learning, and what it saw."""

    params: Params
    opt_state: Any
    seen: Statistics


def adapting(
    net: Network,
    params: Params,
    tx: optax.GradientTransformation,
    classes: int,
    nearest: Callable[[Statistics, np.ndarray], np.ndarray],
) -> Learner:
    """`by_means` in a representation that `tx` changes batch by batch, by the loss of the next bytes.

    Args:
      net: the model.
      params: where it starts, with the model's own head.
      tx: the optimizer.
      classes: how many.
      nearest: as in `by_means`.
    """

    @jax.jit
    def step(params: Params, opt_state: Any, examples: Examples) -> tuple[Params, Any, jax.Array]:
        value, grads = jax.value_and_grad(net.nats)(params, examples)
        updates, opt_state = tx.update(grads, opt_state, params)
        return cast(Params, optax.apply_updates(params, updates)), opt_state, value

    def init() -> Adapted:
        return Adapted(params, jax.jit(tx.init)(params), baselines.statistics(classes, len(params["head"])))

    def read(state: Adapted, examples: Examples) -> tuple[Adapted, float]:
        seen, _ = by_means(net, state.params, classes, nearest).read(state.seen, examples)
        params, opt_state, value = step(state.params, state.opt_state, examples)
        return Adapted(params, opt_state, seen), float(value)

    def predict(state: Adapted, examples: Examples) -> np.ndarray:
        return by_means(net, state.params, classes, nearest).predict(state.seen, examples)

    return Learner(init, read, lambda state, task: state, predict)


class Found(NamedTuple):
    """The examples of a stream."""

    unit_ND: np.ndarray  # representations of length 1
    labels_N: np.ndarray


def by_search(net: Network, params: Params, classes: int, neighbours: int) -> Learner:
    """The class with the most of the `neighbours` examples whose representations have the least angle."""

    def directions(examples: Examples) -> np.ndarray:
        x_ND = np.asarray(net.represent(params, examples))
        return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)

    def read(state: Found, examples: Examples) -> tuple[Found, float]:
        real_N = examples.weights_N > 0
        new = Found(directions(examples)[real_N], examples.labels_N[real_N])
        return Found(*map(np.concatenate, zip(state, new, strict=True))), 0.0

    def predict(state: Found, examples: Examples) -> np.ndarray:
        return vote(directions(examples) @ state.unit_ND.T, state.labels_N, classes, neighbours)

    def init() -> Found:
        return Found(np.zeros((0, len(params["head"])), np.float32), np.zeros(0, np.int32))

    return Learner(init, read, lambda state, task: state, predict)


def vote(cosine_NM: np.ndarray, labels_M: np.ndarray, classes: int, neighbours: int) -> np.ndarray:
    """[N]: the class with the most of the greatest cosines; where several have as many, that with the greatest sum.

    >>> vote(np.array([[0.9, 0.5, 0.6, 0.1]]), np.array([0, 1, 1, 0]), classes=2, neighbours=3)
    array([1])
    """
    count = min(neighbours, len(labels_M))
    near_NK = np.argpartition(-cosine_NM, count - 1, axis=1)[:, :count]
    votes_NC = np.zeros((len(cosine_NM), classes))
    rows_NK = np.broadcast_to(np.arange(len(cosine_NM))[:, None], near_NK.shape)
    weight_NK = 1 + np.take_along_axis(cosine_NM, near_NK, axis=1) / (4 * count)  # sums of cosines break ties only
    np.add.at(votes_NC, (rows_NK, labels_M[near_NK]), weight_NK)
    return votes_NC.argmax(axis=1)


def filled(examples: Examples, size: int) -> Iterator[Examples]:
    """In batches of `size`, the last one filled up with rows of weight 0."""
    for begin in range(0, examples.size, size):
        batch = examples.rows(slice(begin, begin + size))
        missing = size - batch.size
        yield Examples(*(np.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)) for leaf in batch))
