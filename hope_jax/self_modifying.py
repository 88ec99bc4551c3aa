"""Self-modifying Titans: memories that make their own keys, values, learning rates and retention.

Five residual MLP memories per head ("boxes"): k, v, eta, alpha and mem, six with an adaptive q. Each token is turned
by the first four, at the weights their chunk started with, into a key, a value and two gates; `mem` answers the
query; then every box regresses, with DGD, the value it makes itself of v (paper (83)-(88), spec section 7).

In the words of the nest: two levels, the projections at `chunk_proj` and `mem` at `chunk_mem`, whose error function
makes its own tokens. Everything here is for one example.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from hope_jax.levels import level
from hope_jax.memories import linear_memory, mlp_memory
from hope_jax.nesting import nest
from hope_jax.objectives import clipped_dot_product, dot_product, huber_norm, l2_regression
from hope_jax.placement import by_head
from hope_jax.sequence_layer import SequenceLayer, identity_conv, l2_normalize, short_conv
from hope_jax.surprise import gate_by_surprise, gated, init_surprise
from hope_jax.transforms import dgd
from hope_jax.types import Linear, Memory, Nest, NestState, Objective, Params, Write
from hope_jax.writing import factored_errors


@dataclass(frozen=True)
class SelfModifyingConfig:
    """Shapes and switches of one self-modifying layer; the defaults are spec 8.3 with H heads of width dim / heads."""

    dim: int  # D
    heads: int = 1  # H
    memory: str = "mlp"  # "mlp" (89) or "linear" (93)
    memory_hidden: int = 32  # F
    chunk_proj: int = 16  # tokens per write of k, v, eta, alpha, q
    chunk_mem: int = 16  # tokens per write of mem
    objective: Literal["l2", "dot_product"] = "l2"  # of every box; (93) or (92)
    stage: int = 3  # 1: only mem is written; 2: all boxes regress v; 3: each its own value
    read: Literal["start", "before"] = "start"  # "start" of the chunk (94), or running "before" the token's write
    adaptive_q: bool = False  # q from a memory instead of a static projection
    static: tuple[str, ...] = ()  # of "k", "v": made by static projections instead of memories
    momentum: float | str | None = 0.9  # mu, "gate", or None
    retention: bool = True  # False: alpha = 1
    dgd_decay: bool = True  # False: plain gradient descent with the same steps
    exact: bool = True  # eta' = eta / (1 + eta ||k||^2)
    mlp_rule: str = "input"  # "input" (S7.6) or "layerwise" (S7.7)
    conv_window: int = 4  # 0: no convolution
    error_clip: float | None = None  # c: longer errors of a box are cut to this length, as by huber_norm(c)
    value_norm: bool = False  # True: v is l2-normalised like k, which bounds what a box can ask of itself
    eta_init: float = 0.02
    alpha_init: float = 0.99
    surprise: float | None = None  # kappa: tokens whose error is less than so many averages are not written (7.8)
    surprise_temperature: float = 0.0  # above 0 the gate is a sigmoid, which has a gradient
    gate_retention: bool = False  # a shut gate forgets nothing either
    bptt_chunks: int | None = None  # cut the outer gradient after so many writes of every box
    remat: bool = True  # recompute each chunk in the backward pass: less memory, and faster on a CPU

    def __post_init__(self):
        for name in ("dim", "heads", "memory_hidden", "chunk_proj", "chunk_mem"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads; got dim={self.dim}, heads={self.heads}")
        if self.conv_window < 0:
            raise ValueError(f"conv_window is a number of tokens, 0 for none; got {self.conv_window}")
        if self.eta_init <= 0:
            raise ValueError(f"eta_init must be positive; got {self.eta_init}")
        if (self.surprise is not None and self.surprise < 0) or self.surprise_temperature < 0:
            raise ValueError(
                f"surprise and surprise_temperature must not be negative; got {self.surprise}, "
                f"{self.surprise_temperature}"
            )
        if not 0 < self.alpha_init < 1:
            raise ValueError(f"alpha_init is the RETAINED fraction and must lie in (0, 1); got {self.alpha_init}")
        for name, allowed in (
            ("memory", ("mlp", "linear")),
            ("objective", ("l2", "dot_product")),
            ("stage", (1, 2, 3)),
            ("read", ("start", "before")),
            ("mlp_rule", ("input", "layerwise")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {getattr(self, name)!r}")
        if isinstance(self.static, str) or not set(self.static) <= {"k", "v"}:
            raise ValueError(f'static is a tuple of "k" and "v"; got {self.static!r}')

    @property
    def head_width(self) -> int:
        return self.dim // self.heads

    @property
    def projections(self) -> tuple[str, ...]:
        """The boxes that make elements of a token, in order."""
        if self.stage == 1:
            return ()
        names = ("k", "v", "eta", "alpha") + (("q",) if self.adaptive_q else ())
        return tuple(n for n in names if n not in self.static)

    @property
    def statics(self) -> tuple[str, ...]:
        """The elements made by static D x D projections."""
        return tuple(n for n in ("q", "k", "v") if n not in self.projections)

    @property
    def groups(self) -> tuple[tuple[int, tuple[str, ...]], ...]:
        """(chunk size, boxes) per level, fastest first. Boxes on one clock share a level."""
        if self.stage == 1:
            return ((self.chunk_mem, ("mem",)),)
        if self.chunk_proj == self.chunk_mem and self.read == "start":
            return ((self.chunk_mem, (*self.projections, "mem")),)
        both = [(self.chunk_proj, self.projections), (self.chunk_mem, ("mem",))]
        return tuple(sorted(both, key=lambda group: group[0]))


def self_modifying(config: SelfModifyingConfig) -> SequenceLayer:
    """The self-modifying Titans layer, without output gate and output map.

    Args:
        config: shapes and switches.

    Returns:
        A `SequenceLayer`: `init(key) -> params`, `init_state(params) -> state`,
        `apply(params, state, r_TD, phase=None, mask_T=None) -> (state, y_TD)`, where r_TD is the RMS-normalised
        block input, y_TD the reads with heads concatenated, and `phase` as in `nest`. The state is the nest's:
        per level P boxes side by side, w1 [P, H, F, K] and w2 [H, K, P F], carrying the convolutions' tails.

    Raises:
        ValueError: from the config, or chunk sizes of which neither divides the other.

    Example:
        >>> import jax
        >>> layer = self_modifying(SelfModifyingConfig(dim=8, heads=2, memory_hidden=4, chunk_proj=2, chunk_mem=4))
        >>> params = layer.init(jax.random.key(0))
        >>> state, y = layer.apply(params, layer.init_state(params), jax.numpy.ones((6, 8)))
        >>> y.shape, int(state.phase)
        ((6, 8), 2)

    Reference: paper (83)-(88); spec section 7.
    """
    _nest(config, {})  # chunk sizes that do not divide are refused here

    def init_state(params: Params) -> NestState:
        tail = jnp.zeros((max(config.conv_window - 1, 0), config.heads, config.head_width))
        starts = tuple(_join([params["boxes"][name] for name in names]) for _, names in config.groups)
        carry: dict[str, Any] = {"q": tail, "k": tail, "v": tail}
        if config.surprise is not None:
            carry["surprise"] = init_surprise(config.heads)
        return _nest(config, params).init(starts, carry=carry)

    def apply(params: Params, state: NestState, r_TD: jax.Array, phase: int | None = None, mask_T=None):
        tokens = _static_elements(config, params, r_TD)
        tokens["mask"] = mask_T
        state, y_THK = _nest(config, params).apply(state, tokens, phase=phase)
        return state, y_THK.reshape(r_TD.shape)

    return SequenceLayer(lambda key: _init(config, key), init_state, apply)


OBJECTIVES = {"l2": (l2_regression, huber_norm), "dot_product": (dot_product, clipped_dot_product)}


def _objective(config: SelfModifyingConfig) -> Objective:
    plain, clipped = OBJECTIVES[config.objective]
    return plain if config.error_clip is None else clipped(config.error_clip)


def _box(config: SelfModifyingConfig) -> Memory:
    """One box of one head."""
    if config.memory == "linear":
        return linear_memory(config.head_width, config.head_width, init_scale=0.5)
    return mlp_memory(config.head_width, config.memory_hidden)


def _side_by_side(config: SelfModifyingConfig) -> Memory:
    """P boxes as one memory, x[H, C, K] -> y[P, H, C, K].

    All boxes of a head share their keys and gates, so their first matrices stand side by side in one, [H, K, P F],
    and are written by a single recurrence with a single triangular solve.
    """

    def split(z: jax.Array, width: int) -> jax.Array:  # [H, C, P F] -> [P, H, C, F]
        return jnp.moveaxis(z.reshape(*z.shape[:-1], -1, width), -2, 0)

    def apply(params: Params, x: jax.Array, linear: Linear = jnp.matmul) -> jax.Array:
        if config.memory == "linear":
            return split(linear(x, params["w"]), config.head_width)
        h = split(jax.nn.gelu(linear(x, params["w2"])), config.memory_hidden)
        return x[None] + linear(h, params["w1"])

    return Memory(_box(config).init, apply)


def _join(boxes: list[Params]) -> Params:
    """Boxes [H, ...] side by side: w1 [P, H, F, K] stacked, w2 [H, K, P F] (or w) joined along their outputs."""
    return {
        name: jnp.stack([b[name] for b in boxes]) if name == "w1" else jnp.concatenate([b[name] for b in boxes], -1)
        for name in boxes[0]
    }


def _take(config: SelfModifyingConfig, joined: Params, start: int, stop: int) -> Params:
    """Boxes start..stop of those that stand side by side."""
    width = config.head_width if config.memory == "linear" else config.memory_hidden
    return {name: w[start:stop] if name == "w1" else w[..., start * width : stop * width] for name, w in joined.items()}


def _nest(config: SelfModifyingConfig, params: Params) -> Nest:
    """One level per clock; all boxes of a level are one memory."""
    rule = dgd(
        exact=config.exact,
        decay=config.dgd_decay,
        momentum=config.momentum,
        input_leaf="w2" if config.memory == "mlp" and config.mlp_rule == "input" else None,
    )
    memory = _side_by_side(config)
    levels = [
        level(
            memory,
            rule,
            size,
            objective=_objective(config),
            read=config.read if "mem" in names else "start",
            bptt_chunks=config.bptt_chunks,
        )
        for size, names in config.groups
    ]
    return nest(*levels, error=_error(config, memory, params), output=_output, remat=config.remat)


def _output(y_THK: Any, reads: tuple) -> jax.Array:
    """The reads of mem: running ones where the level gives them, else those at the chunk's start."""
    running = [r for r in reads if r is not None]
    return jnp.moveaxis(running[0][0], -2, 0) if running else y_THK


