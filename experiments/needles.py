"""Needles in a haystack, as bytes: codes of names inside filler, then a question about some of them.

The six constructions of RULER (Hsieh et al. 2024, arXiv:2404.06654) with sentences of our own. A document is

    filler ... The pass-code of cedar is 4071952. ... filler
    What is the pass-code of cedar? 4071952

of exactly the length asked for, answer included. Values of several queries come in the order of the question, several
values of one name in the order of the text.
"""

import re
from typing import Literal, NamedTuple

import numpy as np

from hope_jax.training.errors import UserError

NOISE = b"Rain fell on the hills. The river ran slowly. Birds sang in the trees. Nothing else happened here. "
WORDS = (
    "amber anchor apple arrow basil beacon birch bridge candle canyon carbon cedar cobalt copper coral cotton "
    "dune ember falcon feather fern flint forest garnet ginger glacier harbor hazel honey island ivory jasmine "
    "juniper kettle lagoon lantern lemon lily linen maple marble meadow mint nickel oak olive onyx opal orchid "
    "otter pearl pebble pepper pine quartz raven reed ribbon saffron sage silver slate thistle tulip velvet willow"
)
NAMES = WORDS.split()
LEAST_FILLER = 8  # bytes


class Task(NamedTuple):
    """What is hidden and what is asked."""

    filler: Literal["noise", "essay"]
    value: Literal["number", "uuid"] = "number"
    names: int = 1  # in the haystack
    values: int = 1  # of each name
    queries: int = 1  # names in the question


TASKS = {
    "S-NIAH-1": Task("noise"),
    "S-NIAH-2": Task("essay"),
    "S-NIAH-3": Task("essay", "uuid"),
    "MK-NIAH-1": Task("essay", names=4),
    "MQ-NIAH": Task("essay", names=4, queries=4),
    "MV-NIAH": Task("essay", values=4),
}


class Document(NamedTuple):
    """One example."""

    prompt: bytes
    values: tuple[bytes, ...]  # the answer: these with a space between them

    @property
    def answer(self) -> bytes:
        """What has to be said after the prompt."""
        return b" ".join(self.values)


def document(task: Task, rng: np.random.Generator, essay: np.ndarray, length: int, digits: int) -> Document:
    """One example of `length` bytes.

    Args:
      task: the construction.
      rng: decides everything that is random.
      essay: [bytes] uint8, where essay filler is cut from.
      length: bytes of prompt and answer.
      digits: of a number.

    Raises:
      UserError: `length` leaves no room for filler, or the essay is shorter than the filler.
    """
    names = [NAMES[i] for i in rng.choice(len(NAMES), task.names, replace=False)]
    needles = [(name, _value(task, rng, digits)) for name in names for _ in range(task.values)]
    needles = [needles[i] for i in rng.permutation(len(needles))]
    asked = [names[i] for i in rng.permutation(task.names)[: task.queries]]
    values = tuple(value for name in asked for owner, value in needles if owner == name)
    question = b"\n" + _question(asked, len(values)).encode() + b" "
    hidden = [b"The pass-code of %s is %s. " % (name.encode(), value) for name, value in needles]
    room = length - len(question) - len(b" ".join(values)) - sum(map(len, hidden))
    if room < LEAST_FILLER:
        raise UserError(f"length {length} leaves {room} bytes of filler around the needles; raise --length")
    stop = b". " if task.filler == "noise" else b" "
    return Document(_hide(hidden, _filler(task, rng, essay, room), stop, rng) + question, values)


def _value(task: Task, rng: np.random.Generator, digits: int) -> bytes:
    if task.value == "number":
        return b"%d" % rng.integers(10 ** (digits - 1), 10**digits)
    digits_16 = rng.bytes(16).hex()
    return "-".join(digits_16[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32))).encode()


def _question(names: list[str], values: int) -> str:
    listed = ", ".join(names)
    return f"What is the pass-code of {listed}?" if values == 1 else f"What are the pass-codes of {listed}?"


def _filler(task: Task, rng: np.random.Generator, essay: np.ndarray, room: int) -> bytes:
    if task.filler == "noise":
        return (NOISE * (room // len(NOISE) + 1))[:room]
    if len(essay) < room:
        raise UserError(f"the text has {len(essay)} bytes, a haystack needs {room} of it; give a longer --data")
    begin = rng.integers(len(essay) - room + 1)
    return essay[begin : begin + room].tobytes()


def _hide(needles: list[bytes], filler: bytes, stop: bytes, rng: np.random.Generator) -> bytes:
    """The needles in their order at random places, each after a `stop` or at the start."""
    stops = [found.end() for found in re.finditer(re.escape(stop), filler)]
    places = np.sort(rng.choice([0, *stops], len(needles)))
    parts = [filler[a:b] for a, b in zip([0, *places], [*places, None], strict=True)]
    return parts[0] + b"".join(needle + part for needle, part in zip(needles, parts[1:], strict=True))
