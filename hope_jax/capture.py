"""Factored errors of ordinary functions: every layer's input and output error in one backward pass (spec 3.4).

`factored_vjp` asks a memory to do its products through `linear`. Here nothing is asked: the loss is traced, and a
parameter that is used once, as the matrix of one product x @ w, is a layer. Its product is evaluated with a derivative
that hands out x and the error at the output in the place of their contraction: no dense gradient of a layer is built.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Literal

from hope_jax.types import Outer, Params, is_outer, path_string

_SAME = ("convert_element_type", "copy", "sharding_constraint")  # the weight stays the weight
_JIT = ("jit", "pjit")
_REMAT = ("checkpoint", "remat2")


class _Layer(NamedTuple):
    """A weight on its way to its product, and zeros whose gradient will be the factors."""

    weight: jax.Array  # [..., K, V]
    slot: Outer  # [..., C, V], [..., C, K]


def value_and_factors(loss: Callable, has_aux: bool = False) -> Callable:
    """`jax.value_and_grad` whose gradients are factored: the input and the output error of every layer.

    A leaf [..., K, V] of the parameters is a layer if its only use is one product x @ w with inputs x [..., C, K]: by
    whatever name it is called (`@`, `jnp.einsum`, `nnx.Linear`), after a cast, under `jit`, `vmap` and
    `jax.checkpoint`. Leading axes, those of a `lax.scan` over layers or of a `vmap` over weights, are independent
    matrices; all other axes of x, batch and time, are flattened in their order into the C tokens. Everything else
    (biases, norms, embeddings, convolutions, tied heads, weights used twice, transposed or with more than one axis in
    or out, used by a loop, a conditional or a custom derivative) gets its dense gradient. The rule of the layers of a
    network is then

        token by token, in the order of the tokens       dgd(eta)
        one exact step on the mini-batch (S3.3)          minibatch(dgd(eta))
        its first order (S3.4)                           minibatch(dgd(eta, exact=False))
        any of these for a loss that is a mean           optax.chain(mean_factors(), ...)

    and that of the other leaves any transformation: `optax.partition` with `factor_labels`. Transformations that do
    not know factors come after `dgd` (`heavy_ball`) or inside `minibatch`. At rest `dgd` has y = -delta, outputs as
    large as the errors: for larger ones, those of a classifier, give it a multiple of the loss and a smaller eta.
    Wrappers that sum gradients over steps, `every` and `optax.MultiSteps`, cannot sum factors; inside `minibatch` they
    see gradients, but the `gram` of the last step alone.

    A `flax.nnx` model is a function of its `nnx.split` state, or of `hope_jax.models.functional`'s dict. Wrap the call
    in `jax.jit`, as any training step.

    Args:
        loss: `loss(params, *args, **kwargs)` -> scalar, or (scalar, aux).
        has_aux: the loss returns (scalar, aux).

    Returns:
        A function of the loss's arguments -> (value, errors), or ((value, aux), errors). The errors are a tree like
        params whose layers are `Outer(delta [..., C, V], key [..., C, K])` and whose other leaves are gradients;
        `contract(errors)` is `jax.grad`. They are errors of the loss as it is: a mean over N tokens divides them by N.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from hope_jax import dgd, factor_labels, mean_factors
        >>> def loss(params, x, y):
        ...     return jnp.mean(jnp.square(jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] - y))
        >>> k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
        >>> params = {"w1": jax.random.normal(k1, (2, 8)), "b1": jnp.zeros(8), "w2": jax.random.normal(k2, (8, 1))}
        >>> x = jax.random.normal(k3, (16, 2))
        >>> y = x[:, :1] * x[:, 1:]
        >>> labels = factor_labels(loss, params, x, y)
        >>> labels
        {'b1': 'dense', 'w1': 'factored', 'w2': 'factored'}
        >>> layers = optax.chain(mean_factors(), dgd(0.3))
        >>> tx = optax.partition({"factored": layers, "dense": optax.adam(0.01)}, labels)
        >>> @jax.jit
        ... def step(params, state):
        ...     value, errors = value_and_factors(loss)(params, x, y)
        ...     updates, state = tx.update(errors, state, params)
        ...     return optax.apply_updates(params, updates), state, value
        >>> state, values = tx.init(params), []
        >>> for _ in range(20):
        ...     params, state, value = step(params, state)
        ...     values.append(float(value))
        >>> values[-1] < 0.5 * values[0]
        True

    Reference: paper (8), (29), (56)-(58); spec 3.3, 3.4.
    """

    def evaluate(params: Params, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        leaves, treedef = jax.tree.flatten(params)
        jaxpr, out_tree, layers = _trace(loss, params, args, kwargs)
        free = [_slot(w, layers[i]) if i in layers else w for i, w in enumerate(leaves)]

        def run(free: list) -> tuple[Any, Any]:
            given = [_Layer(w, f) if is_outer(f) else f for w, f in zip(leaves, free, strict=True)]
            out = [x.weight if isinstance(x, _Layer) else x for x in _run(jaxpr, given)]
            out = out_tree.unflatten(out)
            return out if has_aux else (out, None)

        (value, aux), errors = jax.value_and_grad(run, has_aux=True)(free)
        return (value, aux) if has_aux else value, treedef.unflatten(errors)

    return evaluate


def factor_labels(loss: Callable, params: Params, *args: Any, **kwargs: Any) -> Any:
    """Labels for `optax.partition`: "factored" where `value_and_factors` gives factors, "dense" elsewhere.

    The loss is traced, not computed; parameters may be arrays or shapes.

    Args:
        loss: as for `value_and_factors`.
        params: its first argument.
        *args, **kwargs: its other arguments, any batch of the right shapes.

    Returns:
        A tree like params of "factored" and "dense". Change what you like: a layer labelled "dense" needs a
        transformation inside `minibatch`.

    Raises:
        ValueError: no parameter is a layer.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"embed": jnp.ones((5, 2)), "head": jnp.ones((2, 5))}
        >>> factor_labels(lambda p, tokens: jnp.sum(p["embed"][tokens] @ p["head"]), params, jnp.arange(3))
        {'embed': 'dense', 'head': 'factored'}
    """
    leaves, treedef = jax.tree.flatten(params)
    layers = _trace(loss, params, args, kwargs)[-1]
    _require_layers(params, layers)
    return treedef.unflatten(["factored" if i in layers else "dense" for i in range(len(leaves))])


def _require_layers(params: Params, layers: Any) -> None:
    """Refuse parameters of which none is a layer."""
    if not layers:
        paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        raise ValueError(
            f"none of the parameters ({', '.join(paths[:5])}{more}) is the matrix of exactly one product x @ w with "
            "x [..., C, K]; use jax.grad and a transformation of dense gradients"
        )


class LocalSurprise(NamedTuple):
    """How wrong a layer's output was, token by token."""

    delta: jax.Array  # [..., C, V]  error at the layer's output
    norm: jax.Array  # [..., C]  its length


