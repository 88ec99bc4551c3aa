"""The service: one session per user, whatever clients do to it."""

import asyncio
import contextlib
import errno
import io
import json
import re
import socket
import sys
from unittest import mock

import httpx2
import jax
import pytest
from starlette.testclient import TestClient

from hope_jax import online
from hope_jax.cli import main
from hope_jax.models import build_lm
from hope_jax.online import service
from hope_jax.online import users as users_module
from hope_jax.online.serve import _alone
from hope_jax.online.service import STREAMED, build_app
from hope_jax.online.users import Refused, Users
from hope_jax.training.errors import UserError
from tests.online.serving import AUTHORIZED, TOKEN, running

JSON = {"Content-Type": "application/json"}
STREAM = {"Accept": "text/event-stream"}
LIMIT = 5000  # bytes of a text
TEXT = "The password of the archive is swordfish.\n" * 8


@pytest.fixture(scope="module")
def base(config, params):
    return online.Session(config, params)


@pytest.fixture(scope="module")
def app(base, tmp_path_factory):
    return build_app(base, tmp_path_factory.mktemp("sessions"), token=TOKEN, max_sessions=2, max_bytes=LIMIT, workers=2)


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app, headers=AUTHORIZED) as client:
        yield client


@pytest.fixture
def user(request):
    """A name of its own for each test."""
    return re.sub(r"\W", "_", request.node.name)[:64]


def events(response):
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line]


def digest(client, user):
    return client.get(f"/v1/sessions/{user}").json()["digest"]


def test_observe_is_that_of_a_session(client, base, user):
    report = client.post(f"/v1/sessions/{user}/observe", content=TEXT).json()
    session = base.fork()
    expected = session.observe(TEXT)
    assert digest(client, user) == session.digest()
    assert report["tokens"] == len(TEXT) and report["held"] == expected.held
    assert report["before"] == pytest.approx(expected.before, rel=1e-6)
    assert [level["updates"] for level in report["levels"]] == [level.updates for level in expected.levels]
    assert [level["pending"] for level in report["levels"]] == [level.pending for level in expected.levels]
    assert report["chunks"]["fired"] == expected.chunks.fired.tolist()


def test_a_short_text_waits_for_a_whole_chunk(client, user):
    report = client.post(f"/v1/sessions/{user}/observe", content="ab").json()
    assert (report["held"], report["before"], report["chunks"]["before"]) == (2, None, [])


def test_observe_streams_what_happens(client, base, user):
    found = events(client.post(f"/v1/sessions/{user}/observe", content=TEXT, headers=STREAM))
    session = base.fork()
    expected = session.observe(TEXT)
    *parts, last = found
    assert len(parts) == 2 and parts[-1]["share"] == 1
    fired = [fired for part in parts for fired in part["chunks"]["fired"]]
    assert fired == expected.chunks.fired.tolist() == last["report"]["chunks"]["fired"]
    assert digest(client, user) == session.digest()


def test_generate_streams_the_answer_of_a_session(client, base, user):
    ask = {"prompt": TEXT, "max_tokens": 12, "temperature": 0}
    found = events(client.post(f"/v1/sessions/{user}/generate", json=ask))
    session = base.fork()
    expected = session.generate(TEXT, max_tokens=12, temperature=0)
    assert "".join(event.get("text", "") for event in found) == expected
    assert found[-1] == {"done": True, "tokens": session.tokens}
    assert digest(client, user) == session.digest()


def test_learn_false_leaves_no_trace(client, user):
    client.post(f"/v1/sessions/{user}/observe", content=TEXT)
    before = digest(client, user)
    ask = {"prompt": TEXT, "max_tokens": 3, "learn": False}
    assert events(client.post(f"/v1/sessions/{user}/generate", json=ask))[-1]["done"]
    assert digest(client, user) == before


