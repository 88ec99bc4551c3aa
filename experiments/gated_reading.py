"""Reading with a fast level that is written or not, chunk by chunk and row by row (spec 7.8, 11.1)."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from hope_jax.models import ModelConfig
from hope_jax.online import Gate, Session
from hope_jax.training.errors import UserError


class Reading(NamedTuple):
    """What came of reading."""

    bits_T: np.ndarray  # [T] bits per byte of each place in whole chunks, the mean over rows
    written: float  # share of the chunks that were written, of all but the last; 0 where there is one only


def first(count: int) -> Gate:
    """The first `count` chunks, then none.

    >>> gate = first(1)
    >>> state, write = gate.update(gate.init(), jnp.float32(2.0))
    >>> bool(write), bool(gate.update(state, jnp.float32(2.0))[1])
    (True, False)
    """
    return Gate(f"first:{count}", lambda: jnp.int32(0), lambda read, surprise: (read + 1, read < count))


def gated_reader(config: ModelConfig) -> Callable[[Any, np.ndarray, Gate], Reading]:
    """(params, windows [B, T + 1], gate) -> `Reading`, for a model with one fast level; each row has its own state.

    Raises:
      UserError: the model has no fast level, or several.
    """
    if len(config.fast_chunks) != 1:
        raise UserError(f"a gate opens one fast level; this model has the chunks {config.fast_chunks}")

    def read(params: Any, windows_BT: np.ndarray, gate: Gate) -> Reading:
        session = Session(config, params, gate=gate, measure_after=False)
        chunks = [session.fork().observe(window_T).chunks for window_T in windows_BT]
        nats_T = np.mean([one.losses.ravel() for one in chunks], axis=0)
        could_write = np.concatenate([one.wrote[:-1] for one in chunks])
        return Reading(nats_T / math.log(2), float(could_write.mean()) if could_write.size else 0.0)

    return read
