"""Deep momentum gradient descent: momentum read through a small network that learns from the momentum itself.

The paper leaves its memory, input and loss open (50); these are ours (spec 4.4). An instrument, not a default: on an
ill-conditioned quadratic its inner loss falls and it converges, but it did not beat normalised momentum.
"""

from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hope_jax.chunk_form import plain_gate
from hope_jax.momentum import Rate, check_rates, step_size
from hope_jax.newton_schulz import newton_schulz
from hope_jax.numerics import rms, wide
from hope_jax.types import Params


class DeepMemory(NamedTuple):
    """o = z + tanh(z a) b for one leaf [..., K, V]; float32 or wider."""

    a: jax.Array  # [..., V, F]
    b: jax.Array  # [..., F, V]
    start: jax.Array  # [..., V, F]  where a started; b starts at zero


class DeepMomentumState(NamedTuple):
    count: Any  # int32[]: steps taken
    momentum: Params  # like the weights: n
    memory: Any  # a DeepMemory for each leaf of two or more axes, None for the others


def deep_momentum(
    learning_rate: Rate | None = None,
    alpha: float = 0.9,
    *,
    hidden: int = 32,
    inner: str = "gram",
    zeta: float = 0.1,
    rho: float = 0.999,
    lam: float = 0.1,
    eps: float = 1e-8,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Momentum through a network m(z) = z + tanh(z A) B that is trained while it is used.

        n <- alpha n + (1 - alpha) g          z = n / (rms(n) + eps)
        theta <- theta_0 + rho (theta - theta_0) - zeta clip(grad inner(m(z)))       theta = (A, B)
        update = -eta o / max(1, rms(o)),  o = m(z) with the new theta

    A [V, F] starts from N(0, 1/V) and B [F, V] at zero, so that m starts as the identity. The rms of an update never
    exceeds eta. Every matrix of the leading axes has a network of its own, and the clip is to a norm of 1 of each;
    leaves of fewer than two axes, or empty ones, have none, o = z.

    Args:
        learning_rate: eta, a number or a schedule; None if the extra argument `eta` gives it.
        alpha: retained fraction of n in [0, 1); the extra argument `mu` (or `log_mu`) overrides it.
        hidden: F is min(hidden, V); 2 V F numbers per matrix learn, V F remember where A started.
        inner: what the network learns from o. "gram": that its Gram matrix be the identity,
            ||G - I||^2 / (4 r) + lam / 2 mean((o - z)^2), where G = o^T o / K if K >= V, else o o^T / V, and
            r = min(K, V); "l2": to be sqrt(max(K, V)) newton_schulz(n), 1/2 mean((o - that)^2).
        zeta: learning rate of the network.
        rho: its retained distance from the start in [0, 1].
        lam: weight of closeness in "gram".
        eps: added to the rms of n.
        seed: of A.

    Raises:
        ValueError: an unknown inner loss, a number out of its range, or no step size anywhere.

    Example:
        >>> tx, w = deep_momentum(0.1), jnp.zeros((2, 2))
        >>> u, state = tx.update(1e5 * jnp.eye(2), tx.init(w), w)
        >>> round(float(jnp.sqrt(jnp.mean(u**2))), 3)
        0.1

    Reference: paper (43), (50); spec 4.4.
    """
    if inner not in _INNER:
        raise ValueError(f'deep_momentum\'s inner loss is "gram" or "l2"; got {inner!r}')
    check_rates("deep_momentum", learning_rate, alpha)
    ranges = {"hidden": (hidden, 1, jnp.inf), "zeta": (zeta, 0, jnp.inf), "rho": (rho, 0, 1), "lam": (lam, 0, jnp.inf)}
    for name, (value, low, high) in ranges.items():
        if isinstance(value, Real) and not low <= value <= high:
            raise ValueError(f"deep_momentum's {name} lies in [{low}, {high}]; got {value}")

    def start(p: jax.Array, key: jax.Array) -> DeepMemory | None:
        if p.ndim < 2 or not p.size:
            return None
        *leading, _, v = p.shape
        f = min(hidden, v)
        dtype = jnp.promote_types(p.dtype, jnp.float32)
        a = jax.random.normal(key, (*leading, v, f), dtype) / v**0.5
        return DeepMemory(a, jnp.zeros((*leading, f, v), dtype), a)

    def learn(memory: DeepMemory, z: jax.Array, n: jax.Array) -> DeepMemory:
        def loss(theta: tuple[jax.Array, jax.Array]) -> jax.Array:
            return jnp.sum(_INNER[inner](_read(*theta, z), z, n, lam))  # matrices are independent

        d_a, d_b = jax.grad(loss)((memory.a, memory.b))
        square = sum(jnp.sum(d * d, axis=(-2, -1), keepdims=True) for d in (d_a, d_b))
        step = zeta / jnp.sqrt(jnp.maximum(square, 1.0))
        a = memory.start + rho * (memory.a - memory.start) - step * d_a
        return DeepMemory(a, rho * memory.b - step * d_b, memory.start)

    def init(params: Params) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        memory = [start(p, jax.random.fold_in(jax.random.key(seed), i)) for i, p in enumerate(leaves)]
        return DeepMomentumState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), treedef.unflatten(memory)
        )

    def update(updates: Any, state: Any, params: Params = None, **gates: Any):
        del params
        eta = step_size(learning_rate, state.count, gates, "deep_momentum")
        kept = plain_gate(gates, "mu", alpha)

        def leaf(g: jax.Array, old: jax.Array, memory: DeepMemory | None):
            n = kept * wide(old) + (1 - kept) * wide(g)
            z = n / (rms(n) + eps)
            if memory is not None:
                memory = jax.tree.map(lambda new, old: new.astype(old.dtype), learn(memory, z, n), memory)
            o = z if memory is None else _read(memory.a, memory.b, z)
            return (-eta * o / jnp.maximum(rms(o), 1)).astype(g.dtype), n.astype(old.dtype), memory

        gs, treedef = jax.tree.flatten(updates)
        olds, memories = map(treedef.flatten_up_to, (state.momentum, state.memory))
        done = [leaf(*x) for x in zip(gs, olds, memories, strict=True)]
        steps, momentum, memory = (treedef.unflatten([x[i] for x in done]) for i in range(3))
        return steps, DeepMomentumState(optax.safe_increment(state.count), momentum, memory)

    return optax.GradientTransformationExtraArgs(init, update)


def _read(a: jax.Array, b: jax.Array, z: jax.Array) -> jax.Array:
    return z + jnp.tanh(z @ a) @ b


def _gram(o: jax.Array, z: jax.Array, n: jax.Array, lam: Any) -> jax.Array:
    """How far the smaller Gram matrix of o is from the identity, and o from z; [...]."""
    del n
    k, v = o.shape[-2:]
    g = o.mT @ o / k if k >= v else o @ o.mT / v
    off = g - jnp.broadcast_to(jnp.eye(min(k, v), dtype=g.dtype), g.shape)
    return jnp.sum(off * off, axis=(-2, -1)) / (4 * min(k, v)) + lam / 2 * jnp.mean((o - z) ** 2, axis=(-2, -1))


def _l2(o: jax.Array, z: jax.Array, n: jax.Array, lam: Any) -> jax.Array:
    """How far o is from the orthogonal matrix next to n, of the same size as z; [...]."""
    del z, lam
    return jnp.mean((o - max(o.shape[-2:]) ** 0.5 * newton_schulz(n)) ** 2, axis=(-2, -1)) / 2


_INNER = {"gram": _gram, "l2": _l2}
