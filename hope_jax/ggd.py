"""Generalised gradient descent: choose what remembering means and what holds the memory back, and get the rule.

A gradient step minimises a dot product held near the weights it starts from, a step of delta gradient descent a
regression. `ggd` takes any `Objective` and any retention. `generalised_momentum` lets such a rule, or any other, write
a momentum in the place of the weights.
"""

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hope_jax.chunk_form import FactoredTransformation, eta_of, factored, plain_gate
from hope_jax.numerics import wide
from hope_jax.objectives import dot_product, l2_regression
from hope_jax.transforms import dgd
from hope_jax.types import Objective, Outer, Params, is_outer, leaf_name

type Distance = Callable[[jax.Array, jax.Array], jax.Array]  # (weights, held weights) [..., K, V] -> [...] or a number
type Value = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (weights, key, delta) -> value [..., V]


class GGDState(NamedTuple):
    past: Params | None  # [c - 1, ..., K, V] for each leaf: weights, latest first; None for c = 1
    hold: Params | None  # [c - 1, ...] for each leaf: 1 / eta of each, 0 where there is none yet; float32 or wider


class _Rule(NamedTuple):
    """What `ggd` was asked for, and what it makes of one token of one matrix."""

    objective: Objective
    window: int
    distance: Distance | None
    value: Value | None
    steps: int

    def closed(self) -> bool:
        return self.distance is None and (self.objective is dot_product or self.objective is l2_regression)

    def minimum(self, w: jax.Array, middle: jax.Array, token: Outer, eta: jax.Array) -> jax.Array:
        """The minimiser of the sum: weights w and W' [..., K, V], key [..., K], delta [..., V], eta [...]."""
        key, target = token.key, -token.delta if self.value is None else self.value(w, token.key, token.delta)
        damping = 1 + eta * (0.0 if self.objective is dot_product else jnp.sum(key * key, axis=-1))
        for_loss, for_pull = ((x / damping)[..., None, None] for x in (eta, jnp.ones_like(eta)))

        def step(_: Any, new: jax.Array) -> jax.Array:
            error = self.objective.delta(jnp.einsum("...k,...kv->...v", key, new), target)
            push = key[..., :, None] * error[..., None, :]
            return (new - for_loss * push - for_pull * self.pull(new, w, middle)).astype(new.dtype)

        steps = 1 if self.closed() else self.steps
        return step(0, middle) if steps == 1 else jax.lax.fori_loop(0, steps, step, middle)

    def pull(self, new: jax.Array, w: jax.Array, middle: jax.Array) -> jax.Array:
        """Gradient of the retention times eta."""
        distance = self.distance
        return new - middle if distance is None else jax.grad(lambda a: jnp.sum(distance(a, w)))(new)

    def write(self, error: Outer, p: jax.Array, window: tuple[Any, ...], eta: Any, alpha: Any):
        """Every token of a chunk in turn: new weights in float32 or wider, and the window."""
        p, leading = wide(p), p.shape[:-2]

        def tokens(gate: Any) -> jax.Array:
            full = jnp.broadcast_to(jnp.asarray(gate, p.dtype), (*leading, error.key.shape[-2]))
            return jnp.moveaxis(full, -1, 0)

        def step(carry, token):
            (w, window), (error, eta, alpha) = carry, token
            middle = w
            if self.window > 1:
                middle, eta, window = _collapsed(w, eta, *window)
            return (self.minimum(w, middle, error, eta) + (alpha - 1)[..., None, None] * w, window), None

        factors = Outer(*(jnp.moveaxis(x.astype(p.dtype), -2, 0) for x in error))
        (new, window), _ = jax.lax.scan(step, (p, window), (factors, tokens(eta), tokens(alpha)))
        return new, window


