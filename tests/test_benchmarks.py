"""The benchmark of optimizer steps times what it says: nothing here looks at a clock."""

import jax
import numpy as np
import pytest

from benchmarks import optimizers, pool
from benchmarks.__main__ import NAMES, run_optimizers, run_pool
from hope_jax.models import ModelConfig
from hope_kernels.benchmarking import Timing
from tests.oracles import compiled


@pytest.fixture(scope="module")
def tiny():
    functions, args, per_parameter = optimizers.cases(12 * 8**2 * 2, 8)
    return {name: compiled(f)(args) for name, f in functions.items()}, args, per_parameter


def test_every_rule_moves_the_same_parameters(tiny):
    stepped, (params, _, _), _ = tiny
    assert params["w_up"].shape == (2, 8, 32)
    for name, (after, _) in stepped.items():
        for a, b in zip(*map(jax.tree.leaves, (after, params)), strict=True):
            assert np.any(a != b), name


def test_only_one_of_the_two_steps_of_m3_writes_the_slow_memory(tiny):
    stepped, *_ = tiny
    for name, written in ((optimizers.BETWEEN, False), (optimizers.AT, True)):
        slow = stepped[name][1].inner_states["matrix"].inner_state[0].slow[0]
        assert all(bool(np.any(x)) == written for x in jax.tree.leaves(slow.direction))
        assert all(bool(np.any(x)) != written for x in jax.tree.leaves(slow.pending))


def test_bytes_of_state(tiny):
    """Four trees for M3, two for AdamW and AdaMuon; Muon one, and two for the leaves that Adam takes."""
    *_, (params, _, _), per_parameter = tiny
    other = params["embedding"].size + params["norm"]["scale"].size
    count = sum(x.size for x in jax.tree.leaves(params))
    trees = {"muon": 1, "m3": 4, "adamuon": 2, "adamw": 2}
    for name, n in trees.items():
        want = 4 * (n * (count - other) + 2 * other) / count
        assert want <= per_parameter[name] < want + 32 / count  # and a few counts


def test_an_average_step():
    def timing(name, seconds):
        return Timing("", name, seconds, seconds, "muon", 1.0)

    timings = [timing("muon", 2.0), timing(optimizers.BETWEEN, 3.0), timing(optimizers.AT, 19.0)]
    assert optimizers.amortised(timings) == (4.0, 2.0)


@pytest.mark.slow
def test_it_is_among_the_names_and_prints_what_it_promises(capsys):
    assert {"optimizers", "optimizers_100m"} <= set(NAMES)
    timings = run_optimizers("tiny", 12 * 4**2, 4, repeats=1)
    assert [t.implementation for t in timings] == ["muon", optimizers.BETWEEN, optimizers.AT, "adamuon", "adamw"]
    out = capsys.readouterr().out
    assert "x muon" in out and out.count("bytes of state per parameter") == 4


@pytest.mark.slow
def test_the_pool_and_the_sessions_do_the_same_work(capsys):
    """Both have read and answered the same tokens; the answers leave no trace."""
    config = ModelConfig(dim=16, layers=1, memory="linear", cms_hidden=(32, 32), cms_chunks=(8, 32))
    timings = run_pool(config, users=2, read=20, answered=3, repeats=1)
    assert [t.implementation for t in timings] == [pool.SESSIONS, pool.POOL] * 2
    assert "MiB of state per user" in (out := capsys.readouterr().out) and out.count("tokens/s") == 4
    reading, answering, texts, _ = pool.cases(config, 2, 20, 3)
    np.testing.assert_allclose(reading[pool.POOL](texts), reading[pool.SESSIONS](texts), rtol=1e-5)
    assert list(answering[pool.POOL](texts).values()) == answering[pool.SESSIONS](texts)
