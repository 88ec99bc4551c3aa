"""The training step, written for a mesh: one device is the 1 x 1 x 1 mesh and runs the same program.

program = build_program(config)
state = program.init()
state, metrics = program.train_step(state, tokens)      # donates state, one compile per run
"""

import bisect
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hope_jax.models import ModelConfig, build_lm, matryoshka, matryoshka_losses
from hope_jax.placement import on_mesh
from hope_jax.training.config import TrainConfig
from hope_jax.training.documents import cross_entropy, document_losses
from hope_jax.training.errors import UserError
from hope_jax.training.level_metrics import norms, steps_since_update
from hope_jax.training.optimizer import build_optimizer, learning_rate_schedule
from hope_jax.training.overrides import one_line
from hope_jax.training.packing import Batch
from hope_jax.training.sharding import BATCH, make_mesh, rows_on, shardings


class TrainState(NamedTuple):
    """All that a step reads and writes; the position of data, schedule and levels follows from `step`."""

    step: jax.Array  # [] int32, steps taken
    params: Any
    opt_state: Any
    lanes: Any = ()  # [batch, ...] fast state of each row, where it is carried from step to step


class Metrics(NamedTuple):
    """Of one step, on the device until the host asks."""

    loss: jax.Array  # [] float32, nats per token
    grad_norm: jax.Array  # [] float32, before clipping
    learning_rate: jax.Array  # [] float32, used in this step
    params_norm: jax.Array  # [] float32, of the parameters after the step
    update_norm: jax.Array  # [] float32, of what the step added to the parameters
    level_update_norm: dict[str, jax.Array]  # [] float32 of each level
    level_waited: dict[str, jax.Array]  # [] int32, steps since each level was written; 0 if in this one
    level_gradient_ratio: dict[str, jax.Array]  # [] float32, |gradient| / |parameters| of each level before the step


class Program(NamedTuple):
    """The compiled functions of a run and where their arrays live."""

    lm: Any
    mesh: Mesh
    abstract_state: TrainState  # shapes, dtypes and shardings, for restoring
    init_params: Callable[[], Any]
    start: Callable[[Any], TrainState]  # the state before the first step, of parameters that it takes over
    train_step: Any  # (state, tokens [batch, T+1] or a Batch of documents) -> (state, Metrics)
    eval_step: Any  # (params, the same of a microbatch, weights [microbatch, T]) -> (sum of nats, targets)
    level_norms: Any  # (params, others) -> the norm of their difference, float32[] by level

    def init(self) -> TrainState:
        """The state before the first step."""
        return self.start(self.init_params())

    def distances(self, params: Any, start: Any = None) -> dict[str, jax.Array]:
        """How far each level is from where the run began, float32[].

        Args:
          params: as they are now.
          start: as they were; None makes them again: keeping them would take as much memory as the parameters do.
        """
        return self.level_norms(params, self.init_params() if start is None else start)

    def rows_here(self, count: int) -> list[int]:
        """The rows of a batch of `count` that lie on the devices of this process."""
        return rows_on(self.batch_sharding, count, self.batch_sharding.addressable_devices)

    def put_batch(self, batch: Any, rows: Sequence[int] | None = None, count: int | None = None) -> Any:
        """A host array or several as global ones, the first axis over the mesh's batch axes.

        Args:
          batch: rows of this process.
          rows: which of the global batch they are, ascending; None for all.
          count: rows of the global batch; None for as many as are here.
        """

        def place(x: Any) -> jax.Array:
            size = x.shape[0] if count is None else count

            def of_device(index: Any) -> Any:
                first, end, _ = index[0].indices(size)
                here = first if rows is None else bisect.bisect_left(rows, first)
                return x[here : here + end - first]

            return jax.make_array_from_callback((size, *x.shape[1:]), self.batch_sharding, of_device)

        return jax.tree.map(place, batch)

    @property
    def batch_sharding(self) -> NamedSharding:
        """Rows over the batch axes of the mesh."""
        return NamedSharding(self.mesh, BATCH)


