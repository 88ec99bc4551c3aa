"""The training step, written for a mesh: one device is the 1 x 1 x 1 mesh and runs the same program.

program = build_program(config)
state = program.init()
state, metrics = program.train_step(state, tokens)      # donates state, one compile per run
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hope_jax.models import build_lm
from hope_jax.training.config import TrainConfig
from hope_jax.training.errors import UserError
from hope_jax.training.optimizer import build_optimizer, learning_rate_schedule
from hope_jax.training.overrides import one_line
from hope_jax.training.sharding import BATCH, make_mesh, shardings


class TrainState(NamedTuple):
    """All that a step reads and writes; the position of data, schedule and levels follows from `step`."""

    step: jax.Array  # [] int32, steps taken
    params: Any
    opt_state: Any


class Metrics(NamedTuple):
    """Of one step, on the device until the host asks."""

    loss: jax.Array  # [] float32, nats per byte
    grad_norm: jax.Array  # [] float32, before clipping
    learning_rate: jax.Array  # [] float32, used in this step
    params_norm: jax.Array  # [] float32, of the parameters after the step


class Program(NamedTuple):
    """The compiled functions of a run and where their arrays live."""

    lm: Any
    mesh: Mesh
    abstract_state: TrainState  # shapes, dtypes and shardings, for restoring
    init: Callable[[], TrainState]
    train_step: Any  # (state, tokens [batch, T+1] uint8) -> (state, Metrics)
    eval_step: Any  # (params, tokens [microbatch, T+1] uint8, weights [microbatch, T]) -> (sum of nats, targets)

    def put_batch(self, array: np.ndarray) -> jax.Array:
        """A host array, the same on every process, with its first axis over the mesh's batch axes.

        Each process moves only the rows of its own devices.
        """
        return jax.make_array_from_callback(array.shape, NamedSharding(self.mesh, BATCH), lambda rows: array[rows])


def build_program(config: TrainConfig) -> Program:
    """Builds model, optimizer, mesh and the jitted functions; nothing is compiled yet.

    Raises:
      UserError: the model refuses its config (for example chunk sizes that do not divide), or too few
        devices.
    """
    mesh = make_mesh(config.mesh)
    tx = build_optimizer(config)
    try:
        lm = build_lm(config.model)
        shapes = jax.eval_shape(lambda: init_state(lm, tx, config.seed))
    except ValueError as error:
        raise UserError(one_line(error)) from error
    placed = shardings(shapes, mesh)
    batch, scalar = NamedSharding(mesh, BATCH), NamedSharding(mesh, P())
    return Program(
        lm=lm,
        mesh=mesh,
        abstract_state=jax.tree.map(_place, shapes, placed),
        init=jax.jit(lambda: init_state(lm, tx, config.seed), out_shardings=placed),
        train_step=jax.jit(
            make_train_step(lm, tx, config),
            in_shardings=(placed, batch),
            out_shardings=(placed, scalar),
            donate_argnums=0,
        ),
        eval_step=jax.jit(
            make_eval_step(lm), in_shardings=(placed.params, batch, batch), out_shardings=(scalar, scalar)
        ),
    )


def _place(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def init_state(lm: Any, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    # A weakly typed leaf would be strong after the first update, and the step would compile a second time.
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), lm.init(jax.random.key(seed)))
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def token_losses(lm: Any, params: Any, tokens_BT: jax.Array) -> jax.Array:
    """Nats of each next byte.

    Args:
      lm: the model's functions.
      params: its parameters.
      tokens_BT: [B, T + 1] uint8; every row starts with an empty memory.
    Returns:
      [B, T] float32.
    """
    tokens_BT = tokens_BT.astype(jnp.int32)
    fresh = lm.init_state(params, tokens_BT.shape[0])
    _, logits_BTV = lm.apply(params, fresh, tokens_BT[:, :-1], phase=0)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV.astype(jnp.float32), tokens_BT[:, 1:])


def make_train_step(lm: Any, tx: optax.GradientTransformation, config: TrainConfig) -> Callable:
    """The training step as a pure function."""
    schedule = learning_rate_schedule(config)

    def loss_fn(params, tokens_BT):
        return token_losses(lm, params, tokens_BT).mean()

    def train_step(state: TrainState, tokens_BT: jax.Array) -> tuple[TrainState, Metrics]:
        loss, grads = accumulated_grad(loss_fn, state.params, tokens_BT, config.accumulate)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        metrics = Metrics(loss, optax.tree.norm(grads), learning_rate, optax.tree.norm(params))
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def accumulated_grad(loss_fn: Callable, params: Any, tokens_BT: jax.Array, pieces: int) -> tuple[jax.Array, Any]:
    """Mean loss and gradient over a batch, computed in microbatches one after the other.

    Microbatch i takes rows i, i + pieces, ...: each device's contiguous rows stay on the device.
    """
    if pieces == 1:
        return jax.value_and_grad(loss_fn)(params, tokens_BT)
    rows, width = tokens_BT.shape
    micro_ABT = tokens_BT.reshape(rows // pieces, pieces, width).swapaxes(0, 1)

    def add(total, tokens):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(params, tokens)), None

    shapes = jax.eval_shape(jax.value_and_grad(loss_fn), params, micro_ABT[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, micro_ABT)
    return jax.tree.map(lambda leaf: leaf / pieces, total)


def make_eval_step(lm: Any) -> Callable:
    """Sum of nats and number of targets of a batch of held-out windows, as a pure function."""

    def eval_step(params, tokens_BT, weights_BT):
        losses_BT = token_losses(lm, params, tokens_BT)
        return (losses_BT * weights_BT).sum(), weights_BT.sum()

    return eval_step


def bits(nats: float) -> float:
    """Nats as bits."""
    return nats / math.log(2)