def local_surprise(loss: Callable, params: Params, *args: Any, **kwargs: Any) -> Any:
    """Each layer's local surprise signal: the error at its output, delta = d loss / d y with y = x @ w, token by token.

    A gradient step on the layer stores the pair (x, -delta): what it is surprised by is what it remembers. The error
    is that of the loss as it is; of a sum over tokens, causal in time or not, each token's own.

    Args:
        loss: as for `value_and_factors`, returning a scalar.
        params: its first argument.
        *args, **kwargs: its other arguments.

    Returns:
        A tree like params with `LocalSurprise(delta [..., C, V], norm [..., C])` for each layer and None for every
        other leaf; C are the flattened axes of the layer's input, so `norm.reshape(..., B, T)` has them apart. The
        norm's gradient is finite where the error is zero.

    Raises:
        ValueError: no parameter is a layer.

    Example:
        >>> import jax.numpy as jnp
        >>> params, x = {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}, jnp.eye(2)
        >>> y = jnp.array([[3.0, 4.0], [0.0, 1.0]])
        >>> surprise = local_surprise(lambda p: 0.5 * jnp.sum((x @ p["w"] + p["b"] - y) ** 2), params)
        >>> surprise["w"].norm.tolist(), surprise["b"]
        ([5.0, 1.0], None)

    Reference: the local surprise signal of paper (8), (29); spec 0 and 3.4.
    """
    _, errors = value_and_factors(loss)(params, *args, **kwargs)
    _require_layers(params, [e for e in jax.tree.leaves(errors, is_leaf=is_outer) if is_outer(e)])

    def surprise(error: Any) -> LocalSurprise | None:
        return LocalSurprise(error.delta, optax.safe_norm(error.delta, 0.0, axis=-1)) if is_outer(error) else None

    return jax.tree.map(surprise, errors, is_leaf=is_outer)


