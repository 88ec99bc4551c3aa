"""What others do against forgetting, as pure functions: EWC, a reservoir to replay from, and statistics of classes.

ewc         loss + strength / 2 sum_i F_i (theta_i - theta*_i)^2, with F the mean squared per-example gradient of the
            log-likelihood at the end of each task, summed over tasks, and theta* the parameters at the last of
            those ends (Kirkpatrick et al. 2017, arXiv:1612.00796, with the one anchor of Schwarz et al. 2018,
            arXiv:1805.06370; spec 11.7)
reservoir   every example read so far is in it with the same probability (Vitter 1985, algorithm R)
statistics  of classes, in which order does not matter: nearest mean, or linear discriminants, that is the nearest
            mean in the metric of the covariance within classes (Hayes and Kanan 2020, arXiv:1909.01520)
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.intents import Examples

RIDGE = 1e-3  # of the mean variance, added to every direction of a covariance


class Anchor(NamedTuple):
    """Where parameters were, and how much each matters."""

    params: Any
    fisher: Any


def penalty(params: Any, anchor: Anchor, strength: float) -> jax.Array:
    """strength / 2 sum_i F_i (theta_i - theta*_i)^2.

    >>> import jax.numpy as jnp
    >>> float(penalty(jnp.array([1.0, 2.0]), Anchor(jnp.array([0.0, 0.0]), jnp.array([3.0, 0.5])), 2.0))
    5.0
    """

    def leaf(p: jax.Array, at: jax.Array, fisher: jax.Array) -> jax.Array:
        return (fisher * (p - at) ** 2).sum()

    parts = jax.tree.leaves(jax.tree.map(leaf, params, anchor.params, anchor.fisher))
    return strength / 2 * jnp.stack(parts).sum()


def fisher(log_p: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The mean over examples of the squared gradient of each one's log-likelihood, as a function.

    Args:
      log_p: (params, examples, what else it takes) -> [N].

    Returns:
      (params, batches of one shape, what else) -> a tree like the parameters; rows of weight 0 do not count.
    """

    @jax.jit
    def squares(params: Any, batch: Examples, *rest: Any) -> Any:
        def one(row: Examples) -> Any:
            return jax.grad(lambda p: log_p(p, row.rows(None), *rest)[0])(params)

        def total(grads: jax.Array) -> jax.Array:
            real = jnp.expand_dims(jnp.asarray(batch.weights_N) > 0, tuple(range(1, grads.ndim)))
            return jnp.where(real, grads * grads, 0).sum(axis=0)

        return jax.tree.map(total, jax.vmap(one)(jax.tree.map(jnp.asarray, batch)))

    def mean(params: Any, batches: Iterable[Examples], *rest: Any) -> Any:
        total, count = jax.tree.map(jnp.zeros_like, params), 0.0
        for batch in batches:
            total = jax.tree.map(jnp.add, total, squares(params, batch, *rest))
            count += float(batch.weights_N.sum())
        return jax.tree.map(lambda leaf: leaf / count, total)

    return mean


class Reservoir(NamedTuple):
    """A sample without replacement of all examples that came by."""

    held: Examples  # at most `capacity` rows
    capacity: int
    seen: int


def reservoir(capacity: int, like: Examples) -> Reservoir:
    """An empty one for examples like these."""
    return Reservoir(like.rows(slice(0, 0)), capacity, 0)


def add(buffer: Reservoir, examples: Examples, rng: np.random.Generator) -> Reservoir:
    """After these examples came by, in their order."""
    free = max(0, buffer.capacity - buffer.held.size)
    held = joined(buffer.held, examples.rows(slice(0, free)))
    seen = buffer.seen + min(free, examples.size)
    for row in range(free, examples.size):
        seen += 1
        place = int(rng.integers(seen))
        if place < buffer.capacity:
            for leaf, new in zip(held, examples, strict=True):
                leaf[place] = new[row]
    return Reservoir(held, buffer.capacity, seen)


def draw(buffer: Reservoir, count: int, rng: np.random.Generator) -> Examples:
    """`count` of the examples held, each as often as another by chance; as many of weight 0 while there are none."""
    if buffer.held.size == 0:
        return Examples(*(np.zeros((count, *leaf.shape[1:]), leaf.dtype) for leaf in buffer.held))
    return buffer.held.rows(rng.integers(buffer.held.size, size=count))


def joined(*parts: Examples) -> Examples:
    """One after the other."""
    return Examples(*map(np.concatenate, zip(*parts, strict=True)))


class Statistics(NamedTuple):
    """Of representations, in float64: sums that every order of the same examples makes the same, up to rounding."""

    count_C: np.ndarray
    sum_CD: np.ndarray
    moment_DD: np.ndarray  # of all classes, not centred


def statistics(classes: int, width: int) -> Statistics:
    """Of no examples."""
    return Statistics(np.zeros(classes), np.zeros((classes, width)), np.zeros((width, width)))


def observe(found: Statistics, x_ND: np.ndarray, labels_N: np.ndarray) -> Statistics:
    """After these representations and their classes."""
    x_ND = x_ND.astype(np.float64)
    member_NC = np.eye(len(found.count_C))[labels_N]
    return Statistics(
        found.count_C + member_NC.sum(axis=0), found.sum_CD + member_NC.T @ x_ND, found.moment_DD + x_ND.T @ x_ND
    )


def nearest_mean(found: Statistics, x_ND: np.ndarray) -> np.ndarray:
    """[N]: the class, of those seen, whose mean is nearest."""
    return _nearest(found, x_ND, np.eye(x_ND.shape[1]))


def discriminant(found: Statistics, x_ND: np.ndarray) -> np.ndarray:
    """[N]: the class, of those seen, whose mean is nearest in the metric of the covariance within classes."""
    mean_CD = _means(found)
    within_DD = (found.moment_DD - np.einsum("c,cd,ce->de", found.count_C, mean_CD, mean_CD)) / found.count_C.sum()
    width = len(within_DD)
    ridge = RIDGE * np.trace(within_DD) / width
    return _nearest(found, x_ND, np.linalg.inv(within_DD + (ridge or 1.0) * np.eye(width)))


def _means(found: Statistics) -> np.ndarray:
    return found.sum_CD / np.maximum(found.count_C, 1)[:, None]


def _nearest(found: Statistics, x_ND: np.ndarray, metric_DD: np.ndarray) -> np.ndarray:
    """Least (x - mean) metric (x - mean); the term in x alone is the same for all classes."""
    mean_CD = _means(found)
    half_C = np.einsum("cd,de,ce->c", mean_CD, metric_DD, mean_CD) / 2
    score_NC = x_ND @ metric_DD @ mean_CD.T - half_C
    return np.where(found.count_C > 0, score_NC, -np.inf).argmax(axis=1)
