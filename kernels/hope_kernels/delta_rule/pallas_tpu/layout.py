"""How arrays lie in memory, and the parts of them a grid cell sees.

Heads lie side by side: q, k [B, T, Hk K] and u [B, T, H V], which is how a projection leaves them, so nothing is
transposed. A cell sees a tile of tokens and a stretch of heads. The gates are small and come as rows [R, C] of a tile
and a cell; what has to stand in columns is transposed in the kernel.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hope_kernels.delta_rule.pallas_tpu.plan import LANES, Plan

VMEM_BYTES = 48 * 2**20  # of the 64 MiB of the smallest chips
TEMPORARIES = 6  # float32 arrays of each width that a group of the backward kernel keeps at a time
SUBLANES = 8
GATES = ("total", "eta")  # log alpha summed up to and including t; erase coefficient
GATE_GRADIENTS = ("total", "before", "eta")  # "before": of log alpha summed up to t - 1


def tile_specs(plan: Plan, backwards: bool) -> dict[str, pl.BlockSpec]:
    """By name, the part of each array that belongs to grid step (batch, heads, tile)."""
    p = plan
    last = p.tiles - 1

    def tile(n):
        return last - n if backwards else n

    per_key_head = p.heads // p.key_heads

    def key_block(h):
        return h if p.cell_heads >= per_key_head else h * p.cell_heads // per_key_head

    keys = pl.BlockSpec((p.rows, p.tile, p.cell_key_heads * p.key_width), lambda b, h, n: (b, tile(n), key_block(h)))
    # One key head may serve several cells; each of them writes its own part of the gradient.
    key_gradient = pl.BlockSpec((p.rows, p.tile, p.cell_key_heads * p.key_width), lambda b, h, n: (b, tile(n), h))
    values = pl.BlockSpec((p.rows, p.tile, p.cell_heads * p.value_width), lambda b, h, n: (b, tile(n), h))
    state = pl.BlockSpec((p.rows, p.cell_heads, p.key_width, p.value_width), lambda b, h, n: (b, h, 0, 0))

    def gates(names):
        return pl.BlockSpec((p.rows, 1, 1, gate_rows(p, names), p.tile), lambda b, h, n: (b, tile(n), h, 0, 0))

    def per_tile(*shape):
        return pl.BlockSpec((p.rows, 1, p.cell_heads, *shape), lambda b, h, n: (b, tile(n), h, 0, 0))

    return {
        "q": keys,
        "k": keys,
        "u": values,
        "y": values,
        "gates": gates(GATES),
        "documents": pl.BlockSpec((p.rows, 1, 1, p.tile), lambda b, h, n: (b, tile(n), 0, 0)),
        "start": state,
        "end": state,
        "starts": per_tile(p.key_width, p.value_width),
        "inverse": per_tile(p.tile, p.tile),
        "dq": key_gradient,
        "dk": key_gradient,
        "dy": values,
        "du": values,
        "d_gates": gates(GATE_GRADIENTS),
        "d_start": state,
        "d_end": state,
    }


def shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """By name, the whole arrays of `tile_specs`."""
    p = plan
    keys = (p.batch, p.tokens, p.key_heads * p.key_width)
    values = (p.batch, p.tokens, p.heads * p.value_width)
    key_gradient = (p.batch, p.tokens, p.cells * p.cell_key_heads * p.key_width)
    state = (p.batch, p.heads, p.key_width, p.value_width)
    gates = (p.batch, p.tiles, p.cells)
    return {
        "q": keys,
        "k": keys,
        "u": values,
        "y": values,
        "gates": (*gates, gate_rows(p, GATES), p.tile),
        "documents": (p.batch, p.tiles, 1, p.tile),
        "start": state,
        "end": state,
        "starts": (p.batch, p.tiles, p.heads, p.key_width, p.value_width),
        "inverse": (p.batch, p.tiles, p.heads, p.tile, p.tile),
        "dq": key_gradient,
        "dk": key_gradient,
        "dy": values,
        "du": values,
        "d_gates": (*gates, gate_rows(p, GATE_GRADIENTS), p.tile),
        "d_start": state,
        "d_end": state,
    }


def gate_rows(plan: Plan, names: tuple[str, ...]) -> int:
    """Rows of a cell's gates: one name after the other, a row per head, filled up to whole registers."""
    return -(-len(names) * plan.cell_heads // SUBLANES) * SUBLANES


def shifted_shape(plan: Plan) -> tuple[int, ...]:
    """Room for the decays of every stream, [2, streams, 8 + C, W], so that they can be loaded from a row above."""
    return 2, plan.streams, SUBLANES + plan.tile, max(plan.tile, plan.key_width)


def pack_gates(plan: Plan, log_alpha_BTH: jax.Array | None, eta_BTH: jax.Array | None) -> jax.Array:
    """[B, tiles, cells, R, C]: the gates of a tile and a cell as rows."""
    p = plan
    shape = (p.batch, p.tiles, p.tile, p.cells, p.cell_heads)
    zero = jnp.zeros(shape, jnp.float32)
    total = eta = zero
    if log_alpha_BTH is not None:
        total = jnp.cumsum(log_alpha_BTH.reshape(shape), axis=2)
    if eta_BTH is not None:
        eta = eta_BTH.reshape(shape)
    packed = jnp.stack([total, eta], axis=4).reshape(*shape[:4], -1)
    missing = gate_rows(p, GATES) - packed.shape[-1]
    packed = jnp.pad(packed, [(0, 0)] * 4 + [(0, missing)])
    return packed.transpose(0, 1, 3, 4, 2)


def unpack_gate_gradients(plan: Plan, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of log alpha and eta [B, T, H] from rows of `GATE_GRADIENTS`."""
    p = plan
    rows = gradient.transpose(0, 1, 4, 2, 3)[..., : len(GATE_GRADIENTS) * p.cell_heads]
    rows = rows.reshape(p.batch, p.tiles, p.tile, p.cells, len(GATE_GRADIENTS), p.cell_heads)
    total, before, eta = (rows[..., i, :] for i in range(len(GATE_GRADIENTS)))
    # log alpha of token s is a part of the sums up to t >= s, and up to t - 1 of t > s.
    d_log_alpha = jnp.cumsum((total + before)[:, :, ::-1], axis=2)[:, :, ::-1] - before
    shape = (p.batch, p.tokens, p.heads)
    return d_log_alpha.reshape(shape), eta.reshape(shape)


def pack_documents(plan: Plan, reset_BT: jax.Array) -> jax.Array:
    """[B, tiles, 1, C]: how many documents have begun in the tile, up to and including the token."""
    return jnp.cumsum(reset_BT.reshape(plan.batch, plan.tiles, 1, plan.tile), axis=-1)


def launch(
    plan: Plan,
    kernel: Callable[..., None],
    name: str,
    arrays: dict[str, jax.Array],
    results: dict[str, jnp.dtype],
    backwards: bool,
) -> dict[str, jax.Array]:
    """`kernel(plan, names of the arrays, names of the results, *references)` over the grid; the results by name.

    The last reference is memory for `decay.since_and_ratios`. The states of a cell stay in VMEM from tile to tile:
    they are the result that leaves with the last one.
    """
    specs, whole = tile_specs(plan, backwards), shapes(plan)
    found = pl.pallas_call(
        partial(kernel, plan, tuple(arrays), tuple(results)),
        grid=(plan.batch // plan.rows, plan.cells, plan.tiles),
        in_specs=[specs[array] for array in arrays],
        out_specs=[specs[result] for result in results],
        out_shape=[out_shape(whole[result], dtype, arrays["k"]) for result, dtype in results.items()],
        scratch_shapes=[pltpu.VMEM(shifted_shape(plan), jnp.float32)],
        compiler_params=compiler_params(),
        interpret=plan.interpret or False,
        name=name,
    )(*arrays.values())
    return dict(zip(results, found, strict=True))


def out_shape(shape: tuple[int, ...], dtype: jnp.dtype, like: jax.Array) -> jax.ShapeDtypeStruct:
    """Inside `shard_map`, a result varies over the mesh as the inputs do."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def compiler_params() -> pltpu.CompilerParams:
    """Batch entries and heads are independent, tiles follow one another."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=VMEM_BYTES,
        fuse_transposed_lhs_in_matmul=True,
    )


def vmem_bytes(plan: Plan, dtype: jnp.dtype) -> int:
    """What a cell of the backward kernel takes: two buffers for each part of an array, and temporaries."""
    p, item = plan, jnp.dtype(dtype).itemsize
    keys = p.rows * p.tile * p.cell_key_heads * p.key_width * item
    values = p.rows * p.tile * p.cell_heads * p.value_width * item
    states = p.streams * p.key_width * p.value_width * 4
    inverse = p.streams * p.tile * max(p.tile, LANES) * 4
    gates = p.rows * (gate_rows(p, GATES) + gate_rows(p, GATE_GRADIENTS)) * max(p.tile, LANES) * 4
    shifted = math.prod(shifted_shape(p)) * 4
    wide = max(p.tile, LANES) + max(p.key_width, LANES) + max(p.value_width, LANES)
    temporaries = max(p.group, p.gradient_group) * p.tile * wide * 4 * TEMPORARIES
    return 2 * (4 * keys + 3 * values + 3 * states + inverse + gates) + shifted + temporaries


def is_lane_aligned(width: int, whole: int) -> bool:
    """Whether a stretch of `width` of `whole` lanes can be cut out of an array."""
    return width % LANES == 0 or width == whole
