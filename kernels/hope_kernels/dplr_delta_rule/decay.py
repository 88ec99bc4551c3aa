"""Products of readers with earlier writers, each channel faded by what is retained between the two, (P4) by (P6).

    A[t, i] = sum_k r_t[k] alpha_{i+1}[k] ... alpha_t[k] w_i[k]    for i <= t, else 0

What is retained differs from channel to channel, so it cannot be taken out of the product, and it may be put into the
factors only in parts that are at most one. So reader and writer meet between them: the tile is halved again and again,
and the halving that separates t from i has its middle there; the writer fades from i to it and the reader from it to t.
All pairs that are separated by the halvings of one level are one matrix product.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hope_kernels.delta_rule.tile import dot


class Faded(NamedTuple):
    """What passes from writers to readers within a tile, and the log of what is retained from and to its ends."""

    scores_RWCC: jax.Array  # A for every kind of reader and writer
    since_start_CK: jax.Array  # sum of log alpha over tokens 1..t
    until_end_CK: jax.Array  # over tokens t+1..C


def faded(readers_RCK: jax.Array, writers_WCK: jax.Array, log_alpha_CK: jax.Array) -> Faded:
    """Readers and writers in the dtype of the products, log alpha and the result in the dtype of the state."""
    dtype, wide = readers_RCK.dtype, log_alpha_CK.dtype
    between_MCC, level_CC = _tables(len(log_alpha_CK))
    # Every exponent is a sum over neighbouring tokens; differences of long sums would lose what a small one has.
    ones_MCC = jnp.asarray(between_MCC, wide)
    log_MCK = jnp.einsum("mti,ik->mtk", ones_MCC, log_alpha_CK, precision=jax.lax.Precision.HIGHEST)
    fade_L1CK = jnp.exp(log_MCK[2:])[:, None]
    readers_LRCK, writers_LWCK = (x[None].astype(wide) * fade_L1CK for x in (readers_RCK, writers_WCK))
    scores_LRWCC = dot("lrtk,lwik->lrwti", readers_LRCK, writers_LWCK, dtype, wide)
    here_LCC = level_CC == np.arange(len(scores_LRWCC))[:, None, None]
    return Faded(jnp.sum(jnp.where(here_LCC[:, None, None], scores_LRWCC, 0), axis=0), log_MCK[0], log_MCK[1])


def _tables(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens between t and where it meets others [M, C, C]: start, end, then by level; each pair's level [C, C].

    Two tokens meet at the level of the highest binary digit in which their numbers, from zero, differ; at level 0 a
    token meets itself. A middle is named by the last token of its first half. Level -1 is for i > t.
    """
    t_C = np.arange(size)
    level_CC = np.where(t_C[:, None] >= t_C, np.frexp(t_C[:, None] ^ t_C)[1], -1)
    middles = [(t_C >> n << n) + 2 ** (n - 1) - 1 for n in range(1, level_CC.max() + 1)]
    meet_MC = np.stack([np.full(size, -1), np.full(size, size - 1), t_C, *middles])
    first_MC1, last_MC1 = np.minimum(meet_MC, t_C)[..., None], np.maximum(meet_MC, t_C)[..., None]
    return (first_MC1 < t_C) & (t_C <= last_MC1), level_CC