def _collapsed(w: jax.Array, eta: jax.Array, past: jax.Array, hold: jax.Array):
    """The one pull that c pulls amount to: W', its eta, and the window of the next token."""
    pasts = jnp.concatenate([w[None], past.astype(w.dtype)])
    holds = jnp.concatenate([1 / jnp.maximum(eta, 1e-15)[None], hold])  # a step of zero holds everything
    eta = 1 / jnp.sum(holds, axis=0)
    middle = jnp.einsum("c...,c...kv->...kv", eta[None] * holds, pasts)
    return middle, eta, (pasts[:-1].astype(past.dtype), holds[:-1])


def ggd(
    objective: Objective = l2_regression,
    retention: int | Distance = 1,
    value: Value | None = None,
    *,
    learning_rate: float | None = None,
    steps: int = 1,
) -> FactoredTransformation:
    """Generalised gradient descent: a minimisation of the objective, held back by a retention.

        W_{t+1} = argmin_W  l(k_t W, v_t) + sum_{i = t-c+1}^t 1 / (2 eta_i) ||W - W_i||^2

    With W' = eta sum_i W_i / eta_i and 1 / eta = sum_i 1 / eta_i the window of c weights is one of them, W'.

        dot_product        gradient descent from W', exactly; c = 1 is dgd(exact=False, decay=False)
        l2_regression      delta gradient descent from W', exactly; c = 1 is dgd()
        any other          `steps` gradient steps on the sum, from W', of size eta / (1 + eta ||k||^2)

    which for objectives of curvature up to one (Huber) is a contraction to the minimiser for any eta; one of them is a
    gradient step on the objective alone.

    Args:
        objective: l.
        retention: c, how many of the last weights hold the memory, at least 1; or a function R(W, W_t), differentiable
            and 0 at W_t, in the place of 1/2 ||W - W_t||^2, taken by gradient steps.
        value: `value(W, key [..., K], delta [..., V]) -> v`, made by the memory itself; None: -delta.
        learning_rate: eta where no extra argument `eta` is given, at least 0.
        steps: gradient steps where there is no closed form.

    Returns:
        A transformation of a tree of `Outer` ([..., C, K] and [..., C, V], any C), written token by token from the
        errors at the chunk's start, with extra arguments `eta` and `alpha` (or `log_alpha`) of shape [..., C] or
        scalars; alpha W_t is what is retained, as in `dgd`.

    Raises:
        ValueError: a window or steps below 1, a negative learning rate, or no step size anywhere.
        TypeError: a dense update.

    Example:
        >>> from hope_jax import huber
        >>> tx, params = ggd(huber(1.0), learning_rate=1.0), {"w": jnp.zeros((1, 1))}
        >>> far = {"w": Outer(delta=-jnp.full((1, 1), 9.0), key=jnp.ones((1, 1)))}
        >>> tx.update(far, tx.init(params), params)[0]["w"].tolist()
        [[0.5]]

    Reference: paper (59)-(60), (98)-(99); spec 3.6.
    """
    window, distance = (1, retention) if callable(retention) else (retention, None)
    if not isinstance(window, Integral) or window < 1:
        raise ValueError(f"ggd's retention is a number of weights, at least 1, or a function; got {retention}")
    if callable(learning_rate):
        raise TypeError("ggd's learning_rate is a number; for a schedule give eta= or use optax.inject_hyperparams")
    if steps < 1:
        raise ValueError(f"ggd takes at least 1 step; got steps={steps}")
    if isinstance(learning_rate, Real) and not learning_rate >= 0:
        raise ValueError(f"ggd's learning_rate is a step size, at least 0; got {learning_rate}")
    rule = _Rule(objective, window, distance, value, steps)
    if rule.closed() and window == 1 and value is None:
        delta_rule = objective is l2_regression
        return dgd(learning_rate, exact=delta_rule, decay=delta_rule)

    def init(params: Params) -> Any:
        if window == 1:
            return GGDState(None, None)
        hold = lambda p: jnp.zeros((window - 1, *p.shape[:-2]), jnp.promote_types(p.dtype, jnp.float32))  # noqa: E731
        past = jax.tree.map(lambda p: jnp.zeros((window - 1, *p.shape), p.dtype), params)
        return GGDState(past, jax.tree.map(hold, params))

    def update(updates: Any, state: Any, params: Params = None, **gates: Any):
        if params is None:
            raise ValueError("ggd needs the current weights: call update(updates, state, params)")
        errors, treedef = jax.tree.flatten(updates, is_leaf=is_outer)
        if not all(map(is_outer, errors)):
            raise TypeError("ggd writes token by token: its updates must be Outer(delta, key) factors, not dense")
        eta, alpha = eta_of("ggd", gates, learning_rate), plain_gate(gates, "alpha", 1.0)
        old = treedef.flatten_up_to(params)
        windows: Any = [()] * len(old)
        if window > 1:
            windows = zip(*map(treedef.flatten_up_to, state), strict=True)
        done = [rule.write(*x, eta, alpha) for x in zip(errors, old, windows, strict=True)]
        new = treedef.unflatten([(w - p).astype(p.dtype) for (w, _), p in zip(done, old, strict=True)])
        if window == 1:
            return new, state
        return new, GGDState(*(treedef.unflatten([held[i] for _, held in done]) for i in range(2)))

    return factored(init, update)


