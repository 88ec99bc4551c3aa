"""A pool: the streams of many users side by side, read, written and continued by programs that they share."""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.models import ModelConfig
from hope_jax.online.answer import Answer, check_options, choices
from hope_jax.online.place import NOTHING, Place, Snapshot
from hope_jax.online.report import Report, join, summarize
from hope_jax.online.session import FAST, Session
from hope_jax.online.slots import Ahead, programs, put, take
from hope_jax.online.stream import ChunkReport, Held, Pieces, StreamState, cut
from hope_jax.online.tokens import Text
from hope_jax.training.errors import UserError

SHOWN = 3  # users that a message names


class Owner(NamedTuple):
    """Whose a slot is."""

    user: str | None  # None: free, and as fresh as before its first user
    generation: int  # users that the slot has had, this one included


class Row(NamedTuple):
    """A user's place in the pool."""

    slot: int
    session: Session  # the options of the one that the user came with
    place: Place  # where the stream stands, with the arrays in the slot
    ahead: int  # held tokens that `Ahead` has read
    used: int  # the pool's call that last had to do with it


class Pool:
    """Sessions of many users that share one model; a call for several of them is one program over all slots.

    A user has one slot from `admit` to `evict`, and what others do there changes nothing for it: the same to the bit
    as alone in that slot of that pool (tested on CPU), and as a session up to rounding. A slot is set back to the fresh
    state when its user leaves, and whole again when the next one comes. Nothing is compiled again for other users or
    longer texts. One thread at a time.

    Memory: `slot_bytes` for every slot, taken or free, twice while a call runs; from the first answer on their
    contexts once more. The parameters are shared.

    Args:
      model: the config of the model.
      params: its parameters; they are never changed.
      slots: users at the same time.
      together: compute all slots at once, whoever takes part, as an accelerator needs it; or one after the other
        inside the program, only those that take part, which costs a CPU less. None: by the platform.
      options: of `Session`, the same for all.

    Raises:
      UserError: no slots, or as `Session`.

    Example:
      >>> import jax
      >>> from hope_jax.models import ModelConfig, build_lm
      >>> config = ModelConfig(name="hope_attention", dim=16, layers=1, cms_hidden=(32, 32), cms_chunks=(16, 64))
      >>> pool = Pool(config, build_lm(config).init(jax.random.key(0)), slots=2)
      >>> pool.admit("ann")
      >>> pool.admit("bob")
      >>> reports = pool.observe({"ann": "the same words again; " * 5, "bob": "hello"})
      >>> {user: (report.tokens, report.held) for user, report in reports.items()}
      {'ann': (110, 14), 'bob': (5, 5)}
      >>> answers = pool.generate({"ann": "and ", "bob": ", "}, max_tokens=4, seed={"ann": 1, "bob": 2})
      >>> session = pool.evict("ann")
      >>> session.tokens, pool.users, pool.owners
      (118, ('bob',), (Owner(user=None, generation=1), Owner(user='bob', generation=1)))

    Reference: spec 11.6.
    """

    def __init__(
        self, model: ModelConfig, params: Any, slots: int = 64, *, together: bool | None = None, **options: Any
    ):
        if slots < 1:
            raise UserError(f"a pool has at least one slot; got slots={slots}")
        # Arrays, tuples, dicts and sessions in here are replaced, never written into: a copy is a fork.
        self._fresh = Session(model, params, **options)
        self._stream, self._pace = self._fresh.stream, self._fresh.pace
        self._programs = programs(self._stream, jax.default_backend() != "cpu" if together is None else together)
        self._state: StreamState = self._stream.init(params, slots)
        self._ahead: Ahead | None = None
        self._rows: dict[str, Row] = {}
        self._generations = (0,) * slots
        self._calls = 0

    @property
    def users(self) -> tuple[str, ...]:
        """Who is in the pool, by slot."""
        return tuple(owner.user for owner in self.owners if owner.user is not None)

    @property
    def owners(self) -> tuple[Owner, ...]:
        """Of each slot."""
        users = {row.slot: user for user, row in self._rows.items()}
        return tuple(Owner(users.get(slot), generation) for slot, generation in enumerate(self._generations))

    @property
    def slot_bytes(self) -> int:
        """Bytes of the state of one slot: levels that learn, and context."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._state)) // len(self._generations)

    def admit(self, user: str, session: Session | None = None) -> None:
        """Gives a user a free slot.

        Args:
          user: a name that is not in the pool.
          session: to go on from, `seen` and `run` included; it stays as it is. None: a fresh one.

        Raises:
          UserError: the user is in the pool, there is no free slot, or the session has another model, gate or bound.
        """
        if user in self._rows:
            raise UserError(f"{user!r} is in the pool already; observe goes on with it, evict takes it out")
        taken = {row.slot for row in self._rows.values()}
        free = [slot for slot in range(len(self._generations)) if slot not in taken]
        if not free:
            raise UserError(
                f"no free slot for {user!r}: all {len(taken)} are taken; evict a user "
                f"(longest idle: {', '.join(map(repr, self._longest_idle()[:SHOWN]))}) or make a pool of more slots"
            )
        session = self._fresh if session is None else session
        self._check(user, session)
        slot, (state, place) = free[0], session.snapshot()
        row = Row(slot, self._adopted(session, self._fresh.snapshot()), place, 0, 0)
        self._generations = tuple(g + (i == slot) for i, g in enumerate(self._generations))
        self._fill(slot, state, self._rows | {user: row})  # all of the slot, whatever was there
        self._keep((user,))

    def evict(self, user: str) -> Session:
        """Takes a user out, as a session of its own, and sets the slot back to the fresh state.

        Raises:
          UserError: the user is not in the pool.
        """
        session = self.session(user)
        left = {other: row for other, row in self._rows.items() if other != user}
        self._fill(self._rows[user].slot, self._fresh.snapshot().state, left)
        return session

    def session(self, user: str) -> Session:
        """A copy of a user's stream as a session; the user stays in the pool.

        Raises:
          UserError: the user is not in the pool.
        """
        self._row(user)
        self._extend({user: NOTHING.tokens}, {user: False})  # whole chunks that an interrupt left
        row = self._rows[user]
        return self._adopted(row.session, Snapshot(take(self._state, np.int32(row.slot)), row.place))

    def observe(
        self, texts: Mapping[str, Text], *, update_allowed: bool | Mapping[str, bool] = True
    ) -> dict[str, Report]:
        """Reads what comes next in the streams of some users, and learns from it.

        Args:
          texts: by user: text, bytes or tokens, of any lengths.
          update_allowed: for all of them or by user; False: no level is taught by the tokens.

        Raises:
          UserError: a user who is not in the pool, or as `Session.observe`; then nobody's text has been read.
        """
        tokens = {user: self._row(user).session.encode(text) for user, text in texts.items()}
        allowed = _by_user("update_allowed", update_allowed, texts)
        reports: dict[str, list[ChunkReport]] = {user: [] for user in texts}
        new_contexts = dict.fromkeys(texts, 0)
        block = self._pace.block
        for begin in range(0, max(map(len, tokens.values()), default=0), block):
            blocks = {user: all_[begin : begin + block] for user, all_ in tokens.items() if begin < len(all_)}
            for user, (more, restarts) in self._extend(blocks, allowed).items():
                reports[user] += more
                new_contexts[user] += restarts
        self._keep(texts)
        phase_B = np.asarray(self._state.nest.phase)
        return {
            user: summarize(
                join(reports[user], self._pace.size, len(self._fresh.clocks)),
                tokens=len(tokens[user]),
                held=len(self._rows[user].place.held.tokens),
                written=int(phase_B[self._rows[user].slot]) * self._pace.size,
                clocks=self._fresh.clocks,
                new_contexts=new_contexts[user],
            )
            for user in texts
        }

    def score(self, user: str, text: Text) -> float:
        """As `Session.score` of a user's stream; the pool stays as it is, to the bit.

        Raises:
          UserError: the user is not in the pool, or as there.
        """
        nats = self.session(user).score(text)
        self._keep((user,))
        return nats

    def forget(self, user: str, level: str | int = FAST) -> None:
        """As `Session.forget` of a user's stream, in its slot; the others stay as they are, to the bit.

        Raises:
          UserError: the user is not in the pool, or there is no such level.
        """
        session = self.session(user)
        session.forget(level)
        row, (state, place) = self._rows[user], session.snapshot()
        self._fill(row.slot, state, self._rows | {user: row._replace(place=place, ahead=0)})
        self._keep((user,))

    def generate(self, prompts: Mapping[str, str], **options: Any) -> dict[str, str]:
        """The answers to some users' prompts; for the options and what they teach see `answer`."""
        answers = dict.fromkeys(prompts, "")
        for user, piece in self.answer(prompts, **options):
            answers[user] += piece
        return answers

    def answer(
        self,
        prompts: Mapping[str, str],
        *,
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int = 0,
        seed: int | Mapping[str, int] = 0,
        learn: bool = True,
        learn_on_generated: bool = False,
        until: str = "",
    ) -> Iterator[tuple[str, str]]:
        """Continues some users' streams at once, in pieces of text as they are made; each ends at its own end.

        A user who is evicted meanwhile gets no more, nor does one whose context is forgotten and who reads nothing
        before the next token; other calls of the pool in between are allowed.

        Args:
          prompts: by user, what comes next in the stream.
          max_tokens: length of each answer.
          temperature: 0 takes the likeliest token.
          top_k: only the k likeliest tokens; 0: all.
          seed: of the sampling, for all or by user: the answer does not depend on who else asks.
          learn: False: prompts and answers leave no trace in the pool.
          learn_on_generated: the answers teach the levels too.
          until: an answer ends before this text.
        Returns:
          Pairs of a user and a piece of the answer.

        Raises:
          UserError: a user who is not in the pool, a value out of range, or as `observe`.
        """
        check_options(max_tokens, temperature, top_k, *(seed.values() if isinstance(seed, Mapping) else (seed,)))
        rows = {user: self._row(user) for user in prompts}
        tokens = {user: row.session.prompt_tokens(prompts[user], row.place) for user, row in rows.items()}
        seeds = _by_user("seed", seed, prompts)
        self._keep(prompts)
        pool = self if learn else copy.copy(self)
        pool._extend(tokens, dict.fromkeys(prompts, learn))
        next_token = functools.partial(choices(temperature == 0, min(top_k, self._fresh.model.vocab_size)), temperature)
        choose_next = functools.partial(pool._choose, seeds, next_token)
        tenancies = {user: pool._tenancy(user) for user in prompts}  # now, not when the first piece is asked for
        answers = {user: Answer(self._fresh.vocabulary, until, tokens[user].tolist()) for user in prompts}
        here = functools.partial(self._stays, tenancies)  # who is in this pool, also where a copy answers
        return pool._answers(answers, here, choose_next, max_tokens, learn and learn_on_generated)

    def _answers(
        self,
        answers: dict[str, Answer],
        here: Callable[[str], bool],
        choose_next: Callable[[list[str], int], dict[str, int]],
        max_tokens: int,
        teaches: bool,
    ) -> Iterator[tuple[str, str]]:
        for i in range(max_tokens):
            going = [user for user, one in answers.items() if not one.ended and here(user)]
            asked = [user for user in going if self._rows[user].place.goes_on]
            chosen = choose_next(asked, i) if asked else {}
            tokens = {user: token for user, token in chosen.items() if token != self._fresh.vocabulary.end}
            self._extend({user: np.array([token]) for user, token in tokens.items()}, dict.fromkeys(tokens, teaches))
            for user in [user for user in answers if user not in tokens]:
                yield user, answers.pop(user).end()
            for user, token in tokens.items():
                yield user, answers[user].add(token)
            if not answers:
                return
        for user, answer in answers.items():
            yield user, answer.end()

    def _stays(self, tenancies: Mapping[str, tuple[int, int] | None], user: str) -> bool:
        """Whether a user has not left since."""
        return self._tenancy(user) == tenancies[user]

    def _choose(self, seeds: Mapping[str, int], next_token: Callable, users: list[str], i: int) -> dict[str, int]:
        """The i-th token of each user's answer."""
        ahead = self._look(users)
        slots = [self._rows[user].slot for user in users]
        allowed_BV = np.ones(ahead.logits_BV.shape, bool)
        seed_B = np.zeros(len(allowed_BV), np.int64)
        for user, slot in zip(users, slots, strict=True):
            allowed_BV[slot], seed_B[slot] = self._rows[user].place.seen, seeds[user]
        token_B = np.asarray(next_token(ahead.logits_BV, seed_B, np.int32(i), allowed_BV))
        return dict(zip(users, token_B[slots].tolist(), strict=True))

    def _look(self, users: Iterable[str]) -> Ahead:
        """Contexts and logits after all that these users hold."""
        shape = len(self._generations), self._fresh.model.vocab_size
        ahead = self._ahead or Ahead(self._state.nest.carry, jnp.zeros(shape))
        rows = {user: self._rows[user] for user in users}
        while waiting := {user: row for user, row in rows.items() if row.ahead < len(row.place.held.tokens)}:
            token_B = np.zeros(len(self._generations), np.int32)
            for row in waiting.values():
                token_B[row.slot] = row.place.held.tokens[row.ahead]
            starts_B = self._flags(row.slot for row in waiting.values() if not row.ahead)
            reads_B = self._flags(row.slot for row in waiting.values())
            ahead = self._programs.read_on(self._fresh.params, self._state, ahead, starts_B, reads_B, token_B)
            rows |= {user: row._replace(ahead=row.ahead + 1) for user, row in waiting.items()}
        self._ahead, self._rows = ahead, self._rows | rows
        return ahead

    def _extend(
        self, tokens: Mapping[str, np.ndarray], teaches: Mapping[str, bool]
    ) -> dict[str, tuple[list[ChunkReport], int]]:
        """Appends to streams; chunks that are complete are read and written, those of all users together.

        Returns:
          Per user the reports of the calls that read something, and how often the context began again.
        """
        rows = {user: _with(self._rows[user], more, teaches[user]) for user, more in tokens.items()}
        found: dict[str, tuple[list[ChunkReport], int]] = {user: ([], 0) for user in tokens}
        while counts := {user: n for user, row in rows.items() if (n := self._pace.whole(row.place))}:
            pieces = self._side_by_side({rows[user].slot: (rows[user].place.held, n) for user, n in counts.items()})
            state, report_BN = self._programs.advance(self._fresh.params, self._state, pieces)
            report_BN = jax.tree.map(np.asarray, report_BN)
            places = {user: self._pace.after(rows[user].place, n) for user, n in counts.items()}
            rows |= {user: rows[user]._replace(place=place, ahead=0) for user, place in places.items()}
            full = [user for user, place in places.items() if not place.context]
            if full:
                state = self._stream.new_context(
                    self._fresh.params, state, self._flags(rows[user].slot for user in full)
                )
            # Together: an interrupt between two calls leaves a pool that goes on.
            self._state, self._rows = state, self._rows | rows
            for user, n in counts.items():
                mine = jax.tree.map(lambda leaf, slot=rows[user].slot, n=n: leaf[slot, :n], report_BN)
                found[user] = [*found[user][0], mine], found[user][1] + (user in full)
        self._rows = self._rows | rows
        return found

    def _side_by_side(self, held: Mapping[int, tuple[Held, int]]) -> Pieces:
        """By slot, so many chunks of what is held there."""
        size, chunks = self._pace.size, self._pace.chunks
        nothing = cut(NOTHING, 0, size, chunks)
        found = [cut(*held[slot], size, chunks) if slot in held else nothing for slot in range(len(self._generations))]
        return Pieces(*map(np.concatenate, zip(*found, strict=True)))

    def _flags(self, slots: Iterable[int]) -> np.ndarray:
        flags_B = np.zeros(len(self._generations), bool)
        flags_B[list(slots)] = True
        return flags_B

    def _fill(self, slot: int, state: StreamState, rows: dict[str, Row]) -> None:
        """A slot, and all that belongs to it, as if it had just come to this state [1, ...]; and who is where then."""
        all_states, ahead = put(self._state, state, np.int32(slot)), self._ahead
        if ahead:
            nothing = jnp.zeros_like(ahead.logits_BV[:1])
            ahead = put(ahead, Ahead(state.nest.carry, nothing), np.int32(slot))
        self._state, self._ahead, self._rows = all_states, ahead, rows  # together, as in `_extend`

    def _adopted(self, session: Session, snapshot: Snapshot) -> Session:
        """A session that stands there and shares the parameters and programs of the pool."""
        adopted = session.fork()
        adopted.params, adopted.stream = self._fresh.params, self._stream
        adopted.resume(snapshot)
        return adopted

    def _check(self, user: str, session: Session) -> None:
        """Refuses a session that would not go on in this pool as it went before."""
        mine = self._fresh
        if session.model != mine.model or (session.params is not mine.params and session.base != mine.base):
            raise UserError(f"the session for {user!r} is of another model than the pool; give it one of this model")
        if session.vocabulary.digest != mine.vocabulary.digest:
            raise UserError(
                f"the session for {user!r} reads text as {session.vocabulary.name}, the pool as "
                f"{mine.vocabulary.name}; make the pool with its vocabulary"
            )
        if (session.gate, session.max_moved) != (mine.gate, mine.max_moved):
            raise UserError(
                f"the session for {user!r} has the gate {session.gate.name} and max_moved={session.max_moved}, the "
                f"pool {mine.gate.name} and {mine.max_moved}; make the pool with those of the session"
            )

    def _row(self, user: str) -> Row:
        if user not in self._rows:
            raise UserError(f"{user!r} is not among the {len(self._rows)} users of the pool; admit it first")
        return self._rows[user]

    def _tenancy(self, user: str) -> tuple[int, int] | None:
        """Slot and generation of a user who is in the pool."""
        row = self._rows.get(user)
        return row and (row.slot, self._generations[row.slot])

    def _keep(self, users: Iterable[str]) -> None:
        """Users that a call had to do with."""
        self._calls += 1
        self._rows = self._rows | {user: self._rows[user]._replace(used=self._calls) for user in users}

    def _longest_idle(self) -> list[str]:
        return sorted(self._rows, key=lambda user: self._rows[user].used)


def _with(row: Row, tokens: np.ndarray, teaches: bool) -> Row:
    """The row with tokens that come next."""
    return row._replace(place=row.place.append(tokens, np.full(len(tokens), teaches)))


def _by_user[T](name: str, value: T | Mapping[str, T], users: Iterable[str]) -> dict[str, T]:
    """One value for all users, or one for each."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(users, value)
    if different := sorted(set(users) ^ set(value)):
        raise UserError(f"{name} is one for all, or one for each user of the call; {different[0]!r} is in one only")
    return dict(value)