def build_program(config: TrainConfig, devices: Sequence[Any] | None = None) -> Program:
    """Builds model, optimizer, mesh and the jitted functions; nothing is compiled yet.

    Args:
      config: what to build.
      devices: see `make_mesh`.
    Raises:
      UserError: the model refuses its config (for example chunk sizes that do not divide), or too few
        devices.
    """
    mesh = make_mesh(config.mesh, devices)
    tx = build_optimizer(config)
    lanes = config.batch_size if config.carries else 0
    try:
        lm = build_lm(config.model)
        abstract = abstract_state(lm, tx, mesh, lanes)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    batch, scalar = NamedSharding(mesh, BATCH), NamedSharding(mesh, P())
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return Program(
        lm=lm,
        mesh=mesh,
        abstract_state=abstract,
        init_params=jax.jit(lambda: init_params(lm, config.seed), out_shardings=placed.params),
        start=jax.jit(lambda params: start_state(lm, tx, params, lanes), out_shardings=placed, donate_argnums=0),
        train_step=jax.jit(
            on_mesh(make_train_step(lm, tx, config), mesh),
            in_shardings=(placed, batch),
            out_shardings=(placed, scalar),
            donate_argnums=0,
        ),
        eval_step=jax.jit(
            on_mesh(make_eval_step(lm, config.model), mesh),
            in_shardings=(placed.params, batch, batch),
            out_shardings=(scalar, scalar),
        ),
        level_norms=jax.jit(
            lambda params, others: norms(jax.tree.map(jnp.subtract, params, others)), out_shardings=scalar
        ),
    )


def abstract_state(lm: Any, tx: optax.GradientTransformation, mesh: Mesh, lanes: int = 0) -> TrainState:
    """Shapes, dtypes and shardings of a state."""
    shapes = jax.eval_shape(lambda: init_state(lm, tx, 0, lanes))
    batch = NamedSharding(mesh, BATCH)
    placed = shardings(shapes, mesh)._replace(lanes=jax.tree.map(lambda leaf: batch, shapes.lanes))
    return jax.tree.map(_place, shapes, placed)


def _place(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def init_state(lm: Any, tx: optax.GradientTransformation, seed: int, lanes: int = 0) -> TrainState:
    """The state before the first step; `lanes` rows carry their fast state from step to step."""
    return start_state(lm, tx, init_params(lm, seed), lanes)


def start_state(lm: Any, tx: optax.GradientTransformation, params: Any, lanes: int = 0) -> TrainState:
    """The state before the first step, of these parameters."""
    carried = lm.init_state(params, lanes) if lanes else ()
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), carried)


def init_params(lm: Any, seed: int) -> Any:
    """The parameters before the first step."""
    # A weakly typed leaf would be strong after the first update, and the step would compile a second time.
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), lm.init(jax.random.key(seed)))


def token_losses(lm: Any, params: Any, tokens_BT: jax.Array, losses: Callable = cross_entropy) -> jax.Array:
    """Nats of each next token.

    Args:
      lm: the model's functions.
      params: its parameters.
      tokens_BT: [B, T + 1]; every row starts with an empty memory.
      losses: (what the model returns, targets) -> [B, T].
    Returns:
      [B, T] float32.
    """
    tokens_BT = tokens_BT.astype(jnp.int32)
    fresh = lm.init_state(params, tokens_BT.shape[0])
    _, logits_BTV = lm.apply(params, fresh, tokens_BT[:, :-1], phase=0)
    return losses(logits_BTV, tokens_BT[:, 1:])