class GeneralisedMomentumState(NamedTuple):
    momentum: Params  # like the weights
    rule: optax.OptState


def generalised_momentum(
    rule: optax.GradientTransformation, keys: Literal["input", "gradient"] = "input"
) -> optax.GradientTransformationExtraArgs:
    """Momentum as a memory of its own: the rule writes m, and m is the update.

    Args:
        rule: how m is written: `ggd(...)`, `dgd(...)`, or a chain of one with `retention(alpha)` for a momentum that
            decays. It sees m as its weights and all extra arguments.
        keys: what m is asked. "input": updates are `Outer` factors, key = the layer's input and value = -delta;
            "gradient": updates are dense [..., K, V], keys are the V columns of the gradient and values -I, so that
            an L2 rule makes a delta momentum written column by column.

    Raises:
        ValueError: unknown keys.
        TypeError: dense updates for "input", factored ones for "gradient", or a leaf of fewer than two axes.

    Example:
        >>> from hope_jax import retention
        >>> rule = optax.chain(ggd(dot_product, learning_rate=1.0), retention(0.5))
        >>> tx, w = generalised_momentum(rule), jnp.zeros((1, 1))
        >>> error = Outer(delta=jnp.ones((1, 1)), key=jnp.ones((1, 1)))
        >>> u, state = tx.update(error, tx.init(w))
        >>> tx.update(error, state)[0].tolist()
        [[-1.5]]

    Reference: paper (36)-(37), (48); spec 3.6.
    """
    if keys not in ("input", "gradient"):
        raise ValueError(f'generalised_momentum\'s keys are "input" or "gradient"; got {keys!r}')
    tx = optax.with_extra_args_support(rule)

    def pairs(path: Any, g: Any) -> Outer:
        if is_outer(g) == (keys == "gradient") or (not is_outer(g) and g.ndim < 2):
            got = "an Outer" if is_outer(g) else f"an array of shape {g.shape}"
            want = "Outer(delta, key) factors" if keys == "input" else "dense matrices [..., K, V]"
            raise TypeError(f"generalised_momentum(keys={keys!r}) takes {want}; {leaf_name(path)} is {got}")
        if is_outer(g):
            return g
        v = g.shape[-1]
        return Outer(jnp.broadcast_to(jnp.eye(v, dtype=g.dtype), (*g.shape[:-2], v, v)), g.mT)

    def init(params: Params) -> Any:
        m = jax.tree.map(jnp.zeros_like, params)
        return GeneralisedMomentumState(m, tx.init(m))

    def update(updates: Any, state: Any, params: Params = None, **gates: Any):
        del params
        errors = jax.tree_util.tree_map_with_path(pairs, updates, is_leaf=is_outer)
        steps, inner = tx.update(errors, state.rule, state.momentum, **gates)
        m = jax.tree.map(lambda m, s: (m + s).astype(m.dtype), state.momentum, steps)
        return m, GeneralisedMomentumState(m, inner)

    return factored(init, update) if keys == "input" else optax.GradientTransformationExtraArgs(init, update)
