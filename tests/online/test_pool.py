"""A pool against its users alone, bit for bit, and against sessions; what a slot leaves behind; refusals."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax import online
from hope_jax.models import ModelConfig, build_lm
from hope_jax.online import Owner, Pool, Session, ema, never
from hope_jax.online.answer import choices
from hope_jax.online.slots import put
from hope_jax.training.errors import UserError

SLOTS = 4
USERS = ("ann", "bob", "cid", "dan", "eve", "fay")
OPTIONS = {"gate": ema(1.0), "max_moved": 0.05}
BASE = ModelConfig(dim=16, layers=1, memory_hidden=8, cms_hidden=(32, 32), cms_chunks=(8, 32), cms_eta=0.5)
CONFIGS = {
    "attention": dataclasses.replace(BASE, name="hope_attention", max_length=48),  # contexts become full
    "linear": dataclasses.replace(BASE, memory="linear"),
}


class Model(NamedTuple):
    config: ModelConfig
    params: Any
    together: bool = False

    def pool(self, slots=SLOTS, **options):
        return Pool(self.config, self.params, slots, together=self.together, **OPTIONS | options)

    def session(self, **options):
        return Session(self.config, self.params, **OPTIONS | options)


def made(name, together):
    config = CONFIGS[name]
    return Model(config, build_lm(config).init(jax.random.key(0)), together)


@pytest.fixture(scope="module", params=[False, True], ids=["in turn", "together"])
def attention(request):
    return made("attention", request.param)


@pytest.fixture(scope="module", params=[False, True], ids=["in turn", "together"])
def linear(request):
    return made("linear", request.param)


# A script is a list of events: ("admit", user, "left" or "copy"), ("evict", user, through a file), ("copy", user,
# through a file), ("forget", user, level), ("score", user, tokens), ("observe", {user: (tokens, allowed)}) and
# ("ask", {user: (prompt, seed)}, options of `generate`). Who is admitted goes on from where they left, or from their
# last copy.


SHARES = {"admit": 0.2, "evict": 0.1, "copy": 0.1, "restore": 0.1}
SHARES |= {"forget": 0.1, "score": 0.1, "observe": 0.2, "ask": 0.1}
LEVELS = ("fast", "level_1", 1, "context", "all")


def random_script(seed, length=40):
    rng = np.random.default_rng(seed)
    inside, copied = [], set()
    script: list[Any] = []
    while len(script) < length:
        outside = [user for user in USERS if user not in inside]
        some = [user for user in inside if rng.random() < 0.6]
        kinds, shares = zip(*SHARES.items(), strict=True)
        kind = str(rng.choice(kinds, p=shares))
        if kind == "admit" and len(inside) < SLOTS:
            inside.append(user := str(rng.choice(outside)))
            script.append(("admit", user, "left"))
        if kind == "restore" and (back := [user for user in inside if user in copied]):
            user = str(rng.choice(back))
            script += [("evict", user, False), ("admit", user, "copy")]
        if kind in ("evict", "copy") and inside:
            user = str(rng.choice(inside))
            script.append((kind, user, bool(rng.random() < 0.5)))
            if kind == "evict":
                inside.remove(user)
            else:
                copied.add(user)
        if kind == "forget" and inside:
            script.append((kind, str(rng.choice(inside)), LEVELS[rng.integers(len(LEVELS))]))
        if kind == "score" and inside:
            script.append((kind, str(rng.choice(inside)), rng.integers(97, 123, rng.choice([2, 9, 60]))))
        if kind == "observe" and some:
            lengths = rng.choice([0, 1, 5, 8, 9, 40, 150], len(some))
            texts = {
                user: (rng.integers(97, 123, n), bool(rng.random() < 0.8))
                for user, n in zip(some, lengths, strict=True)
            }
            script.append(("observe", texts))
        if kind == "ask" and some:
            options = {"learn": bool(rng.random() < 0.7), "learn_on_generated": bool(rng.random() < 0.5)}
            options |= {"max_tokens": int(rng.integers(1, 14)), "top_k": int(rng.choice([0, 5]))}
            script.append(("ask", {user: ("so "[: rng.integers(4)], int(rng.integers(99))) for user in some}, options))
    return script


def play(model, script, folder, only=USERS, slots=None):
    """Everything that happened to each of the users, and their sessions at the end.

    `slots`: where each admission has to go, in order; else to the first free slot.
    """
    pool, log, placed = model.pool(), {user: [] for user in only}, []
    kept = {"left": {}, "copy": {}}
    for kind, who, *rest in script:
        if isinstance(who, str):
            if who not in only:
                continue
            if kind == "admit":
                fillers = [f"filler {i}" for i in range(slots[len(placed)])] if slots else []
                for user in fillers:
                    pool.admit(user)
                session, digest = kept[rest[0]].get(who) or (None, model.session().digest())
                pool.admit(who, session)
                for user in fillers:
                    pool.evict(user)
                placed.append([owner.user for owner in pool.owners].index(who))
                assert pool.session(who).digest() == digest
            elif kind == "forget":
                pool.forget(who, *rest)
            elif kind == "score":
                log[who].append(pool.score(who, *rest))
            else:
                session = pool.evict(who) if kind == "evict" else pool.session(who)
                log[who].append(digest := session.digest())
                if rest[0]:
                    session.save(folder / who, overwrite=True)
                    session = online.open(folder / who, model.config, model.params)
                kept["left" if kind == "evict" else "copy"][who] = session, digest
            continue
        who = {user: given for user, given in who.items() if user in only}
        if not who:
            continue
        first, second = ({user: given[i] for user, given in who.items()} for i in (0, 1))
        if kind == "observe":
            results = {user: told(one) for user, one in pool.observe(first, update_allowed=second).items()}
        else:
            results = pool.generate(first, seed=second, **rest[0])
        for user, result in results.items():
            log[user].append(result)
    left = {user: session for user, (session, _) in kept["left"].items()}
    return log, left | {user: pool.session(user) for user in pool.users}, placed


def told(report):
    """A report as values that can be compared, to the bit."""
    return repr(report._replace(chunks=None)), [leaf.tobytes() for leaf in report.chunks]


def play_session(model, script: list[Any], user):
    session, texts, scores = model.session(), [], []
    kept = {"left": session, "copy": session}
    for kind, who, *rest in script:
        if kind == "admit" and who == user:
            session = kept[rest[0]].fork()
        if kind in ("evict", "copy") and who == user:
            kept["left" if kind == "evict" else "copy"] = session.fork()
        if kind == "forget" and who == user:
            session.forget(*rest)
        if kind == "score" and who == user:
            scores.append(session.score(*rest))
        if kind == "observe" and user in who:
            session.observe(who[user][0], update_allowed=who[user][1])
        if kind == "ask" and user in who:
            texts.append(session.generate(who[user][0], seed=who[user][1], **rest[0]))
    return session, texts, scores


def assert_close(session, other):
    """Float32 sums in another order, over a few hundred tokens."""
    (state, place), (other_state, other_place) = session.snapshot(), other.snapshot()
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    for a, b in zip(jax.tree.leaves(place), jax.tree.leaves(other_place), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed", range(3))
def test_nobody_sees_that_there_are_others(attention, seed, tmp_path):
    check_that_nobody_sees_others(attention, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 8))
def test_nobody_sees_that_there_are_others_in_other_memories(linear, seed, tmp_path):
    check_that_nobody_sees_others(linear, seed, tmp_path)


def check_that_nobody_sees_others(model, seed, folder):
    """Alone in the same slots: the same to the bit. As a session: the same up to the order of sums."""
    script = random_script(seed)
    log, sessions, placed = play(model, script, folder)
    admitted = [who for kind, who, *_ in script if kind == "admit"]
    for user in sessions:
        slots = [slot for who, slot in zip(admitted, placed, strict=True) if who == user]
        log_alone, alone, placed_alone = play(model, script, folder, (user,), slots)
        assert placed_alone == slots
        assert log[user] == log_alone[user]
        assert sessions[user].digest() == alone[user].digest()
        session, texts, scores = play_session(model, script, user)
        assert_close(sessions[user], session)
        np.testing.assert_allclose([nats for nats in log[user] if isinstance(nats, float)], scores, rtol=2e-4)
        assert texts == [text for text in log[user] if isinstance(text, str) and len(text) != 64]


def test_the_scripts_reach_everything():
    """Above all, copies whose owner has read more since; and sessions that come back, from memory or a file."""
    for seed in range(8):
        assert {kind for kind, *_ in random_script(seed)} == set(SHARES) - {"restore"}
    forgotten = {rest[0] for seed in range(3) for kind, _, *rest in random_script(seed) if kind == "forget"}
    assert forgotten == set(LEVELS)
    found = set()
    for seed in range(3):
        copied, stale, left = {}, set(), {}
        for kind, who, *rest in random_script(seed):
            if kind in ("observe", "ask"):
                stale |= set(who)
            elif kind == "copy":
                copied[who] = rest[0]
                stale -= {who}
            elif kind == "evict":
                left[who] = rest[0]
            elif kind == "admit" and rest[0] == "copy" and who in stale:
                found.add(("copy", copied[who]))
            elif kind == "admit" and rest[0] == "left" and who in left:
                found.add(("left", left[who]))
    assert found == {(where, through_file) for where in ("copy", "left") for through_file in (True, False)}


def test_nothing_is_compiled_again(attention, tmp_path):
    play(attention, random_script(0), tmp_path)
    pool = attention.pool()
    programs = *pool._programs, pool._stream.new_context, choices(False, 0), choices(False, 5)
    before = [program._cache_size() for program in programs]
    play(attention, random_script(3), tmp_path)
    assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize("value", [np.nan, 1e30])
def test_a_poisoned_neighbour_changes_nothing(attention, value):
    def run(poisoned):
        pool, texts = attention.pool(), {}
        for user in ("ann", "bob", "cid"):
            pool.admit(user)
        for i in range(3):
            pool.observe({user: f"what {user} says, and again, {i}" for user in pool.users})
            if poisoned:
                row = pool._rows["bob"]
                wrong = jax.tree.map(lambda leaf: filled(leaf, value), pool.session("bob").snapshot().state)
                pool._fill(row.slot, wrong, pool._rows)
            texts[i] = pool.generate(dict.fromkeys(pool.users, "? "), max_tokens=10)
        return [(pool.session(user).digest(), [text[user] for text in texts.values()]) for user in ("ann", "cid")]

    assert run(poisoned=True) == run(poisoned=False)


def filled(leaf, value):
    return jnp.full_like(leaf, value) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_an_interrupt_loses_nothing(attention, monkeypatch, interrupted):
    """Ctrl-C in the second of several programs of one call: the user can leave, and what was not read yet is read."""
    text = np.random.default_rng(0).integers(0, 256, 300).astype(np.uint8).tobytes()
    pool, unbroken = attention.pool(slots=1), attention.pool(slots=1)
    programs = pool._programs
    monkeypatch.setattr(pool, "_programs", programs._replace(advance=interrupted(programs.advance)))
    pool.admit("ann")
    with pytest.raises(KeyboardInterrupt):
        pool.observe({"ann": text})
    assert len(pool._rows["ann"].place.held.tokens) > pool._pace.size  # whole chunks wait
    unbroken.admit("ann")
    unbroken.observe({"ann": text})
    assert pool.evict("ann").digest() == unbroken.evict("ann").digest() and not pool.users


def test_an_interrupt_while_it_forgets_changes_nothing(attention, monkeypatch, interrupted):
    pool = attention.pool()
    pool.admit("ann")
    pool.observe({"ann": "a few chunks, and some more tokens"})
    pool.generate({"ann": "and"}, max_tokens=3)
    before = pool.session("ann")
    monkeypatch.setattr("hope_jax.online.pool.put", interrupted(put))
    with pytest.raises(KeyboardInterrupt):
        pool.forget("ann", "all")
    assert pool.session("ann").digest() == before.digest()
    assert pool.generate({"ann": "?"}, temperature=0) == {"ann": before.generate("?", temperature=0)}


@pytest.mark.parametrize("level", LEVELS)
def test_one_user_forgets_as_a_session_does(attention, level, tmp_path):
    """To the bit from where the pool has brought it, also after it was a file; the others do not notice."""
    pool, others = attention.pool(), ("ann", "cid")
    for user in (*others, "bob"):
        pool.admit(user)
    pool.observe({user: f"what {user} says, and a few chunks more than that" for user in pool.users})
    pool.generate(dict.fromkeys(pool.users, "so"), max_tokens=3)
    session, before = pool.session("bob"), {user: pool.session(user).digest() for user in others}
    pool.forget("bob", level)
    session.forget(level)
    assert pool.session("bob").digest() == session.digest()
    assert {user: pool.session(user).digest() for user in others} == before
    asked = {"max_tokens": 10, "temperature": 0}
    begins = "\n" if level in ("context", "all") else ""  # there is nothing to go on from
    for prompt in ("", begins):
        said = pool.generate({"bob": prompt}, learn=False, **asked)
        assert said == {"bob": session.generate(begins, learn=False, **asked)}

    pool.evict("bob").save(tmp_path / "bob")
    again = online.open(tmp_path / "bob", attention.config, attention.params)
    again.forget("context")
    session.forget("context")
    pool.admit("bob", again)
    pool.forget("bob")
    session.forget()
    assert pool.session("bob").digest() == session.digest()


def test_a_score_is_that_of_a_session_and_leaves_no_trace(attention):
    pool, text = attention.pool(), "what comes next, in more tokens than are left of the context " * 2
    for user in ("ann", "bob"):
        pool.admit(user)
    fresh = pool.score("ann", text)
    assert fresh == attention.session().score(text)
    pool.observe({"bob": text})
    pool.generate(dict.fromkeys(pool.users, "so"), max_tokens=3)
    before = bits(pool._state), bits(pool._ahead), [pool.session(user).digest() for user in pool.users]
    assert pool.score("bob", text) == pool.session("bob").score(text) < fresh
    assert (bits(pool._state), bits(pool._ahead), [pool.session(user).digest() for user in pool.users]) == before


def test_a_freed_slot_holds_no_trace(attention):
    pool = attention.pool()
    fresh = bits(pool._state)
    pool.admit("ann")
    pool.observe({"ann": "a secret that is long enough for a few chunks"})
    pool.generate({"ann": "and"}, max_tokens=3)
    assert bits(pool._state) != fresh
    pool.evict("ann")
    assert bits(pool._state) == fresh
    assert bits(pool._ahead.carry) == bits(pool._state.nest.carry) and not pool._ahead.logits_BV.any()
    assert pool.owners == (Owner(None, 1), *[Owner(None, 0)] * 3) and not pool._rows

    pool._state = jax.tree.map(lambda leaf: filled(leaf, np.nan), pool._state)  # what went wrong while it was free
    pool.admit("bob")
    assert pool.session("bob").digest() == attention.session().digest()
    assert pool.owners == (Owner("bob", 2), *[Owner(None, 0)] * 3)


def test_a_session_comes_and_goes(attention):
    copied = attention._replace(params=jax.tree.map(jnp.copy, attention.params))
    pool, session = attention.pool(), copied.session(seen=range(97, 123), run="runs/1")
    session.observe("what it read before it came here")
    before = session.digest()
    pool.admit("ann", session)
    assert pool.session("ann").digest() == before
    pool.observe({"ann": "what it read here"})
    assert session.digest() == before  # it is not the pool's
    copy, evicted = pool.session("ann"), pool.evict("ann")
    assert copy.digest() == evicted.digest()
    assert (evicted.run, evicted.tokens) == ("runs/1", session.tokens + 17)
    assert evicted.params is attention.params  # once in memory for all
    session.observe("what it read here")
    assert_close(evicted, session)
    evicted.observe("and it reads on, as any session does")
    session.observe("and it reads on, as any session does")
    assert_close(evicted, session)


def test_answers_end_one_by_one(attention):
    """By a text, by eviction, or by length; who is left does not notice."""
    users, prompts = USERS[:3], dict(zip(USERS, ("one", "two", "three"), strict=False))

    def asked():
        pool = attention.pool()
        for user in users:
            pool.admit(user)
        return pool

    whole = asked().generate(prompts, max_tokens=20, temperature=0)
    assert whole == {
        user: attention.session().generate(prompt, max_tokens=20, temperature=0) for user, prompt in prompts.items()
    }
    pool, texts = asked(), dict.fromkeys(users, "")
    evicted = None
    for i, (user, piece) in enumerate(pool.answer(prompts, max_tokens=20, temperature=0)):
        texts[user] += piece
        if i == 10:
            evicted = pool.evict("bob")
            pool.admit("bob")
            pool.observe({"bob": "somebody else of this name"})
    assert evicted and evicted.tokens < 23 and whole["bob"].startswith(texts["bob"].rstrip("�"))
    assert pool.session("bob").tokens == 26
    assert [texts[user] for user in ("ann", "cid")] == [whole[user] for user in ("ann", "cid")]

    pool = asked()
    pieces = pool.answer(prompts, max_tokens=20)
    pool.evict("bob")
    pool.admit("bob")
    assert not "".join(piece for user, piece in pieces if user == "bob")
    assert pool.session("bob").tokens == 0

    until = whole["ann"][5]
    pool = asked()
    ended = pool.generate(prompts, max_tokens=20, temperature=0, until=until)
    assert ended == {user: text.split(until)[0] for user, text in whole.items()}
    session = attention.session()
    session.generate(prompts["ann"], max_tokens=20, temperature=0, until=until)
    assert session.tokens == pool.session("ann").tokens

    before = [pool.session(user).digest() for user in users]
    pool.generate(prompts, learn=False)
    assert [pool.session(user).digest() for user in users] == before


def test_who_forgets_the_context_gets_no_more(attention):
    """Until there is something to go on from; who is left does not notice."""
    pool, alone = attention.pool(), attention.pool()
    for one in (pool, alone):
        one.admit("ann")
    pool.admit("bob")
    pieces, texts = pool.answer({"ann": "one", "bob": "two"}, max_tokens=20, seed=1), {"ann": "", "bob": ""}
    for i, (user, piece) in enumerate(pieces):
        texts[user] += piece if i < 8 or user == "ann" else piece.rstrip("�")
        if i == 7:
            pool.forget("bob", "context")
            said = texts["bob"]
    assert texts == {"ann": alone.generate({"ann": "one"}, max_tokens=20, seed=1)["ann"], "bob": said}
    assert pool.session("bob").tokens == 0


def test_refusals(attention):
    with pytest.raises(UserError, match="at least one slot; got slots=0"):
        attention.pool(0)
    pool = attention.pool()
    for user in ("ann", "bob", "dan", "eve"):
        pool.admit(user)
    with pytest.raises(UserError, match="'ann' is in the pool already"):
        pool.admit("ann")
    pool.observe({"ann": "hi"})
    full = r"no free slot for 'cid': all 4 are taken; evict a user \(longest idle: 'bob', 'dan', 'eve'\) or make"
    with pytest.raises(UserError, match=full):
        pool.admit("cid")
    pool.generate({"bob": "?"}, max_tokens=1, learn=False)
    with pytest.raises(UserError, match="longest idle: 'dan', 'eve', 'ann'"):
        pool.admit("cid")
    pool.forget("dan")
    pool.score("eve", "hi")
    with pytest.raises(UserError, match="longest idle: 'ann', 'bob', 'dan'"):
        pool.admit("cid")

    before = [pool.session(user).digest() for user in pool.users]
    for call in (
        pool.evict,
        pool.session,
        pool.forget,
        lambda user: pool.score(user, "hi"),
        lambda user: pool.observe({"ann": "more", user: "x"}),
    ):
        with pytest.raises(UserError, match="'cid' is not among the 4 users of the pool"):
            call("cid")
    with pytest.raises(UserError, match="'cid' is not among"):
        pool.answer({"ann": "?", "cid": "?"})
    with pytest.raises(UserError, match="tokens are 0 to 255"):
        pool.observe({"ann": "more", "bob": [300]})
    with pytest.raises(UserError, match="tokens are 0 to 255"):
        pool.score("ann", [300])
    with pytest.raises(UserError, match="nothing to score: 1 tokens"):
        pool.score("dan", "x")
    with pytest.raises(UserError, match="nothing is called 'level_9' in this session; it has fast, level_0"):
        pool.forget("ann", "level_9")
    with pytest.raises(UserError, match=r"update_allowed is one for all.*'bob' is in one only"):
        pool.observe({"ann": "more", "bob": "more"}, update_allowed={"ann": True})
    with pytest.raises(UserError, match="max_tokens must be at least 1"):
        pool.answer({"ann": "?"}, max_tokens=0)
    assert [pool.session(user).digest() for user in pool.users] == before

    pool.evict("bob")
    with pytest.raises(UserError, match="'bob' has the gate never"):
        pool.admit("bob", attention.session(gate=never()))
    params = jax.tree.map(lambda leaf: leaf + 1, attention.params)
    with pytest.raises(UserError, match="'bob' is of another model"):
        pool.admit("bob", Session(attention.config, params, **OPTIONS))
    assert pool.users == ("ann", "dan", "eve") and pool.owners[1] == Owner(None, 1)


def test_bytes_of_a_slot(attention):
    state = attention.session().snapshot().state
    assert attention.pool(3).slot_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
