"""A session: one stream that a model reads and learns from, and answers from."""

import copy
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.models import ModelConfig
from hope_jax.online.answer import Answer, check_options, choices
from hope_jax.online.fingerprint import fingerprint
from hope_jax.online.gates import Gate, always
from hope_jax.online.place import NOTHING, Pace, Place, Snapshot
from hope_jax.online.report import Report, join, summarize
from hope_jax.online.stream import ChunkReport, StreamState, build_stream, cut
from hope_jax.online.tokens import Text, tokens_of
from hope_jax.training.errors import UserError
from hope_jax.training.vocabulary import BYTES, Vocabulary, load_vocabulary

ONE = np.ones(1, bool)
FAST, CONTEXT, ALL = "fast", "context", "all"  # what can be forgotten, beside the names of levels


class Session:
    """A stream of text that a model learns from while it reads.

    Whole chunks of the fastest level are read and written by one compiled program; what is not yet a chunk waits. So
    the state depends on the stream's tokens alone, to the bit, not on how it was cut into calls, saved or forked. (Text
    for a tokenizer is cut where tokens end: pieces are tokenised apart.)

    Args:
      model: the config of the model. Its fast levels (`cms_chunks`, `mlp_chunks`) learn, by steps of `cms_eta`;
        without any the session still carries the context, the memories inside the layers.
      params: its parameters; they are shared and never changed.
      gate: which chunks are written (`hope_jax.online.gates`).
      max_moved: how far a level may go from its start weights, in units of their norm; None: anywhere.
      measure_after: read each written chunk again for the loss after it; a third more work. It also finds steps after
        which the loss is not finite while they can still be undone.
      vocabulary: from text to tokens; None: bytes.
      seen: tokens that training has seen: no others are generated before they were observed. None: all.
      run: where the model comes from, for the session's file.

    Example:
      >>> import jax
      >>> from hope_jax.models import ModelConfig, build_lm
      >>> levels = {"cms_hidden": (32, 32), "cms_chunks": (16, 64)}
      >>> config = ModelConfig(name="hope_attention", dim=16, layers=1, **levels)
      >>> session = Session(config, build_lm(config).init(jax.random.key(0)))
      >>> report = session.observe("the same words again and again; " * 4)
      >>> [(level.chunk_size, level.updates) for level in report.levels], report.held
      ([(16, 7), (64, 1)], 16)
      >>> fork = session.fork()
      >>> _ = fork.observe("something else")
      >>> session.digest() == fork.digest()
      False

    Reference: paper sections 7 and 8; spec 6.2 to 6.4, 11.1, 11.6.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Any,
        *,
        gate: Gate | None = None,
        max_moved: float | None = None,
        measure_after: bool = True,
        vocabulary: Vocabulary | None = None,
        seen: Sequence[int] | None = None,
        run: str = "",
    ):
        if max_moved is not None and not max_moved > 0:
            raise UserError(f"max_moved is a distance in norms of the start weights, above 0, or None; got {max_moved}")
        self.model = dataclasses.replace(model, bptt_chunks=())  # nothing is differentiated through a stream
        self.params, self.run = params, run
        self.gate, self.max_moved = gate or always(), max_moved
        self.file: tuple[Path, str] | None = None  # where it was read from or last saved to, and that file's digest
        self.vocabulary = vocabulary or load_vocabulary(BYTES)
        self.stream = build_stream(self.model, self.gate, max_moved, measure_after)
        self.pace = Pace(self.stream.size, self.stream.chunks, model.max_length if model.architecture.cache else None)
        if self.pace.room(0) < self.chunk_size:
            raise UserError(
                f"the attention cache holds max_length={model.max_length} tokens, fewer than a chunk of "
                f"{self.chunk_size}; raise max_length or shorten the chunks"
            )
        seen_V = np.isin(np.arange(model.vocab_size), seen) if seen is not None else np.ones(model.vocab_size, bool)
        self._now = Snapshot(self.fresh_state(), Place(NOTHING, seen_V))
        self._ahead: tuple[Any, jax.Array, int] | None = None  # carry and logits after so many of the held tokens

    @property
    def tokens(self) -> int:
        """Length of the stream so far."""
        return self._now.place.tokens

    def observe(self, text: Text, *, update_allowed: bool = True) -> Report:
        """Reads what comes next in the stream, and learns from it.

        Args:
          text: text, bytes or tokens. Bytes that are not UTF-8 are bytes like any other to a byte model. The report
            has a loss for every token: read what is very long in pieces.
          update_allowed: False: no level is taught by these tokens, for text that is not trusted. The context
            (attention cache, memories inside the layers) reads them all the same; `score` leaves no trace at all.

        Raises:
          UserError: tokens that the model does not have, or text that its tokenizer cannot read.
        """
        tokens = self.encode(text)
        reports, new_contexts = [], 0
        for begin in range(0, len(tokens), self.pace.block):
            block = tokens[begin : begin + self.pace.block]
            more, restarts = self._extend(block, np.full(len(block), update_allowed))
            reports, new_contexts = [*reports, *more], new_contexts + restarts
        return self.report(reports, len(tokens), new_contexts)

    def score(self, text: Text) -> float:
        """Nats per token of text as what comes next; the session stays as it is, to the bit.

        The first token of a stream, or of a new context, has nothing before it and does not count.

        Raises:
          UserError: as `observe`, and text without a token to predict.
        """
        tokens = self.encode(text)
        fork, first = self.fork(), max(self.tokens, self._now.place.read + 1)
        if self.tokens + len(tokens) <= first:
            raise UserError(
                f"nothing to score: {len(tokens)} tokens, and none before them in this context; give two or more"
            )
        predicted, losses = self._now.place.read + 1, []  # the place in the stream of the first loss
        for begin in range(0, len(tokens), self.pace.block):
            block = tokens[begin : begin + self.pace.block]
            losses += [one.losses.ravel() for one in fork._extend(block, np.zeros(len(block), bool))[0]]
        losses.append(fork._held_losses())
        return float(np.concatenate(losses)[first - predicted :].mean())

    def generate(self, prompt: str = "", **options: Any) -> str:
        """The answer to a prompt; for its options and what it teaches see `answer`."""
        return "".join(self.answer(prompt, **options))

    def answer(
        self,
        prompt: str = "",
        *,
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int = 0,
        seed: int = 0,
        learn: bool = True,
        learn_on_generated: bool = False,
        until: str = "",
    ) -> Iterator[str]:
        """Continues the stream with a prompt and what the model says then, in pieces of text as they are made.

        It ends early where the context is forgotten meanwhile and nothing was read since.

        Args:
          prompt: what comes next in the stream.
          max_tokens: length of the answer.
          temperature: 0 takes the likeliest token.
          top_k: only the k likeliest tokens; 0: all.
          seed: of the sampling, below 2**32.
          learn: False: prompt and answer leave no trace in the session.
          learn_on_generated: the answer teaches the levels too (spec 6.3: by default it is only read).
          until: the answer ends before this text, for instance a line end; the stream has read it.

        Raises:
          UserError: a value out of range, or as `observe`.
        """
        check_options(max_tokens, temperature, top_k, seed)
        session = self if learn else self.fork()
        tokens = self.prompt_tokens(prompt, self._now.place)
        session._extend(tokens, np.full(len(tokens), learn))
        values = session._tokens_of_answer(max_tokens, temperature, top_k, seed, learn and learn_on_generated)
        return Answer(self.vocabulary, until, tokens.tolist()).pieces(values)

    def _tokens_of_answer(
        self, max_tokens: int, temperature: float, top_k: int, seed: int, teaches: bool
    ) -> Iterator[int]:
        choose, seed_1 = choices(temperature == 0, min(top_k, self.model.vocab_size)), np.array([seed])
        for i in range(max_tokens):
            if not self._now.place.goes_on:
                return
            seen_1V = self._now.place.seen[None]
            token = int(choose(temperature, self._look()[None], seed_1, np.int32(i), seen_1V)[0])
            if token == self.vocabulary.end:
                return
            self._extend(np.array([token], np.int32), np.array([teaches]))
            yield token

    def fork(self) -> "Session":
        """A session that goes on from here on its own; nothing is copied until it changes."""
        return copy.copy(self)  # arrays are replaced, never written into

    def forget(self, level: str | int = FAST) -> None:
        """Sets a level back to its start weights, its pending errors with it; its clock goes on.

        Args:
          level: "fast" (the fastest), the name or number of a level, "context" (memories and caches inside the
            layers, and the tokens that wait for a whole chunk) or "all" (levels, context and gate).

        Raises:
          UserError: there is no such level.
        """
        if level in (CONTEXT, ALL):
            chosen = range(len(self.clocks)) if level == ALL else ()
        else:
            chosen = (self.level_index(level),)
        state, place = self._now
        for i in chosen:
            state = self.stream.forget(self.params, state, ONE, i)
        if level in (CONTEXT, ALL):
            state, place = self.stream.new_context(self.params, state, ONE), place._replace(context=0, held=NOTHING)
        if level == ALL:
            state = state._replace(gate=self.fresh_state().gate)
        self._now, self._ahead = Snapshot(state, place), None

    def snapshot(self) -> Snapshot:
        """Where the session stands; nothing is copied, and nothing of it ever changes."""
        self._extend(*NOTHING)  # whole chunks that an interrupt left
        return self._now

    def resume(self, snapshot: Snapshot) -> None:
        """Goes on from where a session of the same model and options stood; what this one read is gone.

        Raises:
          ValueError: its parts contradict each other.
        """
        self.pace.check(snapshot.place)
        self._now, self._ahead = snapshot, None

    def fresh_state(self) -> StreamState:
        """The state of a stream that has read nothing."""
        return self.stream.init(self.params, 1)

    def save(self, path: Path | str, *, overwrite: bool = False) -> None:
        """Writes the session to one file, from which `hope_jax.online.open` goes on to the bit.

        Raises:
          UserError: another session is in the file and `overwrite` is False, or it cannot be written; what was
            there before is untouched.
        """
        from hope_jax.online.keeping import content_of
        from hope_jax.online.session_file import write_session

        path = Path(path).resolve()
        known = self.file[1] if self.file and self.file[0] == path else None
        self.file = path, write_session(path, content_of(self), known=known, overwrite=overwrite)

    def level_index(self, level: str | int) -> int:
        """The number of a level by what it may be called: "fast" (the fastest), "level_0" or 0.

        Raises:
          UserError: there is no such level.
        """
        depth = len(self.clocks)
        names = {FAST: 0} if depth else {}
        names |= {f"level_{i}": i for i in range(depth)} | {str(i): i for i in range(depth)}
        if str(level) not in names:
            known = ", ".join([*names, CONTEXT, ALL])
            raise UserError(f"nothing is called {level!r} in this session; it has {known}")
        return names[str(level)]

    def weights(self) -> tuple[Any, ...]:
        """What each level holds, fastest first: the matrices that read, [layers, ...]."""
        return jax.tree.map(lambda leaf: leaf[0], self.stream.weights(self._now.state.nest.levels))

    def of_params(self, params: Any) -> "Session":
        """A session that has read nothing, of other parameters of the same model, with the same options."""
        made = copy.copy(self)
        made.__dict__.pop("base", None)
        made.params, made.file, made.run, made._ahead = params, None, "", None
        made._now = Snapshot(made.fresh_state(), Place(NOTHING, self._now.place.seen))
        return made

    def diff(self, other: "Session | None" = None) -> dict[str, float]:
        """How far the levels of two sessions of one model are apart, over the norm of their start weights.

        Args:
          other: None: one that has read nothing.

        Raises:
          UserError: the sessions are of different models.
        """
        fresh = self.of_params(self.params)
        other = other or fresh
        if self.model != other.model or (self.params is not other.params and self.base != other.base):
            raise UserError("these are sessions of two different models; there is nothing to compare")
        start, apart = fresh.weights(), jax.tree.map(jnp.subtract, self.weights(), other.weights())
        return {f"level_{i}": _norm(a) / _norm(s) for i, (a, s) in enumerate(zip(apart, start, strict=True))}

    def digest(self) -> str:
        """Sixty-four hexadecimal digits that are equal where state and held tokens are, to the bit."""
        total, (state, place) = hashlib.sha256(), self._now
        for leaf in jax.tree.leaves((state, place.held, place.read, place.context)):
            total.update(np.asarray(leaf).tobytes())
        return total.hexdigest()

    def report(self, chunks: Sequence[ChunkReport], tokens: int, new_contexts: int) -> Report:
        """One report of several calls in a row, the last of which left the session as it is.

        Args:
          chunks: of each call.
          tokens: of all of them.
          new_contexts: how often the context began again.
        """
        state, place = self.snapshot()
        return summarize(
            join(chunks, self.chunk_size, len(self.clocks)),
            tokens=tokens,
            held=len(place.held.tokens),
            written=int(state.nest.phase[0]) * self.chunk_size,
            clocks=self.clocks,
            new_contexts=new_contexts,
        )

    @functools.cached_property
    def base(self) -> str:
        """The fingerprint of the parameters that the session started from."""
        return fingerprint(self.params)

    @property
    def chunk_size(self) -> int:
        """Tokens that are read together: those of the fastest level's chunk."""
        return self.pace.size

    @property
    def clocks(self) -> tuple[int, ...]:
        """Chunk sizes in tokens of the levels that learn, fastest first."""
        return self.model.fast_chunks if self.model.adapts else ()

    def encode(self, text: Text) -> np.ndarray:
        """The tokens of a text.

        Raises:
          UserError: tokens that the model does not have, or text that its tokenizer cannot read.
        """
        return tokens_of(text, self.vocabulary, self.model.vocab_size)

    def prompt_tokens(self, prompt: str, place: Place) -> np.ndarray:
        """Its tokens as what comes next at a place; a line end where a stream or context would begin with nothing."""
        tokens = self.encode(prompt)
        return tokens if len(tokens) or place.goes_on else self.encode("\n")

    def _extend(self, tokens: np.ndarray, teaches: np.ndarray) -> tuple[list[ChunkReport], int]:
        """Appends to the stream; chunks that are complete are read and written."""
        state, place = self._now
        place, reports, new_contexts = place.append(tokens, teaches), [], 0
        while count := self.pace.whole(place):
            pieces = cut(place.held, count, self.pace.size, self.pace.chunks)
            state, report = self.stream.advance(self.params, state, pieces)
            reports.append(jax.tree.map(lambda leaf, count=count: np.asarray(leaf)[0, :count], report))
            place = self.pace.after(place, count)
            if not place.context:
                state, new_contexts = self.stream.new_context(self.params, state, ONE), new_contexts + 1
            # Together: an interrupt between two calls leaves a session that goes on.
            self._now, self._ahead = Snapshot(state, place), None
        self._now = Snapshot(state, place)
        return reports, new_contexts

    def _look(self) -> jax.Array:
        """Logits [V] of what comes next."""
        state, place = self._now
        carry, logits_V, count = self._ahead or (state.nest.carry, jnp.zeros(self.model.vocab_size), 0)
        for token in place.held.tokens[count:]:
            carry, logits_V = self._step(carry, token)
        self._ahead = carry, logits_V, len(place.held.tokens)
        return logits_V

    def _step(self, carry: Any, token: int) -> tuple[Any, jax.Array]:
        """Context and logits [V] after one more token."""
        token_B = np.array([token], np.int32)
        carry, logits_BV = self.stream.step(self.params, self._now.state.nest.levels, carry, token_B)
        return carry, logits_BV[0]

    def _held_losses(self) -> np.ndarray:
        """Nats of each held token but the first."""
        carry, losses = self._now.state.nest.carry, []
        for token, target in itertools.pairwise(self._now.place.held.tokens):
            carry, logits_V = self._step(carry, token)
            losses.append(-jax.nn.log_softmax(logits_V)[target])
        return np.asarray(losses, np.float32)


def _norm(tree: Any) -> float:
    return float(jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree))))