def make_train_step(lm: Any, tx: optax.GradientTransformation, config: TrainConfig) -> Callable:
    """The training step as a pure function."""
    schedule, losses = learning_rate_schedule(config), cross_entropy
    if config.matryoshka:
        lm = matryoshka(config.model, len(config.matryoshka))
        losses = functools.partial(matryoshka_losses, config.matryoshka)

    def loss_fn(params, inputs):
        tokens_BT, lanes = inputs
        if not isinstance(tokens_BT, Batch):
            return token_losses(lm, params, tokens_BT, losses).mean(), ()
        before = lanes if config.carries else lm.init_state(params, tokens_BT.tokens.shape[0])
        after, losses_BT = document_losses(lm, config.model, params, before, tokens_BT, losses)
        return (losses_BT * tokens_BT.weights).mean(), after if config.carries else ()

    def train_step(state: TrainState, tokens_BT: Any) -> tuple[TrainState, Metrics]:
        if isinstance(tokens_BT, Batch):  # the mean over the places is the mean over the targets
            weights = tokens_BT.weights
            tokens_BT = tokens_BT._replace(weights=weights * (weights.size / jnp.maximum(weights.sum(), 1)))
        inputs = (tokens_BT, state.lanes)
        (loss, lanes), grads = accumulated_grad(loss_fn, state.params, inputs, config.accumulate)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        moved = norms(updates)
        metrics = Metrics(
            loss=loss,
            grad_norm=optax.tree.norm(grads),
            learning_rate=learning_rate,
            params_norm=optax.tree.norm(params),
            update_norm=optax.tree.norm(moved),
            level_update_norm=moved,
            level_waited=steps_since_update(opt_state, list(moved), config.cms_periods),
            level_gradient_ratio=jax.tree.map(_ratio, norms(grads), norms(state.params)),
        )
        return TrainState(state.step + 1, params, opt_state, lanes), metrics

    return train_step


def _ratio(gradient: jax.Array, parameters: jax.Array) -> jax.Array:
    return gradient / jnp.maximum(parameters, jnp.finfo(parameters.dtype).tiny)


def accumulated_grad(loss_fn: Callable, params: Any, batch: Any, pieces: int) -> tuple[tuple[jax.Array, Any], Any]:
    """Mean loss and gradient over a batch, computed in microbatches one after the other.

    Microbatch i takes rows i, i + pieces, ...: each device's contiguous rows stay on the device.

    Args:
      loss_fn: (params, batch) -> (mean loss, something with one row per row of the batch).
      params: its parameters.
      batch: arrays with the rows first.
      pieces: number of microbatches.
    Returns:
      ((loss, something), gradient).
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if pieces == 1:
        return value_and_grad(params, batch)

    def cut(leaf):
        return leaf.reshape(leaf.shape[0] // pieces, pieces, *leaf.shape[1:]).swapaxes(0, 1)

    def join(leaf):
        return leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:])

    def add(total, piece):
        (loss, rows), grads = value_and_grad(params, piece)
        return jax.tree.map(jnp.add, total, (loss, grads)), rows

    micro = jax.tree.map(cut, batch)
    (loss, _), grads = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda leaf: leaf[0], micro))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (loss, grads))
    total, rows = jax.lax.scan(add, zeros, micro)
    loss, grads = jax.tree.map(lambda leaf: leaf / pieces, total)
    return (loss, jax.tree.map(join, rows)), grads


def make_eval_step(lm: Any, model: ModelConfig) -> Callable:
    """Sum of nats and number of targets of a batch of held-out windows, as a pure function."""

    def eval_step(params, tokens_BT, weights_BT):
        if isinstance(tokens_BT, Batch):
            fresh = lm.init_state(params, weights_BT.shape[0])
            _, losses_BT = document_losses(lm, model, params, fresh, tokens_BT)
        else:
            losses_BT = token_losses(lm, params, tokens_BT)
        return (losses_BT * weights_BT).sum(), weights_BT.sum()

    return eval_step


def bits(nats: float) -> float:
    """Nats as bits."""
    return nats / math.log(2)
