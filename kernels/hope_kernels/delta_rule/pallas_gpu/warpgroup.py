"""What every kernel here is made of: tensor-core products of shared-memory tiles, and the launch.

Products are `wgmma`: bfloat16 operands in shared memory, float32 accumulators in the registers of one warpgroup
(128 threads). One form differs between the compiler and jax's interpreter of Mosaic GPU, which has no
accumulators that start from a value; the difference lives in `products`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hope_kernels.delta_rule.pallas_gpu.parts import Operand, passes

TILE = 64  # tokens per tile: the rows of one wgmma
COLUMNS = 64  # columns of the state that one warpgroup keeps
_SWIZZLE_BYTES = 128
_HIDDEN = -1e30  # exp of it is 0


def tile_memory(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory in the swizzled layout that TMA writes and wgmma reads; the last axis a multiple of 64."""
    columns = _SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    transforms: Any = (plgpu.TilingTransform, plgpu.SwizzleTransform)
    return plgpu.SMEM(shape, dtype, transforms=(transforms[0]((8, columns)), transforms[1](_SWIZZLE_BYTES)))


def products(*terms: tuple[Any, Sequence[tuple[Operand, Operand]]], interpret: Any) -> list[jax.Array]:
    """For every (start, pairs): start plus the sum of a @ b over the pairs, all issued together.

    A start is a float32 [M, N], whose registers become the accumulator, or a shape, for zeros.
    """

    def issue(*accumulators):
        for acc, (_, pairs) in zip(accumulators, terms, strict=True):
            for a, b in pairs:
                for a_part, b_part in passes(a, b):
                    plgpu.wgmma(acc, a_part, b_part)

    def fresh(*accumulators):
        issue(*accumulators)
        return [acc[...] for acc in accumulators]

    shapes = [start if isinstance(start, tuple) else start.shape for start, _ in terms]
    if interpret or all(isinstance(start, tuple) for start, _ in terms):
        results = pl.run_scoped(fresh, *[plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for shape in shapes])
        return [x if isinstance(start, tuple) else start + x for (start, _), x in zip(terms, results, strict=True)]
    starts = [zeros(start) if isinstance(start, tuple) else start for start, _ in terms]
    run: Any = pl.run_state(lambda refs: issue(*refs))
    return list(run([plgpu.WGMMAAccumulatorRef.init(start) for start in starts]))


def product(shape: tuple[int, int], *pairs: tuple[Operand, Operand]) -> jax.Array:
    """The sum of a @ b over `pairs`, float32 [M, N]."""
    return products((shape, pairs), interpret=True)[0]


def zeros(shape: tuple[int, ...]) -> jax.Array:
    """Float32 zeros in the registers of an accumulator."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def column(x_C: jax.Array, width: int) -> jax.Array:
    """[C] -> [C, width]."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(x_C, (x_C.shape[0], width), (0,)), plgpu.Layout.WGMMA)


def column_gate(ref: Any) -> jax.Array:
    """[C] from shared memory, as `column` wants it."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))


def row(x_C: jax.Array, height: int) -> jax.Array:
    """[C] -> [height, C]."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(x_C, (height, x_C.shape[0]), (1,)), plgpu.Layout.WGMMA)


def indices(shape: tuple[int, int], axis: int) -> jax.Array:
    """The index along `axis` at every entry."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def ratio(keep_CC: jax.Array, from_C: jax.Array | None, to_C: jax.Array | None) -> jax.Array:
    """exp(from_t - to_i) where `keep`, else 0; hidden before exp, because it would overflow there."""
    if from_C is None or to_C is None:
        return jnp.where(keep_CC, 1.0, 0.0)
    size = from_C.shape[0]
    return jnp.exp(jnp.where(keep_CC, column(from_C, size) - row(to_C, size), _HIDDEN))


def launch(
    body: Callable[..., None],
    *,
    name: str,
    grid: dict[str, int],
    outputs: Sequence[jax.ShapeDtypeStruct],
    scratch: Any,
    warpgroups: int = 1,
    interpret: Any = None,
) -> Callable[..., tuple[jax.Array, ...]]:
    """`plgpu.kernel` with named grid axes; with more than one warpgroup their axis is called "wg"."""
    body.__name__ = name
    threads = {} if warpgroups == 1 else {"num_threads": warpgroups, "thread_name": "wg"}
    return plgpu.kernel(
        body,
        out_type=tuple(outputs),
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=512,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret,
        **threads,
    )
