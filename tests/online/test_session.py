"""Sessions: the same state to the bit however a stream is cut, and what they say, forget and answer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax import online
from hope_jax.models import ModelConfig, build_lm
from hope_jax.online.reading import report_json
from hope_jax.training.errors import UserError
from tests.online.conftest import OTHERS


def read_in_pieces(session, text, seed=1):
    rng, begin = np.random.default_rng(seed), 0
    while begin < len(text):
        size = int(rng.integers(0, 70))
        session.observe(text[begin : begin + size])
        begin += size
    return session


@pytest.fixture(scope="module")
def whole(config, params, text):
    session = online.Session(config, params)
    report = session.observe(text)
    return session, report


@pytest.mark.parametrize("seed", [1, 2])
def test_any_cut_of_a_stream_gives_the_same_state(config, params, text, whole, seed):
    cut = read_in_pieces(online.Session(config, params), text, seed)
    assert cut.digest() == whole[0].digest() and cut.tokens == len(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_any_cut_of_any_model_gives_the_same_state(name, text):
    config = ModelConfig(**OTHERS[name])
    params = build_lm(config).init(jax.random.key(0))
    session = online.Session(config, params)
    report = session.observe(text)
    assert np.isfinite(report.before) and len(report.levels) == len(session.clocks)
    assert read_in_pieces(online.Session(config, params), text).digest() == session.digest()


def test_the_weights_are_those_of_the_model_that_reads_the_whole_stream(config, params, text):
    """The levels of a session against `build_lm`, which training uses; before the attention cache is full."""
    session = online.Session(config, params)
    session.observe(text[:81])
    lm = build_lm(config)
    tokens = jnp.asarray(np.frombuffer(text[:81], np.uint8).astype(np.int32))[None]
    state, logits = jax.jit(lambda p, t: lm.apply(p, lm.init_state(p, 1), t, phase=0))(params, tokens)
    for mine, theirs in zip(session.snapshot().state.nest.levels, state.nest.levels, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), mine.start, theirs.start)
    log_p = jax.nn.log_softmax(logits[0, :-1])[jnp.arange(80), tokens[0, 1:]]
    assert online.Session(config, params).score(text[:9]) == pytest.approx(-float(log_p[:8].mean()), rel=1e-5)


def test_a_forgotten_context_counts_for_nothing(config, params, text):
    """A stream that taught nothing and dropped its context scores as one that has read nothing, to the bit."""
    read, fresh = online.Session(config, params), online.Session(config, params)
    read.observe(text[:45], update_allowed=False)
    read.forget("context")
    assert read.score(text[100:180]) == fresh.score(text[100:180])
    with pytest.raises(UserError, match="nothing to score: 1 tokens"):
        read.score(text[:1])


@pytest.mark.parametrize("level", ["context", "all"])
def test_where_the_context_is_forgotten_an_answer_begins_as_in_a_fresh_stream(config, params, text, level):
    """With a line end; one that is being made ends."""
    asked: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
    read, fresh = online.Session(config, params), online.Session(config, params)
    read.observe(text[:45], update_allowed=False)
    answer = read.answer(max_tokens=12)
    next(answer)
    read.forget(level)
    assert "".join(answer) in ("", "�") and read.tokens == 40  # half a character may have waited
    said = read.generate(**asked)
    assert said == fresh.generate(**asked) == online.Session(config, params).generate("\n", **asked)
    assert read.tokens == 40 + len("\n") + asked["max_tokens"]


def test_a_report_says_what_was_read_and_moved(whole, text):
    session, report = whole
    assert (report.tokens, report.held, len(report.chunks.before)) == (len(text), 6, 53)
    assert report.new_contexts == 4  # the cache holds 96 tokens
    fast, slow = report.levels
    assert (fast.chunk_size, fast.updates, fast.pending) == (8, 53, 6)
    assert (slow.chunk_size, slow.updates, slow.pending) == (32, 13, 14)
    assert (report.chunks.fired[:, 1].nonzero()[0] % 4 == 3).all()
    assert report.after < report.before and report.written == 1 and not report.warnings
    assert fast.moved > 0 and slow.moved > 0 and "level_1" in str(report)
    apart = session.diff(online.Session(session.model, session.params))
    assert session.diff() == apart
    assert apart == pytest.approx({"level_0": fast.moved, "level_1": slow.moved}, rel=1e-5)


def test_a_fork_goes_its_own_way(whole):
    session, digest = whole[0], whole[0].digest()
    fork = session.fork()
    fork.observe(b"something else, long enough to be written")
    assert session.digest() == digest != fork.digest()
    assert fork.diff(session)["level_0"] > 0 and session.diff(session) == {"level_0": 0, "level_1": 0}


def test_score_leaves_no_trace_and_equals_what_observe_reports(config, params, text, whole):
    session = online.Session(config, params, gate=online.never())
    session.observe(text[:9])
    digest = session.digest()
    score = session.score(text[9:33])
    assert session.digest() == digest
    chunks = session.observe(text[9:33]).chunks  # targets 9 to 32; the stream's first chunk is gone
    assert score == pytest.approx(float(chunks.losses.mean()), rel=1e-5)
    with pytest.raises(UserError, match="nothing to score: 1 tokens"):
        online.Session(config, params).score(b"x")


def test_generation_without_learning_leaves_no_trace(whole):
    session, digest = whole[0].fork(), whole[0].digest()
    answer = session.generate("what?", max_tokens=20, seed=3, learn=False)
    assert session.digest() == digest
    assert answer == session.generate("what?", max_tokens=20, seed=3, learn=False)
    assert answer != session.generate("what?", max_tokens=20, seed=4, learn=False)
    assert answer == session.generate("what?", max_tokens=20, seed=3)  # the same answer, and now it is in the stream
    assert session.tokens == whole[0].tokens + 25
    assert session.fork().generate(max_tokens=1, temperature=0) == session.generate(max_tokens=1, temperature=0)


def test_answers_stop_at_a_text(whole):
    said = whole[0].generate("x", max_tokens=40, seed=5, learn=False)
    end = said[10:12]
    assert whole[0].generate("x", max_tokens=40, seed=5, learn=False, until=end) == said[: said.index(end)]


def test_only_what_was_seen_or_observed_is_said(config, params):
    session = online.Session(config, params, seen=[65, 66])
    assert set(session.generate("C", max_tokens=30, temperature=5.0)) <= set("ABC")


def test_text_that_is_not_trusted_teaches_nothing(config, params, text):
    session = online.Session(config, params)
    session.observe(text[:17])
    before = session.snapshot().state.nest
    session.observe(text[17:100], update_allowed=False)
    after = session.snapshot().state.nest
    fast, slow = (a.start["w1"] - b.start["w1"] for a, b in zip(after.levels, before.levels, strict=True))
    assert not fast.any()  # what the trusted tokens had pending for the slow level is written when it is due
    assert slow.any()
    assert jax.tree.leaves(before.carry)[0].shape and not np.array_equal(
        jax.tree.leaves(before.carry)[0], jax.tree.leaves(after.carry)[0]
    )
    only = online.Session(config, params)
    only.observe(text, update_allowed=False)
    assert set(only.diff(online.Session(config, params)).values()) == {0.0}


def test_forgetting_a_level(whole, config, params, text):
    fresh = online.Session(config, params)
    for level, zero in (("fast", {"level_0"}), (1, {"level_1"}), ("all", {"level_0", "level_1"}), ("context", set())):
        session = whole[0].fork()
        session.forget(level)
        assert {name for name, distance in session.diff(fresh).items() if distance == 0} == zero
    waiting = online.Session(config, params, gate=online.budget(0.25))
    waiting.observe(text[:100])
    waiting.forget("all")
    fresh = online.Session(config, params, gate=online.budget(0.25))
    jax.tree.map(np.testing.assert_array_equal, waiting.snapshot().state, fresh.snapshot().state)
    assert not waiting.snapshot().place.held.tokens.size
    with pytest.raises(UserError, match="nothing is called 'slow' in this session; it has fast, level_0, level_1"):
        session.forget("slow")


@pytest.mark.slow
def test_where_a_nested_level_starts_again_its_gradient_is_not_known(params, text):
    """Until then it is that of a chain; the way back to the start is not taken for a step."""
    config = ModelConfig(**OTHERS["nested"])
    nested = online.Session(config, params)
    chain = online.Session(dataclasses.replace(config, cms_variant="sequential"), params)
    expected, report = chain.observe(text[:33]), nested.observe(text[:33])
    np.testing.assert_allclose(report.chunks.gradient[:3], expected.chunks.gradient[:3], rtol=1e-4)
    fast, slow = report.chunks.gradient[3]
    assert np.isnan(fast) and slow == pytest.approx(expected.chunks.gradient[3, 1], rel=1e-4)
    assert report.levels[0].gradient == report.chunks.gradient[2, 0] and not report.warnings

    cut = online.Session(config, params)
    cut.observe(text[:25])
    rest = cut.observe(text[25:33])  # the chunk of the restart alone
    assert rest.levels[0].updates == 1 and np.isnan(rest.levels[0].gradient) and not rest.warnings
    assert rest.levels[1].gradient == report.levels[1].gradient
    assert [level["gradient"] for level in report_json(rest)["levels"]] == [None, rest.levels[1].gradient]


@pytest.mark.parametrize("gate", [online.never(), online.budget(0.25)], ids=["never", "budget"])
def test_gates_write_between_nothing_and_everything(config, params, text, gate, whole):
    session = online.Session(config, params, gate=gate, measure_after=False)
    report = session.observe(text)
    wrote = report.chunks.wrote
    if gate.name == "never":
        assert not wrote.any() and session.diff(online.Session(config, params)) == {"level_0": 0, "level_1": 0}
        return
    assert 0 < wrote.sum() < len(wrote) and report.written == pytest.approx(wrote.mean())
    assert ((report.chunks.step[:, 0] > 0) == wrote).all()
    if gate.name.startswith("budget"):
        assert (np.cumsum(wrote) <= np.ceil(0.25 * np.arange(1, len(wrote) + 1))).all()
    assert read_in_pieces(online.Session(config, params, gate=gate, measure_after=False), text).digest() == (
        session.digest()
    )


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (online.always(), [1, 1, 1, 1, 1, 1]),
        (online.threshold(2.0), [1, 0, 1, 0, 1, 1]),
        (online.ema(1.0, 0.0), [1, 0, 1, 0, 1, 0]),  # more than the one before
        (online.ema(1.0, 0.5), [1, 0, 1, 0, 1, 1]),  # 3 | 3, 2, 3.0 > 2.2, ...
        (online.budget(0.5, 1.0), [1, 0, 1, 0, 1, 0]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_gates_let_through(gate, expected):
    state, wrote = gate.init(), []
    for surprise in (3.0, 1.0, 3.0, 1.0, 4.0, 4.0):
        state, write = gate.update(state, jnp.float32(surprise))
        wrote.append(int(write))
    assert wrote == expected


def test_text_that_may_not_teach_does_not_spend_the_budget(config, params, text):
    def wrote(before):
        session = online.Session(config, params, gate=online.budget(0.25), measure_after=False)
        session.observe(before, update_allowed=False)
        return session.snapshot().state.gate

    fresh = online.Session(config, params, gate=online.budget(0.25)).snapshot().state.gate
    jax.tree.map(np.testing.assert_array_equal, wrote(text[:200]), fresh)


def test_an_interrupt_loses_nothing(config, params, text, monkeypatch, tmp_path, interrupted):
    """Ctrl-C in the second of several programs of one call: what was not read yet is read when it is saved."""
    session = online.Session(config, params)
    stream = session.stream
    monkeypatch.setattr(session, "stream", stream._replace(advance=interrupted(stream.advance)))
    with pytest.raises(KeyboardInterrupt):
        session.observe(text)
    session.save(tmp_path / "a")
    again = online.open(tmp_path / "a", config, params)
    assert again.tokens == session.tokens > 96
    unbroken = online.Session(config, params)
    unbroken.observe(text[: session.tokens])
    assert again.digest() == unbroken.digest()


def test_a_pending_error_that_is_not_finite_does_not_undo_every_chunk(config, params, text):
    session = online.Session(config, params)
    session.observe(text[:17])
    now = session.snapshot()
    levels = list(now.state.nest.levels)
    levels[1] = levels[1]._replace(pending=jax.tree.map(lambda leaf: leaf + jnp.inf, levels[1].pending))
    nest = now.state.nest._replace(levels=tuple(levels))
    session.resume(now._replace(state=now.state._replace(nest=nest)))
    report = session.observe(text[17:])
    assert report.rolled_back == 1


def test_gates_are_named_so_that_they_can_be_made_again():
    for gate in (online.always(), online.never(), online.threshold(2.5), online.ema(1.1, 0.9), online.budget(0.25)):
        assert online.parse_gate(gate.name) is gate
    for text, message in (("budget:2", r"\[0, 1\]; got 2"), ("sometimes", "there are always"), ("ema:a", "ema:a")):
        with pytest.raises(ValueError, match=message):
            online.parse_gate(text)


def test_a_level_moves_no_further_than_allowed(config, params, text):
    config = dataclasses.replace(config, cms_eta=8.0)
    session = online.Session(config, params, max_moved=0.05, measure_after=False)
    report = session.observe(text)
    assert report.chunks.moved[:, 0].max() == pytest.approx(0.05, rel=1e-4)
    with pytest.raises(UserError, match="max_moved is a distance"):
        online.Session(config, params, max_moved=0.0)


def test_a_chunk_that_is_not_finite_is_undone(config, params, text):
    config = dataclasses.replace(config, cms_eta=1e30)
    session = online.Session(config, params)
    before = session.snapshot()
    report = session.observe(text[:9])
    assert report.rolled_back == 1 and session.tokens == 9  # the stream goes on
    jax.tree.map(np.testing.assert_array_equal, session.snapshot().state, before.state)
    assert "rolled back" in report.warnings[0]
    assert session.diff(online.Session(config, params)) == {"level_0": 0, "level_1": 0}
    assert np.isfinite(session.score(text[9:20]))


def test_a_level_that_does_not_learn_is_called_dead(config, params, text):
    still = jax.tree.map(lambda leaf: leaf, params)
    slow = {**params["blocks"]["cms"]["level_1"], "w1": 1e-9 * params["blocks"]["cms"]["level_1"]["w1"]}
    slow["w2"] = 1e-9 * slow["w2"]
    still["blocks"]["cms"]["level_1"] = slow
    report = online.Session(config, still).observe(text)
    assert [level.dead for level in report.levels] == [False, True]
    assert report.warnings == ["level_1 (every 32 tokens) hardly learns"]


def test_what_cannot_be_read_is_refused(config, params):
    session = online.Session(config, params)
    digest = session.digest()
    assert session.observe("").tokens == 0 and str(session.observe(b"")) == "0 tokens read, 0 wait for a whole chunk"
    for tokens, message in (([256], "0 to 255; got 256"), ([-1], "got -1"), ([0.5], "integers; got float64")):
        with pytest.raises(UserError, match=message):
            session.observe(tokens)  # type: ignore[arg-type]
    for options in ({"max_tokens": 0}, {"temperature": float("nan")}, {"temperature": -1.0}, {"top_k": -1}):
        with pytest.raises(UserError, match="max_tokens must be at least 1"):
            session.generate("x", **options)
    with pytest.raises(UserError, match="below 2"):
        session.generate("x", seed=2**32)
    assert session.digest() == digest


def test_bytes_that_are_not_utf8_are_bytes(config, params):
    session, same = online.Session(config, params), online.Session(config, params)
    session.observe(b"\xff\xfe\x00 caf\xc3")
    same.observe(list(b"\xff\xfe\x00 caf\xc3"))
    assert session.digest() == same.digest() and session.tokens == 8