def _init(config: SelfModifyingConfig, key: jax.Array) -> Params:
    dim, heads, width = config.dim, config.heads, config.head_width
    names = (*config.projections, "mem")
    keys = iter(jax.random.split(key, 16))

    def box() -> Params:
        return jax.vmap(_box(config).init)(jax.random.split(next(keys), heads))

    def read_out(bias: float) -> Params:  # a number per head and token: c^T M(x) + b (S7.3)
        return {"w": 0.02 * jax.random.normal(next(keys), (heads, width)), "b": jnp.full((heads,), bias)}

    square = lambda: jax.random.normal(next(keys), (dim, dim)) / dim**0.5  # noqa: E731
    params: dict[str, Any] = {"boxes": {name: box() for name in names}}
    if heads > 1:
        params["in_proj"] = square()
    params["static"] = {name: square() for name in config.statics}
    params["gates"] = {"eta": read_out(math.log(math.expm1(config.eta_init)))}
    if config.retention or config.stage > 1:
        params["gates"]["alpha"] = read_out(math.log(config.alpha_init / (1 - config.alpha_init)))
    if config.momentum == "gate":
        params["gates"]["mu"] = read_out(0.0)
    if config.conv_window:
        params["conv"] = {n: identity_conv(config.conv_window, (heads, width)) for n in ("q", "k", "v")}
    return params


