"""Consolidation, or sleep: what a fast level has learned is distilled into the next slower one, offline (spec 11.4).

Without any input but replayed text: the teacher is each layer's chain as the session left it, the student the chain
whose fast level is back at its start; only the next slower level of the student is trained, to give what the teacher
gives on what the chains saw.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hope_jax.models import ModelConfig
from hope_jax.models.cms import level_name
from hope_jax.models.cms_inputs import cms_chains
from hope_jax.models.fast_weights import CMS_MATRICES, fast_weights
from hope_jax.online.session import FAST, Session
from hope_jax.online.tokens import Text
from hope_jax.training.errors import UserError

ROW = 256  # tokens of replay that are read together


class Consolidated(NamedTuple):
    """What sleep did; errors are mean squared differences from the teacher's outputs over their own mean square."""

    forgotten: float  # error of the chains whose fast level is reset, without sleep
    left: float  # error after sleep
    tokens: int  # of replay

    @property
    def kept(self) -> float:
        """Share of what the fast level added that the slower level gives now."""
        return 1 - self.left / self.forgotten if self.forgotten else 1.0


def consolidate(
    session: Session,
    replay: Text,
    *,
    level: str | int = FAST,
    steps: int = 200,
    learning_rate: float = 1e-3,
    keep: float = 0.0,
) -> tuple[Session, Consolidated]:
    """A session whose fast level is empty again and whose next slower level knows what it knew.

    If the next slower level learns in the stream too, the new session has the same model; else that level is one of
    the parameters, and the new session is one of a model with other parameters (`Session.params`).

    Args:
      session: with CMS levels; it stays as it is.
      replay: the text, bytes or tokens to replay: the buffer. What is kept of the fast level is kept on text like this.
        It is read in rows of `ROW` tokens (or of the model's longest context); the oldest tokens that fill none are
        left out.
      level: the level that is emptied, "fast", a name or a number.
      steps: of Adam.
      learning_rate: of Adam.
      keep: lambda, of the squared distance that the slower level moves, which holds on to what it knew.

    Returns:
      The new session, and how well it went.

    Raises:
      UserError: a model without a slower CMS level, nested levels (they empty themselves), no such level, a replay of
        fewer than two tokens, or a number out of range.

    Example:
      >>> import jax
      >>> from hope_jax.models import ModelConfig, build_lm
      >>> levels = {"cms_hidden": (32, 32), "cms_chunks": (16,)}
      >>> config = ModelConfig(name="hope_attention", dim=16, layers=1, **levels)
      >>> session = Session(config, build_lm(config).init(jax.random.key(0)), measure_after=False)
      >>> text = "the same words again and again; " * 8
      >>> _ = session.observe(text)
      >>> rested, done = consolidate(session, text)
      >>> bool(done.left < 0.5 * done.forgotten), rested.diff(session) if rested.params is session.params else "new"
      (True, 'new')
    """
    for name, value, least in (("steps", steps, 1), ("learning_rate", learning_rate, 0), ("keep", keep, 0)):
        if not least <= value < math.inf:
            raise UserError(f"{name} must be a finite number, at least {least}; got {value}")
    index, tokens_BT = _level(session, level), _rows(session, replay)
    teacher = fast_weights(session.model).put(session.params, session.weights())
    start = session.params["blocks"]["cms"][level_name(index)]
    trained, forgotten, left = distil(session.model, index, steps, teacher, start, tokens_BT, learning_rate, keep)
    rested = _with_level(session, index + 1, trained)
    rested.forget(index)
    return rested, Consolidated(float(forgotten), float(left), int(tokens_BT.size))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def distil(
    config: ModelConfig,
    index: int,
    steps: int,
    params: Any,
    start: Any,
    tokens_BT: jax.Array,
    learning_rate: float | jax.Array,
    keep: float | jax.Array = 0.0,
) -> tuple[Any, jax.Array, jax.Array]:
    """Trains a level to do with a fresh level before it what both do now (spec 11.4).

    Args:
      config: of a model whose blocks end in a CMS chain, not a nested one.
      index: of the level that is emptied, not the last; the next one is trained.
      steps: of Adam, whose learning rate falls to zero along a cosine.
      params: with what all levels have learned: the teacher.
      start: the emptied level's own parameters before it learned, its matrices [L, ...] at least.
      tokens_BT: the replay.
      learning_rate: of Adam.
      keep: lambda of `consolidate`.

    Returns:
      The trained matrices [L, ...], and the errors (see `Consolidated`) before and after.

    Raises:
      ValueError: the blocks do not end in a CMS chain.
    """
    chains, cms = cms_chains(config), params["blocks"]["cms"]
    student, name = {**cms, level_name(index): {**cms[level_name(index)], **start}}, level_name(index + 1)
    x = chains.inputs(params, tokens_BT)
    teacher = chains.apply(cms, x)
    before = {key: student[name][key] for key in CMS_MATRICES}
    scale = jnp.mean(jnp.square(teacher - x))

    def error(matrices: Any) -> jax.Array:
        y = chains.apply({**student, name: {**student[name], **matrices}}, x)
        return jnp.mean(jnp.square(y - teacher)) / scale

    def loss(matrices: Any) -> jax.Array:
        moved = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), matrices, before)
        return error(matrices) + keep * sum(jax.tree.leaves(moved))

    tx = optax.adam(optax.cosine_decay_schedule(1.0, steps))

    def step(carry, _):
        matrices, state = carry
        updates, state = tx.update(jax.grad(loss)(matrices), state)
        updates = jax.tree.map(lambda u: learning_rate * u, updates)
        return (optax.apply_updates(matrices, updates), state), None

    (after, _), _ = jax.lax.scan(step, (before, tx.init(before)), length=steps)
    return after, error(before), error(after)


def _level(session: Session, level: str | int) -> int:
    config = session.model
    if not config.cms_chunks or config.cms_variant == "nested":
        raise UserError(
            "consolidation needs CMS levels that learn in the stream and do not restart each other; "
            f"this model has cms_chunks={config.cms_chunks}, cms_variant={config.cms_variant!r}"
        )
    index = session.level_index(level)
    if index + 1 == len(config.cms_hidden):
        raise UserError(f"{level_name(index)} is the slowest level of the model; there is none to consolidate it into")
    return index


def _rows(session: Session, replay: Text) -> np.ndarray:
    """[B, T] tokens, the newest ones."""
    tokens = session.encode(replay)
    length = min(ROW, len(tokens), session.model.max_length if session.model.architecture.cache else ROW)
    if length < 2:
        raise UserError(f"a replay needs at least two tokens; got {len(tokens)}")
    return tokens[len(tokens) % length :].reshape(-1, length).astype(np.int32)


def _with_level(session: Session, index: int, matrices: Any) -> Session:
    """The session with other weights in one level, in its state or, where that does not learn, in its parameters."""
    now = session.snapshot()
    if index < len(session.clocks):
        nest = now.state.nest
        batched = jax.tree.map(lambda leaf: leaf[None], matrices)
        levels = list(nest.levels)
        levels[index] = levels[index]._replace(start=batched)
        rested = session.fork()
        rested.resume(now._replace(state=now.state._replace(nest=nest._replace(levels=tuple(levels)))))
        return rested
    cms = session.params["blocks"]["cms"]
    name = level_name(index)
    blocks = {**session.params["blocks"], "cms": {**cms, name: {**cms[name], **matrices}}}
    rested = session.of_params({**session.params, "blocks": blocks})
    rested.resume(now)
    return rested
