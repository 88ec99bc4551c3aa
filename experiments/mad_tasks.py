"""The five MAD tasks as generators of finite sets of examples (Poli et al. 2024, arXiv:2403.17844).

Each function returns a `Batch` of `count` examples. The definitions are those of the benchmark, in multi-query form
for the recall tasks. Training on the recall tasks predicts every next token, testing scores the values of keys that
were shown before (`training`). Tokens: keys, then values, then the special token of the task, if any.

Where the benchmark's description leaves room: a probed pair of fuzzy recall is always shown before it is asked
for, and its place among the pairs is even; the key-to-value map of memorisation is drawn from a seed of its own.
"""

import numpy as np

from experiments.training import Batch

MOTIF = 3  # longest key or value of fuzzy recall, in tokens
MAP_SEED = 12345  # of the map that memorisation learns


def compression(rng: np.random.Generator, count: int, *, vocab: int, length: int) -> Batch:
    """Random tokens, then the compression token: from its position alone all tokens are to be told again.

    The targets are the inputs. What reads them out position by position is an `autoencoder`.
    """
    tokens_BT = rng.integers(vocab - 1, size=(count, length))
    tokens_BT[:, -1] = vocab - 1
    return _batch(tokens_BT, tokens_BT, np.ones((count, length)))


def in_context_recall(rng: np.random.Generator, count: int, *, vocab: int, length: int, training: bool) -> Batch:
    """Pairs of a key and the value it has in this sequence; the last pair's key was shown before."""
    keys, pairs = vocab // 2, length // 2
    value_BK = rng.integers(keys, vocab, size=(count, keys))
    key_BP = rng.integers(keys, size=(count, pairs))
    shown_BPK = (key_BP[:, :-1, None] == np.arange(keys)).cumsum(axis=1) > 0
    # The last key: any of those shown, evenly.
    key_BP[:, -1] = np.where(shown_BPK[:, -1], rng.random((count, keys)), -1).argmax(axis=1)
    tokens_BT = np.stack([key_BP, np.take_along_axis(value_BK, key_BP, axis=1)], axis=-1).reshape(count, -1)
    repeated_BP = np.zeros(key_BP.shape, bool)
    repeated_BP[:, 1:] = np.take_along_axis(shown_BPK, key_BP[:, 1:, None], axis=2)[..., 0]
    scored_BT = np.stack([np.zeros_like(repeated_BP), repeated_BP], axis=-1).reshape(count, -1)
    return _next_token(tokens_BT, scored_BT, training)


def fuzzy_recall(rng: np.random.Generator, count: int, *, vocab: int, length: int, training: bool) -> Batch:
    """As `in_context_recall`, with keys and values of one to three different tokens each.

    In tests every key has three tokens. Sequences are padded on the left with the last token.
    """
    rows = [_fuzzy_row(rng, vocab, length + 1, training) for _ in range(count)]
    tokens_BT, scored_BT = (np.stack(column) for column in zip(*rows, strict=True))
    return _next_token(tokens_BT, scored_BT, training)


def _fuzzy_row(rng: np.random.Generator, vocab: int, length: int, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of one sequence and which of them are scored."""
    keys, last = (vocab - 1) // 2, vocab - 1

    def motif(low: int, high: int, shortest: int) -> tuple[int, ...]:
        size = rng.integers(shortest, MOTIF + 1)
        return tuple(int(token) for token in low + rng.permutation(high - low)[:size])

    def key() -> tuple[int, ...]:
        return motif(0, keys, 1 if training else MOTIF)

    value_of: dict[tuple[int, ...], tuple[int, ...]] = {}
    probe = key()
    value_of[probe] = motif(keys, last, 1)
    room = length - len(probe) - len(value_of[probe])
    shown: list[tuple[int, ...]] = [probe]
    used = len(probe) + len(value_of[probe])
    while used + 2 * MOTIF <= room:
        shown.append(key())
        value_of.setdefault(shown[-1], motif(keys, last, 1))
        used += len(shown[-1]) + len(value_of[shown[-1]])
    place = rng.integers(len(shown))
    shown[0], shown[place] = shown[place], shown[0]
    return _replay([*shown, probe], value_of, length, last)


def _replay(
    shown: list[tuple[int, ...]], value_of: dict[tuple[int, ...], tuple[int, ...]], length: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs one after the other, filled up on the left; values of repeated keys are scored."""
    tokens: list[int] = []
    scored: list[bool] = []
    seen: set[tuple[int, ...]] = set()
    for key in shown:
        tokens += [*key, *value_of[key]]
        scored += [False] * len(key) + [key in seen] * len(value_of[key])
        seen.add(key)
    missing = length - len(tokens)
    return np.array([pad] * missing + tokens), np.array([False] * missing + scored)


def shortest(task: str, copies: int) -> int:
    """Tokens of the shortest sequence in which the task can be posed."""
    return {"selective_copying": 2 * copies + 1, "fuzzy_recall": 4 * MOTIF, "compression": 1}.get(task, 4)


def selective_copying(rng: np.random.Generator, count: int, *, vocab: int, length: int, copies: int) -> Batch:
    """`copies` tokens among blanks, then the copy token, then blanks in whose place the tokens are told in order.

    Each blank of the first part falls before one of the tokens, evenly.
    """
    blank, copy = vocab - 2, vocab - 1
    tokens_BN = rng.integers(vocab - 2, size=(count, copies))
    blanks = length - 2 * copies - 1
    before_BN = rng.multinomial(blanks, np.full(copies, 1 / copies), size=count)
    place_BN = before_BN.cumsum(axis=1) + np.arange(copies)
    inputs_BT = np.full((count, length), blank)
    np.put_along_axis(inputs_BT, place_BN, tokens_BN, axis=1)
    inputs_BT[:, length - copies - 1] = copy
    targets_BT = np.zeros((count, length), int)
    targets_BT[:, length - copies :] = tokens_BN
    return _batch(inputs_BT, targets_BT, np.broadcast_to(np.arange(length) >= length - copies, (count, length)))


def memorisation(rng: np.random.Generator, count: int, *, vocab: int, length: int) -> Batch:
    """Keys, each followed by the insert token, at which its value is predicted; the map is the same everywhere."""
    value_K = memorised_values(vocab)
    key_BP = rng.integers(value_K.size, size=(count, length // 2))
    insert_BP = np.full_like(key_BP, vocab - 1)
    tokens_BT = np.stack([key_BP, insert_BP], axis=-1).reshape(count, -1)
    targets_BT = np.stack([np.zeros_like(key_BP), value_K[key_BP]], axis=-1).reshape(count, -1)
    return _batch(tokens_BT, targets_BT, np.broadcast_to(np.arange(targets_BT.shape[1]) % 2, targets_BT.shape))


def memorised_values(vocab: int) -> np.ndarray:
    """The value of each key of `memorisation`: no two keys share one."""
    keys = (vocab - 1) // 2
    return keys + np.random.default_rng(MAP_SEED).permutation(vocab - 1 - keys)[:keys]


def _next_token(tokens_BT: np.ndarray, scored_BT: np.ndarray, training: bool) -> Batch:
    """Predict each token from those before it: all of them in training, the scored ones in tests."""
    weights_BT = np.ones(scored_BT.shape) if training else scored_BT
    return _batch(tokens_BT[:, :-1], tokens_BT[:, 1:], weights_BT[:, 1:])


def _batch(tokens_BT: np.ndarray, targets_BT: np.ndarray, weights_BT: np.ndarray) -> Batch:
    return Batch(tokens_BT.astype(np.int32), targets_BT.astype(np.int32), weights_BT.astype(np.float32))