def _static_elements(config: SelfModifyingConfig, params: Params, r_TD: jax.Array) -> dict[str, Any]:
    """What needs no memory, for the whole call at once: x (spec 7.2) and the static projections, [T, H, K]."""
    heads = (r_TD.shape[0], config.heads, config.head_width)
    mixed = r_TD @ params["in_proj"] if "in_proj" in params else r_TD
    tokens = {"x": mixed.reshape(heads) * config.head_width**-0.5}
    tokens |= {name: (r_TD @ w).reshape(heads) for name, w in params["static"].items()}
    return {name: by_head(x, 1) for name, x in tokens.items()}


def _error(config: SelfModifyingConfig, memory: Memory, params: Params):
    """Make the elements of a piece, read mem, and give every box its error (spec 7.2-7.4)."""

    def error(starts: tuple[Params, ...], carry: dict, piece: dict):
        x_HCK = jnp.moveaxis(piece["x"], 0, 1)
        made, mem = {}, {}
        for (_, names), start in zip(config.groups, starts, strict=True):
            n = len([name for name in names if name != "mem"])
            if n:
                made |= dict(zip(names, memory.apply(_take(config, start, 0, n), x_HCK), strict=False))
            if "mem" in names:
                mem = _take(config, start, n, n + 1)
        k, v, q, carry = _keys_values_queries(config, params, made, piece, carry)
        gates = _gates(config, params, made, x_HCK)
        y_HCK = memory.apply(mem, q)[0] if config.read == "start" else None
        found = []
        for (_, names), start in zip(config.groups, starts, strict=True):
            value = memory.apply(start, v) if config.stage == 3 else jnp.broadcast_to(v, (len(names), *v.shape))
            read, errors = factored_errors(memory, _objective(config), start, k, value)
            found.append((errors, q if "mem" in names else None))
            if config.surprise is not None and "mem" in names:
                wrong_HCK = OBJECTIVES[config.objective][0].delta(read[-1], value[-1])  # before any clipping
                carry, gates = _surprised(config, carry, gates, wrong_HCK, piece["mask"])
        writes = tuple(Write(errors, gates, queries, piece["mask"]) for errors, queries in found)
        return writes, carry, None if y_HCK is None else jnp.moveaxis(y_HCK, 1, 0)

    return error