def test_forget_and_delete(client, user):
    client.post(f"/v1/sessions/{user}/observe", content=TEXT)
    moved = [level["moved"] for level in client.get(f"/v1/sessions/{user}").json()["levels"]]
    assert min(moved) > 0
    levels = client.post(f"/v1/sessions/{user}/forget").json()["levels"]
    assert levels[0]["moved"] == 0 and levels[1]["moved"] == moved[1]
    assert client.delete(f"/v1/sessions/{user}").json() == {"deleted": user}
    for answer in (client.get(f"/v1/sessions/{user}"), client.delete(f"/v1/sessions/{user}")):
        assert answer.status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "message"),
    [
        ("GET", "/v1/sessions/nobody", {}, 404, "no session of user 'nobody'"),
        ("GET", "/v1/sessions/nobody/file", {}, 404, "no session of user 'nobody'"),
        ("POST", "/v1/sessions/nobody/forget", {}, 404, "no session of user 'nobody'"),
        ("POST", "/v1/sessions/a.b/observe", {"content": "x"}, 400, "'a.b' is not a name"),
        ("POST", "/v1/sessions/..%2F..%2Fetc/observe", {"content": "x"}, 404, "no such address"),
        ("POST", f"/v1/sessions/{'a' * 65}/observe", {"content": "x"}, 400, "1 to 64"),
        ("POST", "/v1/sessions/nobody/observe", {"content": b"ab\xff"}, 400, "0xFF at byte 2"),
        ("POST", "/v1/sessions/nobody/observe", {"content": b""}, 422, "the text is empty"),
        ("POST", "/v1/sessions/nobody/observe?learn=some", {"content": "x"}, 422, "learn: "),
        ("POST", "/v1/sessions/nobody/observe", {"content": "x" * (LIMIT + 1)}, 413, f"{LIMIT} are allowed"),
        ("POST", "/v1/sessions/nobody/observe", {"content": iter([b"x" * LIMIT, b"x"])}, 413, "--max-bytes"),
        ("POST", "/v1/sessions/nobody/generate", {"json": {"max_tokens": 0}}, 422, "max_tokens: "),
        ("POST", "/v1/sessions/nobody/generate", {"json": {"temprature": 0}}, 422, "temprature: "),
        ("POST", "/v1/sessions/nobody/generate", {"content": b"{", "headers": STREAM}, 422, "body: "),
        ("POST", "/v1/sessions/nobody/generate", {"json": {"seed": 2**32}}, 422, "seed: "),
        (
            "POST",
            "/v1/sessions/nobody/generate",
            {"content": rb'{"prompt": "a\ud800"}', "headers": JSON},
            422,
            "half of a surrogate",
        ),
        (
            "POST",
            "/v1/sessions/nobody/generate",
            {"content": rb'{"\ud800": 1}', "headers": JSON},
            422,
            "as a unicode string",
        ),
        ("PUT", "/v1/sessions/a.b/file", {"content": b"x"}, 400, "'a.b' is not a name"),
        ("PUT", "/v1/sessions/nobody/file", {"content": b""}, 409, "the file is not a session"),
        ("PUT", "/v1/sessions/nobody/file", {"content": b"\xff" * 5000}, 409, "the file is not a session"),
        ("PUT", "/v1/sessions/nobody/file", {"content": b"x" * 2**24}, 413, "are allowed"),
        ("GET", "/v1/sessions", {}, 404, "no such address"),
        ("PATCH", "/v1/sessions/nobody", {}, 405, "PATCH is not for"),
    ],
)
def test_mistakes(client, method, path, options, status, message):
    answer = client.request(method, path, **options)
    assert answer.status_code == status
    assert message in answer.json()["error"]
    assert client.get("/v1/sessions/nobody").status_code == 404  # none of them began a session


@pytest.mark.parametrize("token", ["Bearer wrong", f"Basic {TOKEN}", "", f"Bearer {TOKEN}x", "Bearer \xff"])
def test_only_with_the_token(client, token):
    headers = {"Authorization": token.encode("latin-1")}
    for path in ("/v1/sessions/nobody", "/v1/sessions/nobody/file", "/metrics", "/docs", "/nowhere"):
        answer = client.get(path, headers=headers)
        assert answer.status_code == 401 and "Authorization: Bearer" in answer.json()["error"]
    assert client.get("/health", headers=headers).json() == {"status": "ok"}
    page = client.get("/", headers=headers)
    assert page.status_code == 200 and TOKEN not in page.text
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page.text)  # nothing is loaded from elsewhere


