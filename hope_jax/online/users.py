"""The sessions of many users: some in memory, all of them as files in a directory."""

import asyncio
import contextlib
import logging
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import anyio.lowlevel

from hope_jax.online.keeping import open as open_session
from hope_jax.online.session import Session
from hope_jax.online.session_file import read_metadata
from hope_jax.training.errors import UserError

LOG = logging.getLogger("uvicorn.error")  # the service's
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
WAITING = 8  # requests of one user, the one that is served among them
PATIENCE = 60.0  # seconds for a place in memory


class Refused(Exception):
    """A request that is not served: its HTTP status, and a message that says what to do."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class _User:
    def __init__(self):
        self.turn = asyncio.Lock()  # of the requests, in the order of arrival
        self.use = asyncio.Lock()  # whoever has it may touch the session
        self.line = 0  # requests that have the turn or wait for it
        self.session: Session | None = None  # where it is in memory
        self.changed = False  # since it was saved


class Held:
    """A user's session while one request has it."""

    def __init__(self, users: "Users", name: str, user: _User):
        self._users, self._user, self.name = users, user, name

    @property
    def session(self) -> Session:
        """It."""
        assert self._user.session is not None
        return self._user.session

    async def replace(self, session: Session) -> None:
        """Puts another session in its place."""
        if self._user.session is None:
            await self._users.make_room()
        self._user.session, self._user.changed = session, True

    async def run[T](self, work: Callable[[], T], *, changes: bool = True) -> T:
        """Does a piece of work on the session in a thread.

        Args:
          work: called there.
          changes: the session, so that it must be saved.
        """
        self._user.changed |= changes
        return await self._users.run(work)

    async def file(self) -> Path:
        """The session's file, up to date."""
        await self._users.save(self.name, self._user)
        return self._users.path(self.name)

    def delete(self) -> None:
        """Removes session and file; the next request of the user starts anew.

        Raises:
          Refused: 404, there is neither.
        """
        if self._user.session is None and not self._users.path(self.name).exists():
            raise no_session(self.name)
        self._user.session, self._user.changed = None, False
        self._users.path(self.name).unlink(missing_ok=True)


