"""Reading in pieces equals reading at once, its memory does not grow, and answers are greedy."""

import functools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.streaming import answers, reader, split
from hope_jax.models import ModelConfig, build_lm

SHAPE = {"vocab_size": 11, "dim": 8, "heads": 1, "memory_hidden": 4, "layers": 1, "cms_hidden": (8, 8)}
MODELS = {
    "delta_net": {},
    "transformer": {"max_length": 64},
    "titans": {"chunk_mem": 8},
    "samba": {"window": 4, "layers": 2},
    "hope": {"chunk_proj": 2, "chunk_mem": 4, "cms_chunks": (4, 8), "cms_eta": 0.5},
}


QUICK = {"delta_net", "transformer"}

CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


@functools.cache
def built(name):
    config = ModelConfig(name=name, **{**SHAPE, **MODELS[name]})
    lm = build_lm(config)
    return config, lm, lm.init(jax.random.key(0))


def tokens(length, rows=2):
    return np.random.default_rng(0).integers(11, size=(rows, length))


@pytest.mark.parametrize("name", CASES)
def test_pieces_are_the_whole(name):
    """37 tokens in pieces of 8, the last of 5: the logits are those of one call, the clock included."""
    config, _, params = built(name)
    read = reader(config, least=8)
    assert read.size == 8
    text = tokens(37)
    parts = [logits for _, logits in read.read(params, split(text, read.size))]
    expected = whole(config, text)
    assert len(parts) == 5
    np.testing.assert_allclose(
        np.concatenate(parts, axis=1), expected, rtol=0, atol=2e-6 * np.sqrt(37) * np.abs(expected).max()
    )


def whole(config, text):
    """The logits of one call."""
    _, lm, params = built(config.name)
    return np.asarray(jax.jit(lambda t: lm.apply(params, lm.init_state(params, 2), t, phase=0)[1])(jnp.asarray(text)))


@pytest.mark.parametrize("name", sorted(QUICK))
def test_answers_are_the_likeliest_tokens_one_after_the_other(name):
    """Against a loop that reads everything from the start for each token."""
    config, _, params = built(name)
    text = tokens(12)
    said = answers(reader(config, least=8), params, split(text, 8), 3)
    for _ in range(3):
        logits = whole(config, text)
        text = np.concatenate([text, np.asarray(logits[:, -1]).argmax(axis=-1)[:, None]], axis=1)
    np.testing.assert_array_equal(said, text[:, 12:])


def test_one_piece_is_in_memory_however_long_the_text():
    """Host pieces and device arrays are counted while a text of 200 pieces goes by."""
    config, _, params = built("delta_net")
    read = reader(config, least=8)
    alive, most = set(), {"pieces": 0, "bytes": 0}

    class Piece(np.ndarray):
        """An array that can be counted."""

    def pieces(count):
        for number in range(count):
            piece = np.ones((2, 8), np.int32).view(Piece)
            alive.add(number)
            weakref.finalize(piece, alive.discard, number)
            yield piece
            del piece

    def measure(count):
        most.update(pieces=0, bytes=0)
        for _ in read.read(params, pieces(count)):
            held = sum(array.nbytes for array in jax.live_arrays())
            most.update(pieces=max(most["pieces"], len(alive)), bytes=max(most["bytes"], held))
        return dict(most)

    measure(3)
    assert measure(200) == measure(3)
    assert most["pieces"] <= 2


def test_nothing_to_read_is_refused():
    config, _, params = built("delta_net")
    with pytest.raises(ValueError, match="nothing to read"):
        answers(reader(config), params, [], 1)
