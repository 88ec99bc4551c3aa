"""Where a stream stands on the host: what waits to be a whole chunk, and how far whole chunks have come."""

from typing import NamedTuple

import numpy as np

from hope_jax.online.stream import Held, StreamState

NOTHING = Held(np.zeros(0, np.int32), np.zeros(0, bool))


class Place(NamedTuple):
    """Of one row; nothing of it is ever written into."""

    held: Held
    seen: np.ndarray  # [V] bool, tokens that may be generated
    read: int = 0  # tokens in whole chunks
    context: int = 0  # of them, those since the context began

    @property
    def tokens(self) -> int:
        """Length of the stream so far."""
        return self.read + len(self.held.tokens)

    @property
    def goes_on(self) -> bool:
        """Whether there is a token before the next one in its context: the last one read is always held."""
        return len(self.held.tokens) > 0

    def append(self, tokens: np.ndarray, teaches: np.ndarray) -> "Place":
        """With tokens [n] that come next and whether each may teach; they may be generated from now on."""
        seen = self.seen
        if not seen[tokens].all():
            seen = seen | np.isin(np.arange(len(seen)), tokens)
        held = Held(*map(np.concatenate, zip(self.held, (tokens.astype(np.int32), teaches), strict=True)))
        return self._replace(held=held, seen=seen)


class Snapshot(NamedTuple):
    """Where a session stands; nothing of it ever changes."""

    state: StreamState  # after whole chunks, [1, ...]
    place: Place


class Pace(NamedTuple):
    """How many chunks go through the program at once, and how long a context may be."""

    size: int  # C, tokens of a chunk
    chunks: int  # N, chunks of a call
    longest: int | None  # tokens of a context; None: any number

    @property
    def block(self) -> int:
        """Tokens of a call."""
        return self.chunks * self.size

    def room(self, context: int) -> int:
        """Tokens of the next call for which a context of this length still has room."""
        return self.block if self.longest is None else self.longest - context

    def whole(self, place: Place) -> int:
        """Chunks for the next call: those that are whole, their next token included, as far as there is room."""
        whole = max(0, len(place.held.tokens) - 1) // self.size
        return min(whole, self.chunks, self.room(place.context) // self.size)

    def after(self, place: Place, count: int) -> Place:
        """The place after so many chunks; a context of 0 is one that was full and begins again."""
        done = count * self.size
        context = place.context + done
        context = context if self.room(context) >= self.size else 0
        return place._replace(held=Held(*(leaf[done:] for leaf in place.held)), read=place.read + done, context=context)

    def check(self, place: Place) -> None:
        """Refuses a place that no stream can be in.

        Raises:
          ValueError: its parts contradict each other.
        """
        held, vocab_size = place.held, len(place.seen)
        if held.tokens.shape != held.teaches.shape or len(held.tokens) > self.size:
            raise ValueError(f"{len(held.tokens)} tokens are held, with {len(held.teaches)} flags")
        if ((held.tokens < 0) | (held.tokens >= vocab_size)).any():
            raise ValueError(f"held tokens are not all in 0 to {vocab_size - 1}")
        if place.context > place.read or any(count % self.size for count in (place.read, place.context)):
            raise ValueError(f"{place.read} tokens read, {place.context} in the context, in chunks of {self.size}")
        if self.room(place.context) < self.size:
            raise ValueError(f"a context of {place.context} tokens leaves no room in {self.longest}")