def _trace(loss: Callable, params: Params, args: tuple, kwargs: dict) -> tuple[Any, Any, dict[int, Outer]]:
    """The loss as a jaxpr of the parameters' leaves, the structure of what it returns, and its layers by leaf."""
    leaves, treedef = jax.tree.flatten(params)
    flat = lambda leaves: loss(treedef.unflatten(leaves), *args, **kwargs)  # noqa: E731
    jaxpr, shapes = jax.make_jaxpr(flat, return_shape=True)(leaves)
    found: dict[int, Outer | None] = {}
    _find(jaxpr.jaxpr, range(len(leaves)), found)
    return jaxpr, jax.tree.structure(shapes), {i: f for i, f in found.items() if f is not None}


def _find(jaxpr: Any, leaves: Sequence[int | None], found: dict[int, Outer | None]) -> list[int | None]:
    """Enter each weight's one product into `found`, or None if it is used in any other way.

    Args:
        jaxpr: the program.
        leaves: for each of its inputs the weight that it is, or None.
        found: what is known so far.

    Returns:
        For each output the weight that it is, or None.
    """
    known = dict(zip(jaxpr.invars, leaves, strict=True))
    which = lambda v: None if isinstance(v, Literal) else known.get(v)  # noqa: E731
    for eqn in jaxpr.eqns:
        inputs = [which(v) for v in eqn.invars]
        used = [i for i in inputs if i is not None]
        if not used:
            continue
        name, out = eqn.primitive.name, []
        if name in _SAME:
            out = inputs[:1]
        elif name in _JIT or name in _REMAT:
            out = _find(_inner(eqn), inputs, found)
        elif name == "scan":
            first_x = len(inputs) - _scan_axes(eqn)[1]
            found |= {i: None for i in inputs[:first_x] if i is not None}
            passed = _find(_inner(eqn), [None] * first_x + inputs[first_x:], found)
            found |= {i: None for i in passed if i is not None}
        else:
            product = name == "dot_general" and len(used) == 1
            for at, i in enumerate(inputs):
                if i is not None:
                    found[i] = _factors(eqn, at) if product and i not in found else None
        known.update(zip(eqn.outvars, out))  # noqa: B905  no outputs, or all of them
    return [which(v) for v in jaxpr.outvars]


def _run(jaxpr: Any, args: Sequence[Any]) -> list:
    """Evaluate the program; an argument may be a `_Layer`."""
    opened = getattr(jaxpr, "jaxpr", jaxpr)
    env = dict(zip([*opened.constvars, *opened.invars], [*getattr(jaxpr, "consts", ()), *args], strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else env[v]  # noqa: E731
    for eqn in opened.eqns:
        values = [read(v) for v in eqn.invars]
        out = _step(eqn, values) if any(isinstance(x, _Layer) for x in values) else _bind(eqn, values)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in opened.outvars]


def _bind(eqn: Any, values: list) -> list:
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return out if eqn.primitive.multiple_results else [out]


def _step(eqn: Any, values: list) -> list:
    """One equation that a layer's weight goes into: `_find` has allowed no others than these."""
    name = eqn.primitive.name
    if name in _SAME:
        return [_Layer(_bind(eqn, [values[0].weight])[0], values[0].slot)]
    if name in _JIT:
        return _run(eqn.params["jaxpr"], values)
    if name in _REMAT:
        options = {"policy": eqn.params["policy"], "prevent_cse": eqn.params["prevent_cse"]}
        return jax.checkpoint(lambda *args: _run(eqn.params["jaxpr"], args), **options)(*values)
    if name == "scan":
        carried, scanned = _scan_axes(eqn)
        consts, init, xs = _split(values, len(values) - carried - scanned, len(values) - scanned)

        def body(carry: list, x: list) -> tuple[list, list]:
            out = _run(eqn.params["jaxpr"], [*consts, *carry, *x])
            return out[:carried], out[carried:]

        options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
        carry, ys = jax.lax.scan(body, init, xs, **options)
        return [*carry, *ys]
    return [_product(eqn, values)]


def _product(eqn: Any, values: list) -> jax.Array:
    """x @ w with the factors as the gradient of the slot."""
    at = 1 if isinstance(values[1], _Layer) else 0
    layer, x = values[at], values[1 - at]

    def dot(x: jax.Array, w: jax.Array) -> jax.Array:
        return _bind(eqn, [x, w] if at else [w, x])[0]

    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array, slot: Outer) -> jax.Array:
        del slot
        return dot(x, w)

    def forward(x: jax.Array, w: jax.Array, slot: Outer) -> tuple[jax.Array, tuple]:
        del slot
        return dot(x, w), (x, w)

    def backward(saved: tuple, delta: jax.Array) -> tuple:
        x, w = saved
        (x_error,) = jax.linear_transpose(lambda x: dot(x, w), x)(delta)
        return x_error, None, _flat(eqn, at, x, delta)

    product.defvjp(forward, backward)
    return product(x, *layer)


