"""Six formal languages: strings of a given length, and which symbols may follow each of their prefixes.

Tokens are indices into `symbols`. `allowed` has one more column than there are symbols, the last for the end of the
string: after a prefix w, column x is 1 if some string of the language starts with w x, and the last column is 1 if
w itself is in the language (Bhattamishra et al. 2020, arXiv:2009.11264). A string is never empty. Lengths are drawn
evenly from those the language has; strings of one length are drawn evenly for parity and by a random walk over
the moves that can still be completed for Shuffle-2. The other languages have one string per length.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Language(NamedTuple):
    """One language."""

    symbols: str
    period: int  # its strings have lengths that are multiples of this
    sample: Callable[[np.random.Generator, np.ndarray, int], np.ndarray]  # (rng, lengths [B], T) -> tokens [B, T]
    allowed: Callable[[np.ndarray], np.ndarray]  # tokens [B, T] -> bool [B, T, symbols + 1]
    unique: bool  # one string per length

    def lengths(self, low: int, high: int) -> np.ndarray:
        """The lengths of its strings from `low` to `high`."""
        lengths = np.arange(low, high + 1)
        return lengths[lengths % self.period == 0]


def _parity(rng: np.random.Generator, lengths_B: np.ndarray, width: int) -> np.ndarray:
    """Bits of which the last one makes the number of ones even."""
    bits_BT = rng.integers(2, size=(lengths_B.size, width))
    bits_BT *= np.arange(width) < lengths_B[:, None]
    rows = np.arange(lengths_B.size)
    bits_BT[rows, lengths_B - 1] ^= bits_BT.sum(axis=1) % 2
    return bits_BT


def _parity_allowed(tokens_BT: np.ndarray) -> np.ndarray:
    even_BT = tokens_BT.cumsum(axis=1) % 2 == 0
    always_BT = np.ones_like(even_BT)
    return np.stack([always_BT, always_BT, even_BT], axis=-1)


def _cycle(word: np.ndarray) -> Callable[[np.random.Generator, np.ndarray, int], np.ndarray]:
    """The word again and again, whatever the length."""

    def sample(rng: np.random.Generator, lengths_B: np.ndarray, width: int) -> np.ndarray:
        del rng
        return np.broadcast_to(np.resize(word, width), (lengths_B.size, width)).copy()

    return sample


def _cycle_allowed(word: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    def allowed(tokens_BT: np.ndarray) -> np.ndarray:
        read_T = np.arange(1, tokens_BT.shape[1] + 1)
        following_T = word[read_T % word.size]
        columns = [following_T == symbol for symbol in range(word.max() + 1)] + [read_T % word.size == 0]
        row = np.stack(columns, axis=-1)
        return np.broadcast_to(row, (tokens_BT.shape[0], *row.shape)).copy()

    return allowed


def _equal_blocks(count: int) -> Callable[[np.random.Generator, np.ndarray, int], np.ndarray]:
    """`count` blocks of as many equal symbols each."""

    def sample(rng: np.random.Generator, lengths_B: np.ndarray, width: int) -> np.ndarray:
        del rng
        return np.minimum(np.arange(width) // (lengths_B[:, None] // count), count - 1)

    return sample


def _equal_blocks_allowed(count: int) -> Callable[[np.ndarray], np.ndarray]:
    def allowed(tokens_BT: np.ndarray) -> np.ndarray:
        numbers = [(tokens_BT == symbol).cumsum(axis=1) for symbol in range(count)]
        columns = [numbers[1] == 0]
        for symbol in range(1, count):
            # Shorter than the first block, the block before complete, the block after not begun.
            can = (numbers[symbol] < numbers[0]) & (numbers[symbol - 1] == numbers[0])
            columns.append(can & (numbers[symbol + 1] == 0) if symbol + 1 < count else can)
        columns.append(numbers[-1] == numbers[0])
        return np.stack(columns, axis=-1)

    return allowed


def _shuffle(rng: np.random.Generator, lengths_B: np.ndarray, width: int) -> np.ndarray:
    """Two interleaved words of balanced brackets: tokens 0 opens and 1 closes one kind, 2 and 3 the other."""
    depth_BK = np.zeros((lengths_B.size, 2), int)
    tokens_BT = np.zeros((lengths_B.size, width), int)
    for t in range(width):
        left_B = lengths_B - t
        opens_B = depth_BK.sum(axis=1) + 1 <= left_B - 1
        possible_BM = np.stack([opens_B, depth_BK[:, 0] > 0, opens_B, depth_BK[:, 1] > 0], axis=1)
        move_B = np.where(possible_BM, rng.random(possible_BM.shape), -1.0).argmax(axis=1)
        tokens_BT[:, t] = np.where(left_B > 0, move_B, 0)
        change_B = np.where(left_B > 0, 1 - 2 * (move_B % 2), 0)
        depth_BK[np.arange(lengths_B.size), move_B // 2] += change_B
    return tokens_BT


def _shuffle_allowed(tokens_BT: np.ndarray) -> np.ndarray:
    first_BT, second_BT = (
        ((tokens_BT == kind).cumsum(axis=1) - (tokens_BT == kind + 1).cumsum(axis=1)) for kind in (0, 2)
    )
    always_BT = np.ones(tokens_BT.shape, bool)
    return np.stack([always_BT, first_BT > 0, always_BT, second_BT > 0, (first_BT == 0) & (second_BT == 0)], axis=-1)


_AA, _ABAB = np.array([0, 0]), np.array([0, 1, 0, 1])

LANGUAGES = {
    "parity": Language("01", 1, _parity, _parity_allowed, unique=False),
    "(aa)*": Language("a", 2, _cycle(_AA), _cycle_allowed(_AA), unique=True),
    "(abab)*": Language("ab", 4, _cycle(_ABAB), _cycle_allowed(_ABAB), unique=True),
    "a^n b^n": Language("ab", 2, _equal_blocks(2), _equal_blocks_allowed(2), unique=True),
    "a^n b^n c^n": Language("abc", 3, _equal_blocks(3), _equal_blocks_allowed(3), unique=True),
    "Shuffle-2": Language("()[]", 2, _shuffle, _shuffle_allowed, unique=False),
}