def test_a_body_that_is_declared_too_large_is_not_read(client, app):
    """Neither is that of a client without a token."""

    async def receive():
        raise AssertionError("the body was asked for")

    def post(length, *headers):
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/sessions/nobody/observe", "query_string": b""}
        scope["headers"] = [(b"content-length", str(length).encode()), *headers]
        client.portal.call(app, scope, receive, send)
        assert (b"connection", b"close") in sent[0]["headers"]
        return sent[0]["status"]

    authorization = (b"authorization", AUTHORIZED["Authorization"].encode())
    assert post(LIMIT + 1, authorization) == 413
    assert post(10) == 401


def leave(client, app, path, body, headers, parts):
    """A request whose client goes when it has got so many parts of the answer; those that were sent."""
    sent = []

    async def go():
        gone = asyncio.Event()
        requests = iter([{"type": "http.request", "body": body}])

        async def receive():
            message = next(requests, None)
            if message is None:
                await gone.wait()
                return {"type": "http.disconnect"}
            return message

        async def send(message):
            sent.append(message.get("body", b""))
            if len(sent) == parts:
                gone.set()

        given = [(name.lower().encode(), value.encode()) for name, value in (AUTHORIZED | headers).items()]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": given}
        await app(scope, receive, send)

    client.portal.call(go)
    return sent


def test_a_client_that_goes_in_the_middle_of_an_answer(client, app, base, user):
    """The answer ends there; the session has read what was said so far and goes on."""
    ask = json.dumps({"prompt": TEXT, "max_tokens": 4000, "temperature": 0}).encode()
    pieces = leave(client, app, f"/v1/sessions/{user}/generate", ask, JSON, 5)
    assert 4 < len(pieces) < 100 and b"done" not in b"".join(pieces)
    made = client.get(f"/v1/sessions/{user}").json()["tokens"] - len(TEXT)
    assert 0 < made < 200
    session = base.fork()
    session.generate(TEXT, max_tokens=made, temperature=0)
    assert digest(client, user) == session.digest()
    client.post(f"/v1/sessions/{user}/observe", content=TEXT)
    session.observe(TEXT)
    assert digest(client, user) == session.digest()


def test_a_client_that_goes_while_its_text_is_read(client, app, base, user):
    """The pieces that were begun are read, the others never; what is sent again goes on from there."""
    text = TEXT * 14  # 18 pieces and a little
    sent = leave(client, app, f"/v1/sessions/{user}/observe", text.encode(), STREAM, 3)  # the start, and two events
    assert b"done" not in b"".join(sent)
    read = client.get(f"/v1/sessions/{user}").json()["tokens"]
    assert read % STREAMED == 0 and 2 * STREAMED <= read <= 5 * STREAMED
    session = base.fork()
    session.observe(text[:read])
    assert digest(client, user) == session.digest()
    client.post(f"/v1/sessions/{user}/observe", content=text[read:])
    session.observe(text[read:])
    assert digest(client, user) == session.digest()


def test_sessions_leave_the_memory_and_come_back(client, app, base, user):
    names = [f"{user}_{i}" for i in range(4)]
    expected = [base.fork() for _ in names]
    for part in (TEXT, "and more"):
        for name, session in zip(names, expected, strict=True):
            assert client.post(f"/v1/sessions/{name}/observe", content=part + name).status_code == 200
            session.observe(part + name)
            assert app.state.users.in_memory <= 2
    assert [digest(client, name) for name in names] == [session.digest() for session in expected]


def test_capitals_are_other_users(client, app):
    for name in ("bob", "Bob", "bOB"):
        client.post(f"/v1/sessions/{name}/observe", content=name)
    files = {app.state.users.path(name).name for name in ("bob", "Bob", "bOB")}
    assert len({name.lower() for name in files}) == 3
    assert len({digest(client, name) for name in ("bob", "Bob", "bOB")}) == 3


