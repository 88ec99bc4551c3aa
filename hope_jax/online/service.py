"""Sessions over HTTP, one per user, and a page to watch them learn, as an ASGI application.

    POST   /v1/sessions/USER/observe?learn=true   text to read -> report; `Accept: text/event-stream` streams it
    POST   /v1/sessions/USER/generate             {"prompt": ..., "max_tokens": ...} -> the answer as events
    POST   /v1/sessions/USER/forget?level=fast    a level starts again
    GET    /v1/sessions/USER                      tokens, levels, digest
    DELETE /v1/sessions/USER
    GET    /v1/sessions/USER/file                 the session as a safetensors file
    PUT    /v1/sessions/USER/file                 such a file becomes the session
    GET    /metrics   /health   /

All but the last two need the header `Authorization: Bearer TOKEN`. Errors are {"error": "what, and what to do"}.
"""

import asyncio
import contextlib
import json
import os
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.exceptions import HTTPException

from hope_jax.online.authorization import Authorization, error_response
from hope_jax.online.reading import finite, joined, pieces, report_json, without_losses
from hope_jax.online.report import Report
from hope_jax.online.session import FAST, Session
from hope_jax.online.session_file import MOST_HEADER
from hope_jax.online.users import LOG, Held, Refused, Users
from hope_jax.training.errors import UserError

PAGE = Path(__file__).parent / "page" / "index.html"
OPEN = ("/", "/health")  # without a token
MAX_BYTES = 1_000_000
MAX_SESSIONS = 64
AUTOSAVE = 30.0  # seconds
STREAMED = 256  # tokens of an event of observe
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Ask(BaseModel):
    """The body of generate: options of `Session.answer`."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = ""
    max_tokens: int = Field(200, ge=1, le=4096)
    temperature: float = Field(0.8, ge=0, le=100, allow_inf_nan=False)
    top_k: int = Field(0, ge=0)
    seed: int = Field(0, ge=0, lt=2**32)  # keys of the sampling have 32 bits
    learn: bool = True
    learn_on_generated: bool = False
    until: str = ""

    @field_validator("prompt", "until")
    @classmethod
    def _is_text(cls, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"character {error.start} is half of a surrogate pair; send whole characters") from error
        return text


class Meters:
    """What /metrics counts."""

    def __init__(self, users: Users):
        self.registry = CollectorRegistry()
        self.requests = self._counter("hope_requests", "Requests by route and status", "method", "route", "status")
        self.tokens = self._counter("hope_tokens_read", "Tokens of texts that sessions were sent")
        self.pieces = self._counter("hope_answer_pieces", "Pieces of text of answers")
        self.chunks = self._counter("hope_chunks", "Chunks of texts that sessions were sent")
        self.rollbacks = self._counter("hope_chunk_rollbacks", "Chunks that were undone because they were not finite")
        memory = Gauge("hope_sessions_in_memory", "Sessions in memory", registry=self.registry)
        memory.set_function(lambda: users.in_memory)

    def read(self, report: Report) -> None:
        """Counts what a call of `Session.observe` did."""
        self.tokens.inc(report.tokens)
        self.chunks.inc(len(report.chunks.before))
        self.rollbacks.inc(report.rolled_back)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, labels, registry=self.registry)


def build_app(
    base: Session,
    directory: Path,
    *,
    token: str,
    max_sessions: int = MAX_SESSIONS,
    max_bytes: int = MAX_BYTES,
    workers: int | None = None,
    said: Callable[[str], Any] = lambda line: None,
) -> FastAPI:
    """The service as an ASGI application; its `state.users` are the sessions.

    Args:
      base: a session that has read nothing; every user starts from it.
      directory: where sessions are kept.
      token: that every request must bring.
      max_sessions: in memory; others wait in their files.
      max_bytes: of a request's text.
      workers: threads that read and generate; None: one per CPU.
      said: is told what was saved at the end.
    """
    users = Users(base, directory, max_sessions, workers or os.cpu_count() or 1)
    meters = Meters(users)
    file_bytes = _file_bytes(base)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        autosave = asyncio.create_task(_autosave(users))
        yield
        autosave.cancel()
        saved, failed = await users.close()
        for line in (f"saved {saved} changed sessions in {directory}", *failed):
            said(line)

    app = FastAPI(title="hope_jax", lifespan=lifespan, openapi_url=None)
    app.state.users, app.state.meters = users, meters
    app.add_middleware(
        Authorization,
        token=token,
        open_paths=OPEN,
        limit=lambda method, path: file_bytes if method == "PUT" else max_bytes,
        count=lambda method, route, status: meters.requests.labels(method, route, status).inc(),
    )
    app.include_router(router)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(UserError, _mistake)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _failed)
    return app


async def _autosave(users: Users) -> None:
    while True:
        await asyncio.sleep(AUTOSAVE)
        await users.save_idle()


def _file_bytes(session: Session) -> int:
    """Most bytes that the file of a session like this one has."""
    held = session.chunk_size * (np.int32().nbytes + np.bool_().nbytes)
    return MOST_HEADER + held + sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(session.snapshot()))


async def _text(request: Request) -> str:
    body = await request.body()
    if not body:
        raise Refused(422, "the text is empty; send what the session should read as the body of the request")
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        byte = f"0x{body[error.start]:02X} at byte {error.start}"
        raise Refused(400, f"the text is not UTF-8: {byte}; encode it as UTF-8") from error


async def _old(request: Request, user: str) -> AsyncIterator[Held]:
    async with request.app.state.users.hold(user) as held:
        yield held


async def _old_or_new(request: Request, user: str) -> AsyncIterator[Held]:
    async with request.app.state.users.hold(user, create=True) as held:
        yield held


# A session is held until the response has been sent, or the client has gone.
type Text = Annotated[str, Depends(_text)]
type Old = Annotated[Held, Depends(_old)]
type OldOrNew = Annotated[Held, Depends(_old_or_new)]

router = APIRouter()


@router.get("/")
async def page() -> Response:
    """The page."""
    return HTMLResponse(PAGE.read_text(), headers=PAGE_HEADERS)


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Whether requests are taken."""
    return {"status": "stopping" if request.app.state.users.closing else "ok"}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(generate_latest(request.app.state.meters.registry), media_type=CONTENT_TYPE_LATEST)


