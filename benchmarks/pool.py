"""Users' tokens per second of one pool against as many sessions one after the other."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from hope_jax.models import ModelConfig, build_lm
from hope_jax.online import Pool, Session

POOL, SESSIONS = "pool", "sessions"


def cases(
    config: ModelConfig, users: int, read: int, answered: int
) -> tuple[dict[str, Callable[[Any], Any]], dict[str, Callable[[Any], Any]], dict[str, np.ndarray], int]:
    """Every user reads a text, and gets an answer; by implementation, as functions of the texts.

    Args:
      config: a model with fast levels.
      users: of the pool, one a slot, and sessions.
      read: tokens of each text.
      answered: tokens of each answer; none ends earlier.
    Returns:
      Functions that read, functions that answer, the texts by user, and bytes of state per user.
    """
    params = build_lm(config).init(jax.random.key(0))
    names = [f"user {i}" for i in range(users)]
    rng = np.random.default_rng(0)
    texts = {name: rng.integers(1, config.vocab_size, read) for name in names}
    # Untrained, so the end token would come as often as any; a token that was not seen is not generated.
    options = {"seen": range(1, config.vocab_size), "measure_after": False}
    pool = Pool(config, params, users, **options)
    sessions = {name: Session(config, params, **options) for name in names}
    for name, session in sessions.items():
        pool.admit(name, session)
    asked = {"max_tokens": answered, "learn": False}

    def each_reads(texts: dict[str, np.ndarray]) -> Any:
        return [sessions[name].observe(text).before for name, text in texts.items()]

    def each_answers(texts: dict[str, np.ndarray]) -> Any:
        return [sessions[name].generate(**asked) for name in texts]

    reading = {SESSIONS: each_reads, POOL: lambda texts: [r.before for r in pool.observe(texts).values()]}
    answering = {SESSIONS: each_answers, POOL: lambda texts: pool.generate(dict.fromkeys(texts, ""), **asked)}
    return reading, answering, texts, pool.slot_bytes
