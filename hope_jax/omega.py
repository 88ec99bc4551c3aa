"""The Omega rule (68), every token writes the last c tokens again, and Atlas, which writes their sum by Muon.

What a chunk writes is one factored error over its own tokens and the c - 1 before them, each as often and as strongly
as the windows of the chunk hold it. The c - 1 last tokens are the nest's carry.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hope_jax.chunk_form import gate
from hope_jax.levels import level
from hope_jax.local import heads_first, local_write
from hope_jax.momentum import descent
from hope_jax.nesting import nest
from hope_jax.newton_schulz import newton_schulz
from hope_jax.objectives import l2_regression
from hope_jax.transforms import dgd, heavy_ball, retention
from hope_jax.types import Level, Memory, Nest, NestState, Outer, Params, Tokens, Write, is_outer
from hope_jax.writing import factored_errors


class Seen(NamedTuple):
    """Tokens of the window; those that are not there, or masked, weigh nothing."""

    key: jax.Array  # [..., c - 1, K]
    value: jax.Array  # [..., c - 1, V]
    weight: jax.Array  # [..., c - 1]


def omega(memory: Memory, widths: tuple[int, int], chunk_size: int, window: int) -> Nest:
    """The Omega rule: gradient descent with retention on a window of c tokens. Gates: eta, alpha.

        M_t = alpha_t M_{t-1} - sum_{i = t-c+1}^t eta_i grad l(M; k_i, v_i)

    with L2 errors and reads at the chunk's start. A token's own step eta_i weighs it in every window (gamma of the
    paper). The window crosses chunks; masked tokens keep their place in it and write nothing. c = 1 is gradient descent
    with retention.

    Args:
        memory: a matrix or an MLP.
        widths: K and V.
        chunk_size: C, tokens per gradient point; 1 is exactly (68).
        window: c.

    Returns:
        A nest over `Tokens`.

    Raises:
        ValueError: a window below 1; on apply, tokens without eta.

    Example:
        >>> from hope_jax import linear_memory
        >>> n, x = omega(linear_memory(1, 1), (1, 1), 1, window=2), jnp.ones((3, 1))
        >>> state, y = n.apply(n.init(({"w": jnp.zeros((1, 1))},)), Tokens(x, x, x, eta=jnp.full(3, 0.5)))
        >>> y[:, 0].tolist()
        [0.0, 0.5, 1.0]

    Reference: paper (68); arXiv:2505.23735.
    """

    def plan(gates: dict[str, jax.Array]):
        log_alpha = gates.get("log_alpha", jnp.zeros_like(gates["eta"]))
        total = jnp.cumsum(log_alpha, axis=-1)
        retained = jnp.exp(total[..., -1:] - total)  # what the end of the chunk retains of each token's write
        # The whole decay (at least e^-30, the kernel's floor) stands before the first write: what follows a write is in
        # its strength already.
        rest = jnp.zeros((*total.shape[:-1], total.shape[-1] + window - 2), total.dtype)
        return gates["eta"], retained, {"log_alpha": jnp.concatenate([total[..., -1:], rest], axis=-1)}

    rule = dgd(1.0, exact=False, decay=False)
    lev = level(memory, rule, chunk_size, objective=l2_regression)
    return _windowed(lev, memory, widths, window, ("eta",), plan)


def atlas(memory: Memory, widths: tuple[int, int], chunk_size: int, window: int, steps: int = 5) -> Nest:
    """Atlas: the Omega rule with momentum, written by Muon once per chunk. Gates: eta, alpha, mu.

        S_n = mu_n S_{n-1} + sum_{t in chunk n} sum_{i = t-c+1}^t grad l(M_{n-1}; k_i, v_i)
        M_n = alpha_n M_{n-1} - eta_n NewtonSchulz(S_n)

    with L2 errors and reads at the chunk's start. A chunk's eta is the sum of its tokens', its alpha and mu are
    products. The window is that of `omega`.

    Args:
        memory, widths, chunk_size, window: as in `omega`.
        steps: of the quintic Newton-Schulz iteration.

    Returns:
        A nest over `Tokens`.

    Raises:
        ValueError: a window below 1; on apply, a gate that is missing.

    Example:
        >>> from hope_jax import mlp_memory
        >>> n, x, g = atlas(mlp_memory(4, 8), (4, 4), 2, window=3), jnp.ones((6, 4)), jnp.full(6, 0.5)
        >>> state, y = n.apply(n.init(n.params(jax.random.key(0))), Tokens(x, x, x, eta=g, alpha=g, mu=g))
        >>> y.shape
        (6, 4)

    Reference: arXiv:2505.23735.
    """

    def plan(gates: dict[str, jax.Array]):
        once = jnp.ones_like(gates["eta"])
        return once, once, gates

    def orthogonal(gradient: Any, param: Any) -> Any:
        del param
        return newton_schulz(gradient, steps)

    muon = optax.stateless_with_tree_map(orthogonal)
    names = ("eta", "log_alpha", "log_mu")
    lev = level(memory, optax.chain(heavy_ball(), muon, descent(), retention()), chunk_size, gates=names)
    return _windowed(lev, memory, widths, window, names, plan)


def _windowed(
    lev: Level, memory: Memory, widths: tuple[int, int], window: int, needed: tuple[str, ...], plan: Callable
) -> Nest:
    """A nest of one level that learns from each chunk together with the window - 1 tokens before it.

    `plan(gates [..., C]) -> (weight, later, gates)`: the weight of each token and what becomes of a write at each token
    [..., C], and the gates of the level. The error of token i counts weight_i times the sum of `later` over the tokens
    of the chunk whose windows hold i.
    """
    if window < 1:
        raise ValueError(f"window is a number of tokens, at least 1; got {window}")

    def error(params_by_level: tuple[Params, ...], past: Seen, chunk: Tokens):
        (params,) = params_by_level
        write = local_write(None, chunk)
        key, value = heads_first(chunk.key), heads_first(chunk.value)
        weight, later, gates = plan(_gates(write, key.shape[:-1], needed))
        now = Seen(_keep(write, key, -2), _keep(write, value, -2), _keep(write, weight))
        past, seen = _look_back(past, now)
        _, errors = factored_errors(memory, l2_regression, params, seen.key, seen.value)
        strength = seen.weight * _in_windows(_keep(write, later), window)
        errors = jax.tree.map(lambda e: _scaled(e, strength), errors, is_leaf=is_outer)
        y = None if write.query is None else jnp.moveaxis(memory.apply(params, write.query), -2, 0)
        return (Write(errors, gates),), past, y

    inner = nest(lev, error=error)

    def init(params_by_level: tuple[Params, ...], carry: Seen | None = None) -> NestState:
        state = inner.init(params_by_level, carry)
        leaf = jax.tree.leaves(state.levels[0].start)[0]
        shape = (*leaf.shape[:-2], window - 1)
        key, value = (jnp.zeros((*shape, n), leaf.dtype) for n in widths)
        return state._replace(carry=Seen(key, value, jnp.zeros(shape, leaf.dtype))) if carry is None else state

    return inner._replace(init=init)


def _gates(write: Write, shape: tuple[int, ...], needed: tuple[str, ...]) -> dict[str, jax.Array]:
    """Those of eta, log_alpha and log_mu that are given, [..., C]; masked tokens step by nothing and retain all."""
    made = {name: gate(write.gates, name, shape) for name in ("eta", "log_alpha", "log_mu")}
    missing = [name.removeprefix("log_") for name in needed if made[name] is None]
    if missing:
        raise ValueError(f"the rule needs the gates {', '.join(missing)}; the Tokens have {sorted(write.gates)}")
    return {name: _keep(write, g) for name, g in made.items() if g is not None}


def _keep(write: Write, x: jax.Array, axis: int = -1) -> jax.Array:
    """x with zeros for masked tokens, which lie along `axis`."""
    if write.mask is None:
        return x
    return jnp.where(jnp.expand_dims(write.mask, tuple(i for i in range(-x.ndim, 0) if i != axis)), x, 0)


def _look_back(past: Seen, now: Seen) -> tuple[Seen, Seen]:
    """The last tokens of the chunk, for the next one, and all that this one sees, [..., c - 1 + C]."""
    seen = Seen(
        *(
            jnp.concatenate([old.astype(new.dtype), new], axis=axis)
            for old, new, axis in zip(past, now, (-2, -2, -1), strict=True)
        )
    )
    kept = past.weight.shape[-1]
    first = seen.weight.shape[-1] - kept
    last = Seen(seen.key[..., first:, :], seen.value[..., first:, :], seen.weight[..., first:])
    return jax.tree.map(lambda new, old: new.astype(old.dtype), last, past), seen


def _in_windows(x: jax.Array, window: int) -> jax.Array:
    """The sum of x [..., C] over the tokens whose windows hold token i, for each i seen [..., c - 1 + C]."""
    length = window - 1 + x.shape[-1]
    padded = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (window - 1, window - 1)])
    return sum((padded[..., lag : lag + length] for lag in range(1, window)), padded[..., :length])


def _scaled(error: Outer, strength: jax.Array) -> Outer:
    delta = error.delta * strength[..., None].astype(error.delta.dtype)
    return error._replace(delta=delta)
