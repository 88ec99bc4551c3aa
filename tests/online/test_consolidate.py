"""Sleep: what the fast level knew is kept by the next slower one after it is reset."""

import dataclasses

import jax
import numpy as np
import pytest

from hope_jax import online
from hope_jax.models import ModelConfig, build_lm
from hope_jax.models.cms_inputs import cms_chains
from hope_jax.training.errors import UserError

TEXT = "the archive's password is swordfish and nothing else will open it; " * 6


@pytest.fixture(scope="module")
def session(config, params):
    session = online.Session(dataclasses.replace(config, cms_eta=2.0), params)
    session.observe(TEXT)
    return session


def test_the_slower_level_keeps_what_the_fast_one_knew(session):
    digest = session.digest()
    rested, done = online.consolidate(session, TEXT, steps=150, learning_rate=3e-3)
    assert session.digest() == digest  # the old one stays
    fresh = online.Session(session.model, session.params)
    assert rested.diff(fresh)["level_0"] == 0 and rested.diff(session)["level_1"] > 0
    assert done.left < 0.5 * done.forgotten and done.kept == pytest.approx(1 - done.left / done.forgotten)
    awake, reset = session.fork(), session.fork()
    reset.forget("fast")
    scores = [one.score(TEXT) for one in (fresh, reset, rested, awake)]
    assert scores[3] < scores[2] < scores[1] < scores[0]
    rested.observe(TEXT)  # the stream goes on


def test_holding_on_to_what_was_known_moves_the_level_less(session):
    free, _ = online.consolidate(session, TEXT, steps=50, learning_rate=3e-3)
    held, _ = online.consolidate(session, TEXT, steps=50, learning_rate=3e-3, keep=10.0)
    assert 0 < held.diff(session)["level_1"] < free.diff(session)["level_1"]
    nothing, done = online.consolidate(session, TEXT, steps=50, learning_rate=0.0)
    assert nothing.diff(session)["level_1"] == 0 and done.left == done.forgotten


def test_an_ordinary_level_takes_it_into_the_parameters(config, params):
    session = online.Session(dataclasses.replace(config, cms_chunks=(8,), cms_eta=2.0), params)
    session.observe(TEXT)
    rested, done = online.consolidate(session, TEXT, steps=100, learning_rate=3e-3)
    before, after = params["blocks"]["cms"], rested.params["blocks"]["cms"]
    assert done.kept > 0.3 and not np.array_equal(before["level_1"]["w1"], after["level_1"]["w1"])
    jax.tree.map(np.testing.assert_array_equal, before["level_0"], after["level_0"])
    with pytest.raises(UserError, match="two different models"):
        rested.diff(session)


def test_the_newest_of_the_buffer_is_replayed(session):
    """Tokens that fill no row are the oldest: of 100 in rows of 96, the model's longest context, the first four."""
    short, done = online.consolidate(session, TEXT[:96], steps=5)
    long, _ = online.consolidate(session, "old " + TEXT[:96], steps=5)
    assert done.tokens == 96 and long.digest() == short.digest() != session.digest()


def test_the_chains_see_what_the_blocks_give_them(config, params):
    """Applying every chain to its inputs gives the inputs of the next layer's mixer: rebuilt from the whole model."""
    config = dataclasses.replace(config, layers=1, cms_chunks=())
    chains = cms_chains(config)
    tokens = jax.numpy.arange(12)[None] % 7
    x = chains.inputs(params, tokens)
    y = chains.apply(params["blocks"]["cms"], x)[-1]
    lm = build_lm(config)
    _, logits = lm.apply(params, lm.init_state(params, 1), tokens, phase=0)
    scale = params["final_norm"]["scale"]
    normed = y / np.sqrt(np.mean(np.square(y), -1, keepdims=True) + config.norm_eps) * np.expand_dims(scale, (0, 1))
    np.testing.assert_allclose(normed @ params["embedding"].T, logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_consolidated_is_refused(session, config, params):
    with pytest.raises(UserError, match="level_1 is the slowest level"):
        online.consolidate(session, TEXT, level=1)
    with pytest.raises(UserError, match="at least two tokens; got 1"):
        online.consolidate(session, "x")
    with pytest.raises(UserError, match=r"cms_chunks=\(\)"):
        online.consolidate(online.Session(dataclasses.replace(config, cms_chunks=()), params), TEXT)
    with pytest.raises(UserError, match="nothing is called 'slow'"):
        online.consolidate(session, TEXT, level="slow")
    with pytest.raises(ValueError, match="do not each end in a CMS chain"):
        cms_chains(ModelConfig(name="transformer"))