class Users:
    """Who has which session.

    The requests of a user come one after another; those of different users run side by side in `workers` threads. At
    most `limit` sessions are in memory: the one that was not used for the longest time is saved and dropped.

    Args:
      base: a session that has read nothing; every user starts from a fork of it.
      directory: of the files; it is made if it is not there.
      limit: sessions in memory, at least 1.
      workers: threads.
    """

    def __init__(self, base: Session, directory: Path, limit: int, workers: int):
        self.base, self.directory, self.limit = base, directory, limit
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.closing = False
        self._users: OrderedDict[str, _User] = OrderedDict()  # least recently used first
        self._places = asyncio.Semaphore(limit)  # sessions in use
        self._saving = asyncio.Lock()  # one eviction or autosave at a time
        self._threads = ThreadPoolExecutor(workers, "session")

    @property
    def in_memory(self) -> int:
        """How many sessions are."""
        return sum(user.session is not None for user in self._users.values())

    def path(self, name: str) -> Path:
        """The file of a user; capitals are marked, for file systems that do not tell them from small letters."""
        return self.directory / (re.sub("[A-Z]", lambda letter: "+" + letter[0].lower(), name) + ".hope")

    @contextlib.asynccontextmanager
    async def hold(self, name: str, *, create: bool = False, load: bool = True) -> AsyncIterator[Held]:
        """A user's session, for one request alone.

        Args:
          name: of the user.
          create: start a session if there is none.
          load: False: the session is only replaced or deleted, whatever its file holds.

        Raises:
          Refused: 400 not a name, 404 no such session, 409 its file cannot be used with this model, 429 too many
            requests of this user wait, 503 the service is stopping, or no place in memory became free.
        """
        if not NAME.fullmatch(name):
            raise Refused(400, f"user {name[:80]!r} is not a name; use 1 to 64 of the characters A-Z a-z 0-9 _ -")
        user = self._users.setdefault(name, _User())
        if user.line >= WAITING:
            raise Refused(429, f"{user.line} requests of user {name!r} wait already; wait for an answer first")
        user.line += 1
        try:
            async with user.turn, self._place(), user.use:
                if load and user.session is None:
                    user.session = await self._load(name, user, create)
                self._users.move_to_end(name)
                try:
                    yield Held(self, name, user)
                finally:
                    if not user.changed and not self.path(name).exists():
                        user.session = None  # it did not begin
        finally:
            user.line -= 1
            self._drop_if_gone(name, user)

    async def run[T](self, work: Callable[[], T]) -> T:
        """Work in a thread. A request that is cancelled waits for its end: no session is left halfway."""
        done = asyncio.get_running_loop().run_in_executor(self._threads, work)
        with anyio.CancelScope(shield=True):
            await asyncio.wait([done])
        await anyio.lowlevel.checkpoint_if_cancelled()
        return done.result()

    async def save(self, name: str, user: _User) -> None:
        """Writes the file of a session, if it is not up to date; the caller has the use of it.

        Raises:
          Refused: 503, it cannot be written; the session stays in memory.
        """
        session, path = user.session, self.path(name)
        if session is not None and (user.changed or not path.exists()):
            try:
                await self.run(lambda: session.save(path, overwrite=True))
            except UserError as error:
                LOG.error(error)
                raise Refused(503, "a session cannot be saved; the service's log says why, try again later") from error
            user.changed = False

    async def save_idle(self) -> int:
        """Saves the sessions that changed and that no request has now; returns how many those were."""
        count = 0
        for name, user in list(self._users.items()):
            async with self._saving:
                if user.changed and not user.use.locked():
                    count += await self._saved(name, user)
        return count

    async def _saved(self, name: str, user: _User) -> bool:
        """Whether a session could be saved; the log says why not."""
        try:
            async with user.use:
                await self.save(name, user)
        except Refused:
            return False  # it is in the log
        except Exception:
            LOG.exception("the session of user %s cannot be saved", name)
            return False
        return True

    async def close(self) -> tuple[int, list[str]]:
        """Takes no more requests, waits for the threads and saves what changed; how many sessions, and what failed."""
        self.closing = True
        await asyncio.to_thread(self._threads.shutdown)
        saved, failed = 0, []
        for name, user in list(self._users.items()):
            if user.session is not None and user.changed:
                try:
                    await asyncio.to_thread(user.session.save, self.path(name), overwrite=True)
                    saved += 1
                except UserError as error:
                    failed.append(str(error))
                except Exception as error:  # the others are saved all the same
                    LOG.exception("the session of user %s cannot be saved", name)
                    failed.append(f"the session of user {name} cannot be saved: {error!r}")
        return saved, failed

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        try:
            await asyncio.wait_for(self._places.acquire(), PATIENCE)
        except TimeoutError:
            raise Refused(
                503, f"all {self.limit} sessions in memory are in use; try again later, or raise --max-sessions"
            ) from None
        try:
            if self.closing:
                raise Refused(503, "the service is stopping; try again when it is back")
            yield
        finally:
            self._places.release()

    async def _load(self, name: str, user: _User, create: bool) -> Session:
        path = self.path(name)
        if not path.exists() and not create:
            raise no_session(name)
        await self.make_room()
        if path.exists():
            return await self.run(lambda: self.open(path))
        return self.base.fork()

    def open(self, path: Path) -> Session:
        """A session from a file.

        Raises:
          Refused: 409, the file is damaged, or of another model or service.
        """
        base = self.base
        options = {"gate": base.gate, "max_moved": base.max_moved, "vocabulary": base.vocabulary, "run": base.run}
        try:
            # Before a session of another gate would be built, and its programs with it.
            chosen = {name: read_metadata(path).get(name, "") for name in ("gate", "max_moved")}
            if chosen != {"gate": base.gate.name, "max_moved": "" if base.max_moved is None else repr(base.max_moved)}:
                learns = f"the gate {chosen['gate']:.80} and max_moved={chosen['max_moved'] or None!s:.80}"
                raise UserError(
                    f"{path} has a session that learns with {learns}, those of this service do not; begin another"
                )
            return open_session(path, base.model, base.params, **options)
        except UserError as error:
            raise Refused(409, str(error).replace(str(path), "the file")) from error

    async def make_room(self) -> None:
        """Saves and drops sessions that nobody uses, until those in memory and those being loaded are within limits.

        There is always one to drop: no more than `limit` requests have a place, the one that asks among them.
        """
        async with self._saving:
            while sum(user.session is not None or user.use.locked() for user in self._users.values()) > self.limit:
                idle = ((n, u) for n, u in self._users.items() if u.session is not None and not u.use.locked())
                name, user = next(idle)
                async with user.use:
                    await self.save(name, user)
                    user.session = None
                self._drop_if_gone(name, user)

    def _drop_if_gone(self, name: str, user: _User) -> None:
        if not user.line and user.session is None and not user.use.locked():
            self._users.pop(name, None)


def no_session(name: str) -> Refused:
    """What is answered where a session is asked for that is not there."""
    return Refused(404, f"no session of user {name!r}; it begins with the first text that it is sent")
