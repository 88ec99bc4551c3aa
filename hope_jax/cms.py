"""The Continuum Memory System: MLPs that learn at different rates (paper (70) to (74), spec section 6)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from hope_jax.factors import factored_vjp
from hope_jax.memories import mlp_memory
from hope_jax.nesting import nest
from hope_jax.start_levels import Meta, nest_with_starts
from hope_jax.types import Level, Linear, Memory, Nest, NestState, Params

type Variant = Literal["sequential", "nested", "independent"]


def cms_memory(width: int, hidden: int, init_scale: float = 0.5) -> Memory:
    """One link of the chain: gelu(x @ w2) @ w1, [..., D] -> [..., D] (spec 6.1).

    Args:
        width: D.
        hidden: F.
        init_scale: as in `mlp_memory`.

    Example:
        >>> import jax
        >>> memory = cms_memory(4, 8)
        >>> memory.apply(memory.init(jax.random.key(0)), jax.numpy.ones((2, 4))).shape
        (2, 4)
    """
    return mlp_memory(width, hidden, residual=False, init_scale=init_scale)


def rms_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / rms(x) over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def cms_chain(
    memories: Sequence[Memory],
    params_by_level: Sequence[Params],
    x: jax.Array,
    linear: Linear = jnp.matmul,
    *,
    norms: Sequence[Callable[[jax.Array], jax.Array]] | None = None,
    residual: bool = True,
) -> jax.Array:
    """The chain's output, fast level first: h <- h + MLP_l(norm_l(h)) (S6.1).

    Args:
        memories: one per level, fastest first.
        params_by_level: their weights.
        x: [..., D].
        linear: as in `Memory`.
        norms: one function per level; None is `rms_norm` without gains. Gains belong to the outer level.
        residual: False with identity norms is the bare chain of (70).

    Example:
        >>> import jax
        >>> links = [cms_memory(4, 8), cms_memory(4, 8)]
        >>> params = [m.init(jax.random.key(i)) for i, m in enumerate(links)]
        >>> cms_chain(links, params, jax.numpy.ones((2, 4))).shape
        (2, 4)

    Reference: paper (70); spec S6.1.
    """
    norms = norms if norms is not None else [rms_norm] * len(memories)
    for memory, params, norm in zip(memories, params_by_level, norms, strict=True):
        y = memory.apply(params, norm(x), linear=linear)
        x = x + y if residual else y
    return x


def cms_mixture(
    memories: Sequence[Memory],
    params_by_level: Sequence[Params],
    x: jax.Array,
    logits: jax.Array,
    linear: Linear = jnp.matmul,
    *,
    norms: Sequence[Callable[[jax.Array], jax.Array]] | None = None,
    residual: bool = True,
) -> jax.Array:
    """The output of independent levels side by side: x + sum_l softmax(a)_l MLP_l(norm_l(x)).

    Args:
        memories, params_by_level, linear, norms: as in `cms_chain`.
        x: [..., D].
        logits: a, [L].
        residual: keep the `x +`.

    Example:
        >>> import jax
        >>> links = [cms_memory(4, 8), cms_memory(4, 8)]
        >>> params = [m.init(jax.random.key(i)) for i, m in enumerate(links)]
        >>> cms_mixture(links, params, jax.numpy.ones((2, 4)), jax.numpy.zeros(2)).shape
        (2, 4)

    Reference: paper (74); spec 6.5.
    """
    norms = norms if norms is not None else [rms_norm] * len(memories)
    weights = jax.nn.softmax(logits)
    parts = zip(memories, params_by_level, norms, strict=True)
    y = sum(weights[i] * memory.apply(p, norm(x), linear=linear) for i, (memory, p, norm) in enumerate(parts))
    return x + y if residual else jnp.asarray(y)


def cms(
    *levels: Level,
    loss: Callable[[jax.Array, Any], jax.Array],
    residual: bool = True,
    norm: bool = True,
    variant: Variant = "sequential",
    meta: Meta = "first_order",
) -> Nest:
    """Global levels, a chain or side by side, that adapt in time to the loss of their common output.

    Args:
        levels: `level(cms_memory(D, F), tx, chunk_size)`, fastest first. The rule sees the sum of the chunk's
            errors, so a constant step must shrink like 1 / chunk_size (spec 6.2). `dgd` writes token by token.
        loss: `loss(y[C, D], target[C, ...]) -> [C]`, one number per token; make it zero where a token is padding.
        residual, norm: as in `cms_chain`.
        variant: "sequential" is the chain (73). "nested" is the chain whose level l starts again each time level
            l + 1 writes (72). "independent" reads the same input with all levels and mixes their outputs (74).
        meta: of "nested", how its start states learn: see `nest_with_starts`.

    Returns:
        A nest over `xs = (x[T, D], target[T, ...])` whose ys are the outputs [T, D], each at the weights that were
        current when its token came. The carry of "independent" is its logits [L], an outer parameter:
        `init(params_by_level, logits)`, zeros if left out. For the state of "nested" see `nest_with_starts`.

    Raises:
        ValueError: an unknown variant or meta, a level without memory or with an objective, and as in `nest`.

    Example:
        >>> import jax, optax
        >>> from hope_jax import l2_regression, level
        >>> n = cms(*[level(cms_memory(4, 8), optax.sgd(0.1 / c), c) for c in (2, 8)], loss=l2_regression.loss)
        >>> x = jax.random.normal(jax.random.key(0), (16, 4))
        >>> state, y = n.apply(n.init(n.params(jax.random.key(1))), (x, 2 * x))
        >>> y.shape
        (16, 4)

    Reference: paper (70) to (74); spec S6.1, S6.2, 6.5.
    """
    if variant not in get_args(Variant.__value__):
        raise ValueError(f"variant must be one of {', '.join(get_args(Variant.__value__))}; got {variant!r}")
    memories = [l.memory for l in levels if l.memory is not None]
    if len(memories) != len(levels) or any(l.objective is not None for l in levels):
        raise ValueError("levels of a cms need a memory and no objective of their own: its loss is the objective")
    norms = [rms_norm if norm else lambda x: x] * len(levels)

    def error(params_by_level: tuple[Params, ...], carry: Any, chunk: tuple[jax.Array, Any]):
        x, target = chunk

        def forward(refs: tuple[Params, ...], linear: Linear) -> tuple[jax.Array, jax.Array]:
            if variant == "independent":
                y = cms_mixture(memories, refs, x, carry, linear, norms=norms, residual=residual)
            else:
                y = cms_chain(memories, refs, x, linear, norms=norms, residual=residual)
            return jnp.sum(loss(y, target)), y

        total, backward, y = factored_vjp(forward, params_by_level)
        return backward(jnp.ones_like(total)), carry, y

    if variant == "nested":
        return nest_with_starts(*levels, error=error, meta=meta)
    made = nest(*levels, error=error)
    return made if variant == "sequential" else made._replace(init=_with_logits(made, len(levels)))


def _with_logits(made: Nest, depth: int) -> Callable[..., NestState]:
    """`init` of independent levels: their logits are the carry."""

    def init(params_by_level: tuple[Params, ...], logits: jax.Array | None = None) -> NestState:
        if logits is None:
            logits = jnp.zeros(depth, jnp.result_type(*jax.tree.leaves(params_by_level)))
        if jnp.shape(logits) != (depth,):
            raise ValueError(f"independent levels need one logit each, shape ({depth},); got {jnp.shape(logits)}")
        return made.init(params_by_level, logits)

    return init


def slow_period(chunk_size: int, length: int, tokens_per_step: int) -> int | None:
    """Where a level's clock lives: None inside the sequence, else its period in optimizer steps (spec 6.4).

    Args:
        chunk_size: C, tokens per write.
        length: T, tokens per sequence.
        tokens_per_step: tau, tokens per optimizer step over the whole batch and all devices.

    Raises:
        ValueError: T < C < tau, or C not a multiple of tau: no step ends where the chunk ends.

    Example:
        >>> slow_period(16, 512, 4096), slow_period(16384, 512, 4096)
        (None, 4)
    """
    if chunk_size <= length:
        return None
    if chunk_size < tokens_per_step or chunk_size % tokens_per_step:
        raise ValueError(
            f"a level's chunk must fit into the sequence or be a multiple of the tokens per step; got "
            f"chunk size C={chunk_size}, sequence length T={length}, tokens per step tau={tokens_per_step}"
        )
    return chunk_size // tokens_per_step
