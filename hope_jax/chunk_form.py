"""A rule's chunk form: the recurrence that the rule makes of a chunk of factored errors.

A rule whose per-token step is

    Z_t = mu_t Z_{t-1} + k_t u_t^T        S_t = (alpha_t I - erase_t k_t k_t^T) S_{t-1} + Z_t      (spec S5.1, rows)

needs no token loop: `hope_kernels.delta_rule` runs it in parallel over the chunk. `ChunkForm` is what such a rule
says of itself, `Recurrence` what it makes of one chunk, `run` the call of the kernel, `run_tree` that of all weights.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hope_jax.placement import placed_delta_rule
from hope_jax.types import Linear, Params
from hope_kernels import DeltaRuleOutput

type Read = Literal["start", "before", "after"]
type Gates = Mapping[str, Any]


class Recurrence(NamedTuple):
    """The kernel's arguments for one matrix over one chunk; None means the term is absent."""

    key: jax.Array  # [..., C, K]
    write: jax.Array  # [..., C, V]  u_t, step size included
    erase: jax.Array | None  # [..., C]
    log_alpha: jax.Array | None  # [..., C]
    log_mu: jax.Array | None  # [..., C]


class ChunkForm(NamedTuple):
    """What a chunk-parallel rule says of itself."""

    recurrences: Callable[[Any, Gates], Any]  # (errors with Outer leaves, gates) -> tree of Recurrence
    momentum: Callable[[Any], Any]  # rule state -> tree of Z, or None
    with_momentum: Callable[[Any, Any], Any]  # (rule state, tree of Z) -> rule state


class FactoredTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation that accepts `Outer` leaves as updates; None for `form`: a level steps it by tokens."""

    form: ChunkForm | None


def factored(init: Callable, update: Callable, form: ChunkForm | None = None) -> FactoredTransformation:
    """An optax transformation (init, update) together with its chunk form, if it has one."""
    tx = FactoredTransformation(init, update)
    tx.form = form
    return tx


def gate(gates: Gates, name: str, shape: tuple[int, ...]) -> jax.Array | None:
    """The gate `name` broadcast to [..., C], or None. `log_x` is taken as given or made from `x`.

    The logarithm of a gate is floored at -30 inside the logarithm (spec 5.4), so that alpha = 0 and mu = 0 have
    finite gradients; the gradient to a gate below the floor is zero.
    """
    value = gates.get(name)
    plain = name.removeprefix("log_")
    if value is None and plain != name and gates.get(plain) is not None:
        value = jnp.log(jnp.maximum(gates[plain], jnp.exp(-30.0)))
    return None if value is None else jnp.broadcast_to(value, shape)


def plain_gate(gates: Gates, name: str, constant: Any = None) -> Any:
    """The gate `name` itself: from `log_x` if given, else from `x`, else the rule's constant."""
    if gates.get(f"log_{name}") is not None:
        return jnp.exp(gates[f"log_{name}"])
    value = gates.get(name)
    return constant if value is None else value


def eta_of(name: str, gates: Gates, learning_rate: Any) -> Any:
    """The step size of the rule `name`: the gate `eta`, else the learning rate; a ValueError if there is neither."""
    eta = learning_rate if gates.get("eta") is None else gates["eta"]
    if eta is None:
        raise ValueError(f"{name} needs a step size: give {name}(learning_rate=...) or the extra argument eta=")
    return eta


def run(
    rec: Recurrence,
    state: jax.Array,
    momentum: jax.Array | None,
    query: jax.Array | None = None,
    read: Read = "after",
    mask: jax.Array | None = None,
) -> DeltaRuleOutput:
    """Run one matrix' recurrence over a chunk: (reads [..., C, V] or None, state, momentum).

    The leading axes, whatever they are, are the heads of one kernel call, the last of them outermost: it is the one
    that a mesh divides (`placement.by_head`), and a divided axis can only be merged from the front. Tokens whose
    `mask` [..., C] is False leave state and momentum as they are.
    """
    leading = state.shape[:-2]

    def heads(x: jax.Array | None, trailing: int) -> Any:
        """[..., C, *trailing axes] -> [1, C, H, *trailing axes], the kernel's."""
        if x is None:
            return None
        tail = x.shape[x.ndim - trailing - 1 :]
        x = outermost(jnp.broadcast_to(x, (*leading, *tail))).reshape(1, -1, *tail)
        return jnp.swapaxes(x, 1, 2)

    def outermost(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, len(leading) - 1, 0) if leading else x

    def apart(x: jax.Array) -> jax.Array:
        """The heads as leading axes again."""
        split = x.reshape(*leading[-1:], *leading[:-1], *x.shape[1:])
        return jnp.moveaxis(split, 0, len(leading) - 1) if leading else split

    def states(x: jax.Array | None) -> Any:
        return None if x is None else outermost(x).reshape(1, -1, *x.shape[-2:])

    out = placed_delta_rule(
        q=heads(query, 1),
        k=heads(rec.key, 1),
        u=heads(rec.write, 1),
        eta=heads(rec.erase, 0),
        log_alpha=heads(rec.log_alpha, 0),
        log_mu=heads(rec.log_mu, 0),
        mask=heads(mask, 0),
        initial_state=states(state),
        initial_momentum=states(momentum),
        read=read,
    )
    y = None if out.y is None else apart(jnp.swapaxes(out.y, 1, 2)[0])
    z = None if out.momentum is None else apart(out.momentum[0])
    return DeltaRuleOutput(y, apart(out.state[0]), z)


def run_tree(
    recurrences: Any,
    params: Params,
    momentum: Params | None = None,
    *,
    mask: jax.Array | None = None,
    read: Read = "after",
    reader: Callable[[Any, Linear], jax.Array] | None = None,
) -> tuple[Params, Params | None, jax.Array | None]:
    """Run the recurrences of all weights over a chunk, and read the weights while they change.

    Args:
        recurrences: a tree of `Recurrence` like the weights.
        params: the weights at the start [..., K, V].
        momentum: Z like the weights, or None.
        mask: as in `run`.
        read: which running weights answer.
        reader: `reader(refs, linear) -> y`, called once; `linear(x, ref)` is the product of x [..., C, K] with the
            running value of the weight that `ref` stands for (spec 7.3). None: nothing is read.

    Returns:
        The weights and the momentum (or None) after the chunk, in the kernel's dtype, and y.
    """
    recs, treedef = jax.tree.flatten(recurrences, is_leaf=lambda node: isinstance(node, Recurrence))
    states = treedef.flatten_up_to(params)
    momenta: list[Any] = [None] * len(recs) if momentum is None else treedef.flatten_up_to(momentum)
    outs: dict[int, DeltaRuleOutput] = {}

    def linear(x: jax.Array | None, i: int) -> Any:
        outs[i] = run(recs[i], states[i], momenta[i], x, read, mask)
        return outs[i].y

    y = None if reader is None else reader(treedef.unflatten(range(len(recs))), linear)
    for i in range(len(recs)):
        if i not in outs:
            linear(None, i)
    after = treedef.unflatten([outs[i].state for i in range(len(recs))])
    z = None if momentum is None else treedef.unflatten([outs[i].momentum for i in range(len(recs))])
    return after, z, y
