"""What learns while a text goes by, from one window of it: levels of a model, all of it, or nothing.

A learner is a word, for the grid of an experiment:

    16,64,256        the levels of these clocks, fast first: in a block's CMS chain its first levels, in a Transformer
                     the MLPs of its first layers (there any order, "256,64,16" has the slow level at the input).
                     All else is frozen.
    64,64,64         one level: the same weights, all written at the same clock
    meta:16,64,256   the same after training through the writes (levels whose starts are meta-learned)
    sleep:16,64,256  the levels, and after each text its fast level is consolidated into the next one (spec 11.4), by
                     steps that do not depend on the inner learning rate
    all:64           every parameter, by plain gradient descent after each 64 bytes
    none             nothing: the model as it was trained, with its context of one window

Attention and memories start empty in each window, as in training; only the weights are carried on.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax

from hope_jax.models import ModelConfig, build_lm
from hope_jax.models.fast_levels import with_fast_levels
from hope_jax.models.fast_weights import fast_weights
from hope_jax.online import distil
from hope_jax.training.documents import cross_entropy
from hope_jax.training.errors import UserError

type Kind = Literal["levels", "meta", "sleep", "all"]

REPLAYED = 8  # windows, the last ones of a text, that sleep replays
SLEEP = {"steps": 50, "learning_rate": 3e-3}  # of Adam


class Learner(NamedTuple):
    """What learns."""

    kind: Kind
    clocks: tuple[int, ...]  # bytes between writes, of each level; () of nothing


def learner(name: str) -> Learner:
    """A word of the grid.

    Raises:
      UserError: it is none.

    >>> learner("16,64"), learner("all:32"), learner("none").clocks
    (Learner(kind='levels', clocks=(16, 64)), Learner(kind='all', clocks=(32,)), ())
    """
    if name == "none":
        return Learner("levels", ())
    kind, _, clocks = name.rpartition(":")
    try:
        found = Learner(kind or "levels", tuple(int(clock) for clock in clocks.split(",")))  # pyright: ignore
    except ValueError:
        found = None
    known = get_args(Kind.__value__)
    if found is None or found.kind not in known or min(found.clocks) < 1 or (kind == "all" and len(found.clocks) > 1):
        raise UserError(
            f"learners are 'none' or clocks like '16,64', 'meta:16,64', 'sleep:16,64', 'all:64'; got {name!r}"
        )
    if kind == "sleep" and len(found.clocks) == 1:
        raise UserError(f"sleep moves what the first level knows into the second; give it two clocks, not {name!r}")
    return found


class Moving(NamedTuple):
    """The weights that learn, and how."""

    start: Callable[[Any], Any]  # params -> weights
    put: Callable[[Any, Any], Any]  # (params, weights) -> the parameters with them
    read: Callable[[Any, Any, jax.Array, jax.Array], Any]  # (params, weights, tokens [T + 1], eta) -> weights
    rest: Callable[[Any, Any, jax.Array], Any] = lambda params, weights, windows: weights
    # (params, weights, windows [N, T + 1]) -> weights, after a text


def moving(config: ModelConfig, who: Learner) -> Moving:
    """How `who` learns from one window.

    Args:
      config: the model, with the levels of `who` if these are what learns (`streams.configs`).
      who: the learner.
    """
    if not who.clocks:
        return Moving(lambda params: (), lambda params, weights: params, lambda params, weights, tokens, eta: weights)
    if who.kind == "all":
        return _everything(config, who.clocks[0])
    levels = _levels(config)
    return levels._replace(rest=_sleep(config, levels)) if who.kind == "sleep" else levels


def _levels(config: ModelConfig) -> Moving:
    """The last byte of a window is there to be predicted; it teaches, so every whole chunk before it is written."""
    fast = fast_weights(config)

    def read(params: Any, weights: Any, tokens_T: jax.Array, eta: jax.Array) -> Any:
        lm = with_fast_levels(config, eta)
        params = fast.put(params, weights)
        state, _ = lm.apply(params, lm.init_state(params, 1), tokens_T[None], phase=0)
        return tuple(jax.tree.map(lambda leaf_B: leaf_B[0], level.start) for level in state.nest.levels)

    return Moving(fast.take, fast.put, read)


def _sleep(config: ModelConfig, levels: Moving) -> Callable[[Any, Any, jax.Array], Any]:
    """The first level back at its start, the second knowing what it knew."""

    def rest(params: Any, weights: Any, windows_NT: jax.Array) -> Any:
        start, teacher = levels.start(params)[0], levels.put(params, weights)
        tokens_BT = windows_NT[-REPLAYED:, :-1]
        trained = distil(config, 0, SLEEP["steps"], teacher, start, tokens_BT, SLEEP["learning_rate"])[0]
        return (start, trained, *weights[2:])

    return rest


def _everything(config: ModelConfig, clock: int) -> Moving:
    """Gradient descent on the mean loss of each chunk, whose past is a constant, as it is for the levels."""
    lm = build_lm(config)
    phase = None if config.architecture.cache else 0  # a chunk is whole chunks of the memories

    def read(params: Any, weights: Any, tokens_T: jax.Array, eta: jax.Array) -> Any:
        del params

        def step(carry: Any, chunk: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            weights, state = carry
            tokens_C, targets_C = chunk

            def loss(weights: Any):
                after, logits_BCV = lm.apply(weights, state, tokens_C[None], phase=phase)
                return cross_entropy(logits_BCV, targets_C[None]).mean(), after

            gradient, state = jax.grad(loss, has_aux=True)(weights)
            return (jax.tree.map(lambda w, g: w - eta * g, weights, gradient), state), None

        chunks = tokens_T[:-1].reshape(-1, clock), tokens_T[1:].reshape(-1, clock)
        return jax.lax.scan(step, (weights, lm.init_state(weights, 1)), chunks)[0][0]

    return Moving(lambda params: params, lambda params, weights: weights, read)