def _surprised(config: SelfModifyingConfig, carry: dict, gates: dict, error_HCK: jax.Array, mask_C: Any):
    """The gates of tokens that make this error of mem (spec 7.8)."""
    kappa = config.surprise
    assert kappa is not None
    state, gate_HC = gate_by_surprise(
        carry["surprise"], error_HCK, mask_C, config.chunk_mem, kappa, config.surprise_temperature
    )
    return carry | {"surprise": state}, gated(gates, gate_HC, retention=config.gate_retention)


def _keys_values_queries(config: SelfModifyingConfig, params: Params, made: dict, piece: dict, carry: dict):
    """q, k, v [H, C, K] after convolution and normalisation (S7.2), and the carry with the new tails."""
    out, new = {}, dict(carry)
    for name in ("q", "k", "v"):
        raw = jnp.moveaxis(made[name], 1, 0) if name in made else piece[name]  # [C, H, K]
        if piece["mask"] is not None:
            raw = jnp.where(piece["mask"][:, None, None], raw, 0.0)
        if config.conv_window:
            new[name], raw = short_conv(params["conv"][name], carry[name], raw)
        unit = name != "v" or config.value_norm
        out[name] = jnp.moveaxis(l2_normalize(raw) if unit else raw, 0, 1)
    return out["k"], out["v"], out["q"], new


def _gates(config: SelfModifyingConfig, params: Params, made: dict, x_HCK: jax.Array) -> dict[str, jax.Array]:
    """eta, log alpha and mu per head and token [H, C] (S7.3); read from x itself where no memory makes them."""

    def read_out(name: str) -> jax.Array:
        p = params["gates"][name]
        return jnp.einsum("HCK,HK->HC", made.get(name, x_HCK), p["w"]) + p["b"][:, None]

    gates = {"eta": jax.nn.softplus(read_out("eta"))}
    if config.retention:
        gates["log_alpha"] = jax.nn.log_sigmoid(read_out("alpha"))
    if config.momentum == "gate":
        gates["log_mu"] = jax.nn.log_sigmoid(read_out("mu"))
    return gates