def test_download_and_upload(client, user, config, params, tmp_path):
    client.post(f"/v1/sessions/{user}/observe", content=TEXT)
    content = client.get(f"/v1/sessions/{user}/file").content
    file = tmp_path / "session.hope"
    file.write_bytes(content)
    assert online.open(file, config, params).digest() == digest(client, user)
    assert client.put(f"/v1/sessions/{user}_2/file", content=content).json()["digest"] == digest(client, user)
    damaged = content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
    for bad in (damaged, content[:-1], content[:50], content + b"x"):
        answer = client.put(f"/v1/sessions/{user}_2/file", content=bad)
        assert answer.status_code == 409 and str(tmp_path.parent) not in answer.json()["error"]
    assert digest(client, f"{user}_2") == digest(client, user)


def test_an_upload_that_finds_no_room(client, app, user, monkeypatch):
    client.post(f"/v1/sessions/{user}/observe", content=TEXT)
    content, before = client.get(f"/v1/sessions/{user}/file").content, digest(client, user)

    class Full(io.FileIO):
        def write(self, part):
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path, mode="r", **options):
        return Full(path, mode) if mode == "wb" and path.parent == app.state.users.directory else open(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(service.Path, "open", opened)
        answer = client.put(f"/v1/sessions/{user}/file", content=content)
    assert answer.status_code == 503 and "cannot be written" in answer.json()["error"]
    assert answer.headers["Retry-After"] == "1" and digest(client, user) == before
    assert not [path for path in app.state.users.directory.iterdir() if re.fullmatch(r"\.[0-9a-f]{32}", path.name)]
    assert client.put(f"/v1/sessions/{user}/file", content=content).status_code == 200


@pytest.mark.parametrize(
    ("other", "message"),
    [("params", "other parameters"), ("gate", "budget:0.5"), ("max_moved", "max_moved=0.5")],
)
def test_a_session_of_another_model_is_refused(client, user, config, params, tmp_path, monkeypatch, other, message):
    options = {"params": {}, "gate": {"gate": online.budget(0.5)}, "max_moved": {"max_moved": 0.5}}[other]
    stranger = online.Session(
        config, build_lm(config).init(jax.random.key(1)) if other == "params" else params, **options
    )
    stranger.save(tmp_path / "stranger.hope")
    content = (tmp_path / "stranger.hope").read_bytes()
    if options:  # it is refused before its programs would be built
        monkeypatch.setattr(users_module, "open_session", lambda *_, **__: pytest.fail("it was opened"))
    answer = client.put(f"/v1/sessions/{user}/file", content=content)
    assert answer.status_code == 409 and message in answer.json()["error"]
    assert client.get(f"/v1/sessions/{user}").status_code == 404


def test_a_damaged_file_is_named_and_can_be_deleted(client, app, user):
    app.state.users.path(user).write_bytes(b"no session")
    answer = client.post(f"/v1/sessions/{user}/observe", content="x")
    assert answer.status_code == 409 and "is not a session" in answer.json()["error"]
    assert client.delete(f"/v1/sessions/{user}").status_code == 200
    assert client.post(f"/v1/sessions/{user}/observe", content="x").status_code == 200


def test_the_end_saves_all(base, tmp_path):
    said, names = [], ("ann", "ben", "cleo")
    with TestClient(build_app(base, tmp_path, token=TOKEN, said=said.append), headers=AUTHORIZED) as first:
        for name in names:
            first.post(f"/v1/sessions/{name}/observe", content=TEXT + name)
        before = [digest(first, name) for name in names]
    assert said == [f"saved 3 changed sessions in {tmp_path}"]
    with TestClient(build_app(base, tmp_path, token=TOKEN), headers=AUTHORIZED) as second:
        assert [digest(second, name) for name in names] == before


def test_metrics(client, user):
    client.post(f"/v1/sessions/{user}/observe", content=TEXT)
    text = client.get("/metrics").text
    numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(numbers["hope_tokens_read_total"]) >= len(TEXT)
    assert float(numbers["hope_chunks_total"]) >= len(TEXT) // 8 - 1
    assert float(numbers["hope_sessions_in_memory"]) in (1, 2)
    assert float(numbers["hope_chunk_rollbacks_total"]) == 0
    assert 'route="/v1/sessions/{user}/observe",status="200"' in text and user not in text


def test_a_word_of_a_client_is_no_label(client):
    assert client.request("QQ", "/health").status_code == 405
    text = client.get("/metrics").text
    assert 'method="",route="/health",status="405"' in text and "QQ" not in text


def test_a_directory_is_private_and_rid_of_what_a_killed_service_left(tmp_path):
    directory = tmp_path / "sessions"
    with _alone(directory):
        assert directory.stat().st_mode & 0o777 == 0o700
    (directory / f".{'0a' * 16}").write_bytes(b"half of an upload")
    (directory / "ann.hope").write_bytes(b"a session")
    with _alone(directory):
        assert sorted(path.name for path in directory.iterdir()) == [".lock", "ann.hope"]


@pytest.mark.parametrize("given", [True, False])
def test_only_a_token_that_was_made_is_printed(base, tmp_path, monkeypatch, capsys, given):
    monkeypatch.setattr("hope_jax.online.serve.from_run", lambda run, overrides, **options: base)
    monkeypatch.setattr("hope_jax.online.serve._Server", mock.Mock())
    monkeypatch.setattr("hope_jax.online.serve.uvicorn.Config", mock.Mock())  # it would take over the logging
    monkeypatch.delenv("HOPE_TOKEN", raising=False)
    words = ["--port", "0", "--sessions", str(tmp_path), *(["--token", "whisper"] if given else [])]
    assert main(["serve", "/nowhere/run", *words]) == 0
    shown = capsys.readouterr().out
    assert "http://127.0.0.1:" in shown and "whisper" not in shown and ("#token=" in shown) != given


def test_one_file_that_cannot_be_written_does_not_stop_the_others(base, tmp_path, monkeypatch):
    async def go():
        users = Users(base, tmp_path, 4, 1)
        for name in ("ann", "ben", "cleo"):
            async with users.hold(name, create=True) as held:
                await held.run(lambda held=held: held.session.observe("x"))
                if name != "cleo":
                    error = RuntimeError("odd") if name == "ann" else UserError("the disk is full")
                    monkeypatch.setattr(held.session, "save", mock.Mock(side_effect=error))
        assert await users.save_idle() == 1
        assert [path.name for path in tmp_path.iterdir()] == ["cleo.hope"]
        saved, failed = await users.close()
        assert saved == 0 and len(failed) == 2 and "ann" in failed[0] and "the disk is full" in failed[1]

    asyncio.run(go())


def test_too_many_requests_of_one_user(base, tmp_path):
    async def go():
        users = Users(base, tmp_path, 2, 1)

        async def one():
            async with users.hold("ann", create=True):
                await asyncio.sleep(0)

        async with users.hold("ann", create=True):
            waiting = [asyncio.create_task(one()) for _ in range(users_module.WAITING - 1)]
            await asyncio.sleep(0)
            with pytest.raises(Refused, match="8 requests of user 'ann' wait already") as refused:
                await one()
            assert refused.value.status == 429
            async with users.hold("ben", create=True):
                pass  # others are served
        await asyncio.gather(*waiting)
        await users.close()

    asyncio.run(go())


def test_no_place_in_memory(base, tmp_path, monkeypatch):
    monkeypatch.setattr(users_module, "PATIENCE", 0.01)

    async def go():
        users = Users(base, tmp_path, 1, 1)
        async with users.hold("ann", create=True):
            with pytest.raises(Refused, match="all 1 sessions in memory are in use") as refused:
                await users.hold("ben", create=True).__aenter__()
            assert refused.value.status == 503
        async with users.hold("ben", create=True) as held:
            await held.run(lambda: held.session.observe("x"))
        assert await users.close() == (users.in_memory, []) == (1, [])
        with pytest.raises(Refused, match="stopping"):
            await users.hold("ben").__aenter__()

    asyncio.run(go())


def test_a_session_that_cannot_be_saved_stays_in_memory(base, tmp_path):
    """A disk that is full, or a directory that is gone: nothing is dropped, and it is saved when that is over."""
    directory, away = tmp_path / "sessions", tmp_path / "away"
    with TestClient(build_app(base, directory, token=TOKEN, max_sessions=1), headers=AUTHORIZED) as client:
        client.post("/v1/sessions/ann/observe", content=TEXT)
        before = digest(client, "ann")
        directory.rename(away)
        answer = client.post("/v1/sessions/ben/observe", content="x")
        assert answer.status_code == 503 and "cannot be saved" in answer.json()["error"]
        assert digest(client, "ann") == before
        away.rename(directory)
        assert client.post("/v1/sessions/ben/observe", content="x").status_code == 200
        assert digest(client, "ann") == before


def test_a_command_line_that_cannot_be(base, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr("hope_jax.online.serve.from_run", lambda run, overrides, **options: base)
        for words, message in (
            (["--port", port], f"cannot listen on 127.0.0.1:{port}"),
            (["--port", "70000"], "--port 70000 must be at most 65535"),
            (["--max-sessions", "0"], "--max-sessions 0 must be at least 1"),
            (["--token", ""], "the token must be"),
            (["--gate", "often"], "--gate: no gate 'often'"),
        ):
            assert main(["serve", "/nowhere/run", *words]) == 2
            assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "hope_jax.online.serve", None)
    assert main(["serve", "/nowhere/run"]) == 2
    assert "pip install 'hope-jax[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize("begun", [b"GET /health HTTP/1.1\r\nHost: ", b"GET /"])
def test_a_header_without_an_end_is_not_kept(base, tmp_path, begun):
    """It comes before the token; the limit is that of the HTTP library."""
    sent, most = 0, 1 << 24
    with running(build_app(base, tmp_path, token=TOKEN)) as address:
        with (
            socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as client,
            contextlib.suppress(ConnectionError),
        ):
            client.sendall(begun)
            while sent < most:
                client.sendall(b"a" * 65_536)
                sent += 65_536
        assert sent < most
        assert httpx2.get(f"{address}/health").status_code == 200


@pytest.mark.slow
def test_two_hundred_clients_at_once(base, tmp_path, monkeypatch):
    """All are answered, and each session holds its own text and nothing else, in memory and in its file."""
    monkeypatch.setattr(users_module, "PATIENCE", 600)  # however slow the machine is
    names = [f"user_{i}" for i in range(200)]

    async def visit(client, name):
        for text in (f"{name} knows {name}. " * 12, f"{name} again. " * 5):
            answer = await client.post(f"/v1/sessions/{name}/observe", content=text)
            assert answer.status_code == 200, answer.text
        ask = {"prompt": name, "max_tokens": 3, "temperature": 0}
        answer = await client.post(f"/v1/sessions/{name}/generate", json=ask)
        assert answer.status_code == 200 and "done" in answer.text
        return (await client.get(f"/v1/sessions/{name}")).json()["digest"]

    async def go(address):
        limits = httpx2.Limits(max_connections=len(names))
        async with httpx2.AsyncClient(base_url=address, headers=AUTHORIZED, limits=limits, timeout=600) as client:
            return await asyncio.gather(*(visit(client, name) for name in names))

    with running(build_app(base, tmp_path, token=TOKEN, max_sessions=16)) as address:
        found = asyncio.run(go(address))
    for name, digest_ in zip(names, found, strict=True):
        session = base.fork()
        session.observe(f"{name} knows {name}. " * 12)
        session.observe(f"{name} again. " * 5)
        session.generate(name, max_tokens=3, temperature=0)
        assert digest_ == session.digest()
        assert online.open(tmp_path / f"{name}.hope", base.model, base.params).digest() == digest_


@pytest.mark.slow
def test_real_clients_that_go_or_send_too_much(base, tmp_path):
    app = build_app(base, tmp_path, token=TOKEN, max_bytes=LIMIT)
    with running(app) as address, httpx2.Client(base_url=address, headers=AUTHORIZED, timeout=120) as client:
        ask = {"prompt": TEXT, "max_tokens": 4000}
        with client.stream("POST", "/v1/sessions/ann/generate", json=ask) as answer:
            next(answer.iter_raw())
        report = client.post("/v1/sessions/ann/observe", content="more").json()  # not after 4000 tokens
        assert report["tokens"] == 4
        assert client.get("/v1/sessions/ann").json()["tokens"] < 3000
        assert client.post("/v1/sessions/ann/observe", content=b"x" * 30_000_000).status_code == 413
        assert client.get("/health").status_code == 200