def _factors(eqn: Any, at: int) -> Outer | None:
    """Shapes of the factors if operand `at` of a product is the matrix [..., K, V] of x @ w, else None."""
    w = eqn.invars[at].aval
    dims, batch = (side[at] for side in eqn.params["dimension_numbers"])
    leading = len(batch)
    if w.ndim != leading + 2 or tuple(dims) != (leading,) or tuple(batch) != tuple(range(leading)):
        return None
    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_sharding(a))
        for a in (eqn.invars[1 - at].aval, eqn.outvars[0].aval)
    ]
    return jax.eval_shape(lambda x, y: _flat(eqn, at, x, y), *shapes)


def _flat(eqn: Any, at: int, x: jax.Array, y: jax.Array) -> Outer:
    """Input and output (or its error) of a product with their axes in order: [..., C, K] and [..., C, V]."""
    summed, batch = (side[1 - at] for side in eqn.params["dimension_numbers"])
    tokens = [i for i in range(x.ndim) if i not in summed and i not in batch]
    count = math.prod(x.shape[i] for i in tokens)
    x = jnp.transpose(x, (*batch, *tokens, *summed))
    y = y if at else jnp.moveaxis(y, len(batch), -1)
    flat = lambda a: a.reshape(*a.shape[: len(batch)], count, a.shape[-1])  # noqa: E731
    return Outer(flat(y), flat(x))


def _slot(w: Any, factors: Outer) -> Outer:
    """Zeros like the factors, below the leading axes of the weight that a scan has taken off; sharded like them."""

    def zeros(like: Any) -> jax.Array:
        shape = (*w.shape[:-2], *like.shape[-2:])
        sharding = _sharding(like)
        spec = None if sharding is None else jax.P(*[None] * (len(shape) - len(like.shape)), *sharding.spec)
        return jnp.zeros(shape, like.dtype, out_sharding=spec)

    return jax.tree.map(zeros, factors)


def _sharding(a: Any) -> Any:
    """The sharding that is part of an array's type, on a mesh with Explicit axes; else None."""
    return None if a.sharding is None or a.sharding.mesh.empty else a.sharding


def _scan_axes(eqn: Any) -> tuple[int, int]:
    """How many values a scan carries and how many it scans over: those have an axis more outside than inside."""
    more = lambda outside, inside: outside.aval.ndim > inside.aval.ndim  # noqa: E731
    inner = _inner(eqn)
    scanned = sum(map(more, eqn.invars, inner.invars))
    carried = len(eqn.outvars) - sum(map(more, eqn.outvars, inner.outvars))
    return carried, scanned


def _inner(eqn: Any) -> Any:
    jaxpr = eqn.params["jaxpr"]
    return getattr(jaxpr, "jaxpr", jaxpr)


def _split(values: list, *at: int) -> list[list]:
    return [values[a:b] for a, b in zip((0, *at), (*at, None), strict=True)]