@router.post("/v1/sessions/{user}/observe")
async def observe(request: Request, text: Text, held: OldOrNew, learn: bool = True) -> Any:
    """Reads a text and learns from it."""
    meters, session, reports = request.app.state.meters, held.session, []
    streams = "text/event-stream" in request.headers.get("accept", "")
    todo = pieces(session, text, STREAMED)

    async def events() -> AsyncIterator[dict[str, Any]]:
        read = 0
        for piece in todo:
            report = await held.run(lambda piece=piece: session.observe(piece, update_allowed=learn))
            meters.read(report)
            reports.append(without_losses(report))
            read += len(piece)
            yield report_json(report) | {"share": read / sum(map(len, todo))}
        yield {"done": True, "report": report_json(joined(session, reports))}

    if streams:
        return _stream(request, events())
    return [event async for event in events()][-1]["report"]


@router.post("/v1/sessions/{user}/generate")
async def generate(request: Request, ask: Ask, held: OldOrNew) -> Response:
    """Answers, piece by piece."""
    session, meters = held.session, request.app.state.meters
    answer = await held.run(lambda: session.answer(**ask.model_dump()), changes=ask.learn)

    async def events() -> AsyncIterator[dict[str, Any]]:
        while (piece := await held.run(lambda: next(answer, None), changes=ask.learn)) is not None:
            meters.pieces.inc()
            if piece:
                yield {"text": piece}
        yield {"done": True, "tokens": session.tokens}

    return _stream(request, events())


@router.post("/v1/sessions/{user}/forget")
async def forget(held: Old, level: str = FAST) -> dict[str, Any]:
    """Sets a level back to its start."""
    await held.run(lambda: held.session.forget(level))
    return await _telemetry(held)


@router.get("/v1/sessions/{user}")
async def look(held: Old) -> dict[str, Any]:
    """What the session is."""
    return await _telemetry(held)


@router.delete("/v1/sessions/{user}")
async def delete(request: Request, user: str) -> dict[str, Any]:
    """Removes it."""
    async with request.app.state.users.hold(user, load=False) as held:
        held.delete()
    return {"deleted": user}


@router.get("/v1/sessions/{user}/file")
async def download(held: Old) -> Response:
    """Its file."""
    return FileResponse(await held.file(), media_type="application/octet-stream", filename=f"{held.name}.hope")


@router.put("/v1/sessions/{user}/file")
async def upload(request: Request, user: str) -> dict[str, Any]:
    """A file becomes the session, if it is one of this model."""
    users = request.app.state.users
    path = users.directory / f".{uuid.uuid4().hex}"
    async with users.hold(user, load=False) as held:
        try:
            await _write(path, request)
            session = await users.run(lambda: users.open(path))
        finally:
            path.unlink(missing_ok=True)
        await held.replace(session)
        return await _telemetry(held)


async def _write(path: Path, request: Request) -> None:
    try:
        with path.open("wb") as file:
            async for part in request.stream():
                file.write(part)
    except OSError as error:
        LOG.error("an upload cannot be written to %s: %s", path.parent, error.strerror)
        raise Refused(503, "the file cannot be written; the service's log says why, try again later") from error


async def _telemetry(held: Held) -> dict[str, Any]:
    session = held.session
    moved, digest, now = await held.run(lambda: (session.diff(), session.digest(), session.observe("")), changes=False)
    levels = [
        {"name": one.name, "chunk_size": one.chunk_size, "pending": one.pending, "moved": moved[one.name]}
        for one in now.levels
    ]
    return finite({"user": held.name, "tokens": session.tokens, "held": now.held, "levels": levels, "digest": digest})


def _stream(request: Request, events: AsyncIterator[dict[str, Any]]) -> Response:
    """Server-sent events; what goes wrong after the first is an event too."""

    async def lines() -> AsyncIterator[str]:
        try:
            async for event in events:
                yield f"data: {json.dumps(event)}\n\n"
                if request.app.state.users.closing:
                    raise Refused(503, "the service is stopping; the session is saved as it is now")
        except (UserError, Refused) as error:
            yield f"data: {json.dumps({'error': str(error)})}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _http_error(request: Request, error: Any) -> Response:
    known = {404: f"no such address: {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    message = known.get(error.status_code) or str(error.detail)
    return error_response(error.status_code, message, error.headers)


async def _refused(request: Request, error: Any) -> Response:
    return error_response(error.status, str(error), {"Retry-After": "1"} if error.status in (429, 503) else None)


async def _mistake(request: Request, error: Exception) -> Response:
    return error_response(422, str(error))


async def _invalid(request: Request, error: Any) -> Response:
    return error_response(422, "; ".join(_validation_message(one) for one in error.errors()))


def _validation_message(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"] if part not in ("body", "query"))
    return f"{where or 'body'}: {error['msg']}; got {str(error.get('input'))[:80]!r}"


async def _failed(request: Request, error: Exception) -> Response:
    return error_response(500, f"{type(error).__name__} in the service; its log says where")
