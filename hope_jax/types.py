"""The nouns: `Memory`, `Objective`, `Level`, `Nest`, and the data that pass between them.

Shape letters, the same in names, comments and einsum strings:

    B batch   T time   C tokens in a chunk   N chunks   H heads   K key width   V value width
    D model width   F hidden width   L layers or levels

`...` in a shape comment stands for any leading axes (heads, boxes). Everything here is for one example;
a batch is `jax.vmap`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

type Params = Any  # a pytree of arrays
type Linear = Callable[[jax.Array, Any], jax.Array]  # (x[..., C, K], leaf) -> [..., C, V]


class Outer(NamedTuple):
    """The factored error of a matrix over a chunk: sum_t key_t^T delta_t, never built token by token.

    Both factors share their leading axes and the token axis C (spec 3.4).
    """

    delta: jax.Array  # [..., C, V]  error at the matrix' output
    key: jax.Array  # [..., C, K]  input of the matrix


def contract(error: Any) -> Any:
    """The dense gradient [..., K, V] of a factored error: `key^T delta` (spec 2.3).

    A tree of errors gives the tree of gradients; its dense leaves are gradients already.

    Example:
        >>> contract(Outer(delta=jnp.ones((3, 1)), key=jnp.ones((3, 2)))).tolist()
        [[3.0], [3.0]]
    """

    def dense(e: Any) -> Any:
        return over_tokens(*e[::-1]).astype(jnp.result_type(*e)) if is_outer(e) else e

    return jax.tree.map(dense, error, is_leaf=is_outer)


def gram(error: Outer) -> jax.Array:
    """`key^T key` [..., K, K]: with the gradient, all that an exact DGD step needs (spec S3.3).

    Example:
        >>> gram(Outer(delta=jnp.ones((3, 1)), key=jnp.ones((3, 2)))).tolist()
        [[3.0, 3.0], [3.0, 3.0]]
    """
    return over_tokens(error.key, error.key).astype(error.key.dtype)


def over_tokens(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b of [..., C, K] and [..., C, V]: [..., K, V], accumulated and returned in float32 or wider."""
    wide = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    return jnp.matmul(jnp.swapaxes(a, -1, -2), b, preferred_element_type=wide)


def is_outer(node: Any) -> bool:
    """Is this node of an error tree a factored error? (`is_leaf` of `jax.tree.map`)"""
    return isinstance(node, Outer)


def path_string(path: Sequence[Any]) -> str:
    """("layers", 0, "kernel") as "layers/0/kernel"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def leaf_name(path: Sequence[Any]) -> str:
    """A leaf in a message: its path, or what to call it where the tree is one leaf."""
    return path_string(path) or "the only leaf"


class Memory(NamedTuple):
    """What is remembered with: a matrix, a residual MLP.

    `apply` does every product with a weight through `linear(x, leaf)`. With the default, `jnp.matmul`, it reads
    the weights it is given; the nest passes other functions to collect factored errors and to read weights
    that change from token to token.
    """

    init: Callable[[jax.Array], Params]  # rng key -> weights
    apply: Callable[..., jax.Array]  # (weights, x[..., C, K], linear=jnp.matmul) -> y[..., C, V]


class Objective(NamedTuple):
    """What remembering means: a loss of the memory's output y and the value v, and its error at the output."""

    loss: Callable[[jax.Array, jax.Array], jax.Array]  # (y[..., V], v[..., V]) -> [...]
    delta: Callable[[jax.Array, jax.Array], jax.Array]  # (y[..., V], v[..., V]) -> d loss / d y [..., V]


class Level(NamedTuple):
    """One memory with its rule and its clock. Made by `level`."""

    memory: Any  # a Memory, or None: the error function alone knows the weights
    tx: optax.GradientTransformation  # the rule: how it is written
    chunk_size: int  # the clock: tokens per write
    objective: Objective | None  # None: a global level, its error is dense and summed over the chunk
    read: Literal["start", "before", "after"]  # which weights answer a query
    bptt_chunks: int | None  # outer gradient truncated after this many writes
    gates: tuple[str, ...] = ()  # of a global level: summed over the chunk, then given to the rule
    restarts: bool = False  # the next faster level starts again from these weights whenever they are written


class Tokens(NamedTuple):
    """What local levels learn from, leaves [T, ...]. Gates left None take the rule's own constants.

    Leading axes of a memory (heads) stand between T and the width, and gates may have them too, [T, ...]. A gate
    from `log_sigmoid` is best given as `log_alpha` or `log_mu` (spec 5.4).
    """

    key: jax.Array  # [T, ..., K]
    value: jax.Array  # [T, ..., V]
    query: jax.Array | None = None  # [T, ..., K]  None: nothing is read
    eta: jax.Array | None = None  # [T, ...]  inner learning rate
    alpha: jax.Array | None = None  # [T, ...]  RETAINED fraction of the memory
    mu: jax.Array | None = None  # [T, ...]  momentum decay
    log_alpha: jax.Array | None = None  # [T, ...]  in the place of alpha
    log_mu: jax.Array | None = None  # [T, ...]  in the place of mu
    mask: jax.Array | None = None  # [T] bool  False: padding, nothing is written


class Write(NamedTuple):
    """What an error function may return for a local level in the place of a bare error."""

    error: Any  # pytree like the weights, with `Outer` leaves
    gates: dict[str, jax.Array] = {}  # noqa: RUF012  per token [..., C]: eta, alpha or log_alpha, mu or log_mu
    query: jax.Array | None = None  # [..., C, K]  read with running weights if the level says so
    mask: jax.Array | None = None  # [C] bool  False: the token is not written


class LevelState(NamedTuple):
    """One level between two calls."""

    start: Params  # weights at the start of the current chunk: errors are evaluated here
    running: Params | None  # local: weights that already hold the chunk's writes
    pending: Params | None  # global: sum of the chunk's errors so far
    rule: optax.OptState
    origin: tuple[Params, jax.Array] | None  # with bptt_chunks: the first start weights, writes so far int32[]
    gates: dict[str, jax.Array] | None = None  # level(gates=...): their sums over the chunk so far [...]


class NestState(NamedTuple):
    """Everything a nest carries from call to call; an ordinary pytree."""

    levels: tuple[LevelState, ...]
    carry: Any  # the error function's own
    phase: Any  # int32[]: tokens since the slowest level's last boundary


class Nest(NamedTuple):
    """Levels in time, one `lax.scan` inside the other. Made by `nest`."""

    params: Callable[[jax.Array], tuple[Params, ...]]  # rng key -> start weights of every level
    init: Callable[..., NestState]  # (params_by_level, carry=None) -> state
    apply: Callable[..., tuple[NestState, Any]]  # (state, xs, phase=None) -> (state, ys)
