"""The languages against enumerations of all short words, found by regular expressions and counters."""

import functools
import itertools
import re

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.formal_languages import BINS, held_out, right_strings, stream
from experiments.formal_strings import LANGUAGES
from experiments.training import Batch


def balanced(word: str, kind: str) -> bool:
    """Brackets of one kind, the others crossed out, cancel in pairs."""
    word = "".join(symbol for symbol in word if symbol in kind)
    while kind in word:
        word = word.replace(kind, "")
    return not word


MEMBER = {
    "parity": lambda w: re.fullmatch(r"(0*10*1)*0*", w),
    "(aa)*": lambda w: re.fullmatch(r"(aa)*", w),
    "(abab)*": lambda w: re.fullmatch(r"(abab)*", w),
    "a^n b^n": lambda w: re.fullmatch(r"a*b*", w) and w.count("a") == w.count("b"),
    "a^n b^n c^n": lambda w: re.fullmatch(r"a*b*c*", w) and w.count("a") == w.count("b") == w.count("c"),
    "Shuffle-2": lambda w: balanced(w, "()") and balanced(w, "[]"),
}
UNIQUE = {
    "(aa)*": lambda n: "aa" * n,
    "(abab)*": lambda n: "abab" * n,
    "a^n b^n": lambda n: "a" * n + "b" * n,
    "a^n b^n c^n": lambda n: "a" * n + "b" * n + "c" * n,
}
by_name = pytest.mark.parametrize("name", LANGUAGES)


@functools.cache
def words(name: str) -> frozenset[str]:
    """Those of up to 100 symbols where there is one of each length, else of up to 8, by trying all strings."""
    if name in UNIQUE:
        return frozenset(word for word in map(UNIQUE[name], range(1, 51)) if len(word) <= 100)
    strings = ("".join(s) for n in range(1, 9) for s in itertools.product(LANGUAGES[name].symbols, repeat=n))
    return frozenset(string for string in strings if MEMBER[name](string))


def text(name: str, tokens: np.ndarray, length: int) -> str:
    return "".join(LANGUAGES[name].symbols[token] for token in tokens[:length])


@by_name
def test_what_may_follow_is_what_some_word_continues_with(name):
    """Prefixes so short that whatever completes them is among the words."""
    language, known = LANGUAGES[name], words(name)
    longest = 24 if name in UNIQUE else 3
    begun = {word[:n] for word in known for n in range(len(word) + 1)}
    for prefix in sorted(p for p in begun if 0 < len(p) <= longest):
        tokens = np.array([[language.symbols.index(symbol) for symbol in prefix]])
        follows = [prefix + symbol in begun for symbol in language.symbols]
        assert language.allowed(tokens)[0, -1].tolist() == [*follows, prefix in known], prefix


@by_name
def test_samples_are_words_of_the_wanted_length(name):
    language = LANGUAGES[name]
    lengths = np.repeat(language.lengths(2, 100), 3)
    tokens = language.sample(np.random.default_rng(0), lengths, 100)
    for row, length in zip(tokens, lengths, strict=True):
        assert MEMBER[name](text(name, row, length)), text(name, row, length)


@by_name
def test_every_short_word_is_drawn(name):
    """And the end of a batch of equal strings is where the end is allowed."""
    language, longest = LANGUAGES[name], 6
    short = {word for word in words(name) if 2 <= len(word) <= longest}
    lengths = np.random.default_rng(1).choice(language.lengths(2, longest), 2000)
    tokens = language.sample(np.random.default_rng(2), lengths, longest)
    assert {text(name, row, n) for row, n in zip(tokens, lengths, strict=True)} == short
    assert language.allowed(tokens)[np.arange(2000), lengths - 1, -1].all()


@by_name
def test_streams_follow_the_seed_and_do_not_repeat(name):
    first, again, other = (stream(LANGUAGES[name], seed, 8) for seed in (0, 0, 1))
    batches = [next(first) for _ in range(4)]
    assert all((a.tokens == b.tokens).all() and (a.weights == b.weights).all() for a, b in zip(batches, again))  # noqa: B905
    assert not (next(other).weights == batches[0].weights).all()
    lengths = [tuple(batch.weights.sum(axis=1)) for batch in batches]
    assert len(set(lengths)) == len(lengths)
    low, high = BINS["bin0"]
    assert low <= min(map(min, lengths)) and max(map(max, lengths)) <= high


@by_name
def test_held_out_strings_have_the_lengths_of_their_bin(name):
    """All lengths of a bin where there is one string per length, each once."""
    for bin_name, (low, high) in BINS.items():
        batch = held_out(LANGUAGES[name], bin_name, 300)
        lengths = batch.weights.sum(axis=1).astype(int)
        assert low <= lengths.min() and lengths.max() <= high
        if name in UNIQUE:
            assert lengths.tolist() == sorted(len(word) for word in words(name) if low <= len(word) <= high)


def test_a_string_counts_only_when_every_position_is_right():
    targets = np.zeros((4, 3, 2), np.float32)
    targets[..., 0] = 1
    logits = np.where(targets > 0, 2.0, -2.0)
    logits[1, 1, 1] = 0.5  # one symbol too many
    logits[2, 0, 0] = -0.5  # one too few
    logits[3, 2] = [-1, 1]  # wrong, but after the end
    weights = np.ones((4, 3), np.float32)
    weights[3, 2] = 0
    right = right_strings(jnp.asarray(logits), Batch(np.zeros((4, 3), np.int32), targets, weights))
    assert np.asarray(right).tolist() == [True, False, False, True]
