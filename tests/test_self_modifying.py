"""Self-modifying Titans against the token loop of spec 7.2-7.5, and what it promises (7.6, 7.7)."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax import SelfModifyingConfig, Tokens, dgd, l2_regression, level, linear_memory, nest, self_modifying
from tests.oracles import (
    assert_close,
    compiled,
    float64,
    l2_unit,
    mlp_read,
    numpy64,
    primitives,
    self_modifying_loop,
    sigmoid,
    softplus,
)

BASE = SelfModifyingConfig(dim=3, memory_hidden=4, momentum=0.5, eta_init=0.1, alpha_init=0.95)
T = 48


def shaken(config, seed=0):
    """Parameters away from their special start values (identity filters, small read-outs), in float64."""
    rng = np.random.default_rng(seed)
    params = numpy64(self_modifying(config).init(jax.random.key(seed)))
    for name in ("conv", "gates"):
        params[name] = jax.tree.map(lambda w: w + 0.2 * rng.normal(size=w.shape), params.get(name, {}))
    return params


def stream(length, dim=3, seed=0):
    r = np.random.default_rng(seed).normal(size=(length, dim))
    return r / np.sqrt(np.mean(r**2, axis=-1, keepdims=True))


def whole_call(config, params, r):
    layer = self_modifying(config)
    return compiled(lambda p, r: layer.apply(p, layer.init_state(p), r))(float64(params), r)


def change(**switches):
    return dataclasses.replace(BASE, **switches)


# --- the token loop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(16, 16), (4, 16), (16, 4), (1, 1), (1, 8)])
def test_every_pair_of_clocks_is_the_token_loop(chunks, x64):
    config = change(chunk_proj=chunks[0], chunk_mem=chunks[1])
    params, r = shaken(config), stream(T)
    _, y = whole_call(config, params, r)
    want = self_modifying_loop(config, params, r)
    assert (
        np.abs(want - self_modifying_loop(change(chunk_proj=64, chunk_mem=64), params, r)).max() > 1e-3
    )  # memories matter
    assert_close(y, want)


SWITCHES = {
    "layerwise": {"mlp_rule": "layerwise"},
    "layerwise, momentum gate, running read": {"mlp_rule": "layerwise", "momentum": "gate", "read": "before"},
    "no momentum, no decay, printed step": {"momentum": None, "dgd_decay": False, "exact": False},
    "no momentum, running read": {"momentum": None, "read": "before"},
    "no retention, adaptive q": {"retention": False, "adaptive_q": True},
    "stage 2, static k": {"stage": 2, "static": ("k",)},
    "stage 1, running read": {"stage": 1, "read": "before"},
    "matrix memories": {"memory": "linear", "momentum": "gate"},
    "two heads, static k and v, no convolution": {"dim": 4, "heads": 2, "static": ("k", "v"), "conv_window": 0},
    "printed step, layerwise, no decay": {"exact": False, "mlp_rule": "layerwise", "dgd_decay": False},
    "two heads, wide convolution, adaptive q": {"dim": 4, "heads": 2, "conv_window": 6, "adaptive_q": True},
    "clipped errors": {"error_clip": 0.5},
    "values of unit norm": {"value_norm": True},
    "dot product": {"objective": "dot_product", "value_norm": True},
    "dot product of matrix memories, clipped": {"memory": "linear", "objective": "dot_product", "error_clip": 0.1},
    "hard surprise gate": {"surprise": 1.0, "error_clip": 0.5},
    "soft surprise gate of writing and forgetting": {
        "surprise": 1.0,
        "surprise_temperature": 0.5,
        "gate_retention": True,
    },
    "matrix memories, running read, stage 2": {"memory": "linear", "read": "before", "stage": 2},
}


SLOW = ("printed step, layerwise, no decay", "two heads, wide convolution, adaptive q")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SWITCHES])
def test_every_switch_is_the_token_loop(name, x64):
    """At clocks 2 and 4; each switch changes the numbers where the parameters are those of the default."""
    config = change(chunk_proj=2, chunk_mem=4, **SWITCHES[name])
    params, r = shaken(config), stream(12, config.dim)
    _, y = whole_call(config, params, r)
    assert_close(y, self_modifying_loop(config, params, r))
    if not {"dim", "static", "memory", "stage", "adaptive_q"} & set(SWITCHES[name]):
        assert np.abs(np.asarray(y) - self_modifying_loop(change(chunk_proj=2, chunk_mem=4), params, r)).max() > 1e-6


def test_float32(x64):
    """Spec test 32 in single precision: relative rms 2e-5."""
    config = change(chunk_proj=4, chunk_mem=8)
    params, r = shaken(config), stream(24)
    layer = self_modifying(config)
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, r))
    _, y = compiled(lambda p, r: layer.apply(p, jax.tree.map(_single, layer.init_state(p)), r))(*single)
    assert y.dtype == jnp.float32
    want = self_modifying_loop(config, params, r)
    assert np.sqrt(np.mean((y - want) ** 2) / np.mean(want**2)) < 2e-5


def _single(x):
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def test_masked_tokens_on_the_left_are_absent(x64):
    """Padding writes nothing and leaves nothing in the convolution; at C = 1 the clock does not tell either."""
    config = change(chunk_proj=1, chunk_mem=1)
    params, r = shaken(config), stream(9)
    layer, mask = self_modifying(config), np.arange(9) >= 3
    run = compiled(lambda p, r, m: layer.apply(p, layer.init_state(p), r, mask_T=m)[1])
    y = run(float64(params), r, mask)
    assert_close(y[3:], self_modifying_loop(config, params, r[3:]))
    holes = np.arange(9) % 4 != 2
    assert_close(run(float64(params), r, holes), self_modifying_loop(config, params, r, holes))


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(16, 16), pytest.param((4, 16), marks=pytest.mark.slow)])
def test_a_stream_may_be_cut_anywhere(chunks, x64):
    """5 + 1 + 17 + 25 tokens are 48, and so are 48 single ones with a traced state."""
    config = change(chunk_proj=chunks[0], chunk_mem=chunks[1])
    layer, params, r = self_modifying(config), shaken(config), stream(T)
    want = self_modifying_loop(config, params, r)
    params = float64(params)
    state, now = layer.init_state(params), 0
    apply = compiled(layer.apply, static_argnames="phase")
    for n in (5, 1, 17, 25):
        state, y = apply(params, state, r[now : now + n], phase=now)
        assert_close(y, want[now : now + n])
        now += n
    token = compiled(layer.apply)
    decoded = layer.init_state(params)
    for t in range(T):
        decoded, y = token(params, decoded, r[t : t + 1])
        assert_close(y[0], want[t])
    assert_close(decoded, state)


def test_no_tokens(x64):
    config = change(chunk_proj=2, chunk_mem=4)
    layer, params = self_modifying(config), float64(shaken(config))
    state = layer.init_state(params)
    same, y = layer.apply(params, state, jnp.zeros((0, 3)))
    assert y.shape == (0, 3)
    assert_close(same, state, 0)


# --- causality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["start", pytest.param("before", marks=pytest.mark.slow)])
def test_causality(read, x64):
    """d y_t / d r_s by Jacobian: exactly zero for s > t; with chunk-start reads exactly zero inside a chunk beyond
    the convolution (lag 3); not zero across chunks, nor inside one with running reads (spec 7.6)."""
    config = change(chunk_proj=6, chunk_mem=6, read=read, momentum=None)
    layer, params = self_modifying(config), float64(shaken(config))
    outputs = compiled(jax.jacrev(lambda r: layer.apply(params, layer.init_state(params), r)[1]))
    influence = np.abs(np.asarray(outputs(stream(12)))).max(axis=(1, 3))  # [T out, T in]
    t, s = np.indices(influence.shape)
    assert (influence[s > t] == 0).all()
    assert (influence[(s <= t) & (t - s <= 3)] > 0).all()
    assert (influence[t // 6 > s // 6] > 0).all()
    inside = (t // 6 == s // 6) & (t - s > 3)
    assert (influence[inside] == 0).all() if read == "start" else (influence[inside] > 0).all()


def test_running_reads_at_one_token_a_chunk_are_chunk_start_reads(x64):
    config = change(chunk_proj=1, chunk_mem=1)
    params, r = shaken(config), stream(8)
    _, y = whole_call(dataclasses.replace(config, read="before"), params, r)
    assert_close(y, self_modifying_loop(config, params, r))


# --- outer gradients --------------------------------------------------------------------------------------------------


def _outer(config, r):
    layer = self_modifying(config)

    def loss(params):
        _, y = layer.apply(params, layer.init_state(params), r)
        return jnp.mean((y - jnp.roll(r, 1, axis=0)) ** 2)

    return loss


@pytest.fixture(scope="module")
def gradient():
    """(config, stream, parameters, outer gradient) over two chunks of mem; every kind of parameter is present."""
    with jax.enable_x64(True):
        config = change(dim=4, heads=2, chunk_proj=2, chunk_mem=4, momentum="gate", adaptive_q=True, static=("v",))
        params, r = float64(shaken(config)), stream(8, 4)
        return config, r, params, compiled(jax.grad(_outer(config, r)))(params)


def test_every_parameter_has_an_outer_gradient(gradient, x64):
    """Start weights of every box, projections, filters and read-outs: finite and not zero (spec test 37)."""
    *_, g = gradient
    assert set(g["boxes"]) == {"k", "eta", "alpha", "q", "mem"}
    for path, leaf in jax.tree.leaves_with_path(g):
        assert np.isfinite(leaf).all(), path
        assert (leaf != 0).any(), path


def test_the_outer_gradient_is_the_finite_difference(gradient, x64):
    """Along one direction per group of parameters, relative 1e-6."""
    config, r, params, g = gradient
    loss = compiled(_outer(config, r))
    for seed, name in enumerate(
        [("boxes", "k"), ("boxes", "eta"), ("boxes", "mem"), ("gates", "alpha"), ("conv", "v")]
    ):
        rng = np.random.default_rng(seed)
        group = params[name[0]][name[1]]
        direction = jax.tree.map(lambda w, rng=rng: jnp.asarray(rng.normal(size=w.shape)), group)

        def moved(s, name=name, group=group, direction=direction):
            new = jax.tree.map(lambda w, d: w + s * d, group, direction)
            return loss({**params, name[0]: {**params[name[0]], name[1]: new}})

        h = 1e-4  # fourth order: error h^4 from truncation, 1e-16 / h from rounding
        want = float(8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
        along = jax.tree.map(lambda a, b: jnp.sum(a * b), g[name[0]][name[1]], direction)
        assert float(sum(jax.tree.leaves(along))) == pytest.approx(want, rel=1e-6)


def test_the_outer_gradient_goes_through_the_value(monkeypatch, x64):
    """Holding v-hat constant outside too writes the same and gives another meta-gradient (spec 7.4)."""
    config = change(chunk_proj=2, chunk_mem=2, momentum=None, conv_window=0)
    params, r = float64(shaken(config)), stream(4)
    value, full = compiled(jax.value_and_grad(_outer(config, r)))(params)
    module = importlib.import_module("hope_jax.self_modifying")  # the package's name for it is the function
    original = module.factored_errors

    def cut(memory, objective, start, key, v):
        return original(memory, objective, start, key, jax.lax.stop_gradient(v))

    monkeypatch.setattr(module, "factored_errors", cut)
    same, without = compiled(jax.value_and_grad(_outer(config, r)))(params)
    assert_close(same, value)
    for w in ("w1", "w2"):
        difference = jnp.abs(full["boxes"]["mem"][w] - without["boxes"]["mem"][w]).max()
        assert float(difference) > 1e-5


@pytest.mark.slow
def test_remat_changes_no_number(x64):
    config = change(chunk_proj=2, chunk_mem=4)
    params, r = float64(shaken(config)), stream(8)
    runs = [
        compiled(jax.value_and_grad(_outer(dataclasses.replace(config, remat=m), r)))(params) for m in (True, False)
    ]
    assert_close(*runs)


def test_no_conditionals():
    """Known and unknown clock, forward and backward (spec test 45)."""
    config = change(chunk_proj=2, chunk_mem=4)
    layer, r = self_modifying(config), jnp.asarray(stream(12), jnp.float32)
    params = layer.init(jax.random.key(0))
    state = layer.init_state(params)
    programs = [
        jax.make_jaxpr(lambda s: layer.apply(params, s, r, phase=0))(state),
        jax.make_jaxpr(lambda s: layer.apply(params, s, r))(state),
        jax.make_jaxpr(jax.grad(_outer(config, r)))(params),
    ]
    for program in programs:
        names = primitives(program.jaxpr)
        assert "scan" in names
        assert not names & {"cond", "while"}


# --- stability and start values ---------------------------------------------------------------------------------------


def test_without_writes_it_is_a_fixed_function(x64):
    """alpha = 1 and eta = 0: memories stay at their start, bit for bit, and every read is M_0(q) (spec test 38)."""
    config = change(chunk_proj=2, chunk_mem=4)
    params = shaken(config)
    for name, bias in (("eta", -1e4), ("alpha", 1e4)):
        params["gates"][name]["b"][:] = bias
    layer, r = self_modifying(config), stream(10)
    state, y = whole_call(config, params, r)
    fresh = layer.init_state(float64(params))
    for now, then in zip(state.levels, fresh.levels, strict=True):
        assert_close(now.start, then.start, 0)
        assert_close(now.running, then.running, 0)
    q = numpy64(r @ params["static"]["q"])
    padded = np.concatenate([np.zeros((3, 3)), q])
    mem = {n: w[0] for n, w in params["boxes"]["mem"].items()}
    for t in range(10):
        mixed = sum(params["conv"]["q"][i, 0] * padded[t + i] for i in range(4))
        assert_close(y[t], mlp_read(mem, l2_unit(mixed)))


@pytest.mark.parametrize("heads", [1, 4])
def test_gates_at_init(heads):
    """Spec test 40: mean alpha in [0.985, 0.995], mean eta within a factor 1.5 of eta_init, for unit-rms inputs."""
    config = SelfModifyingConfig(dim=32, heads=heads)
    params = numpy64(self_modifying(config).init(jax.random.key(0)))
    r = stream(64, 32)
    width = config.head_width
    x = (r @ params["in_proj"] if heads > 1 else r).reshape(64, heads, width) / np.sqrt(width)
    logits = {}
    for name in ("eta", "alpha"):
        p = params["gates"][name]
        read = [mlp_read({n: w[h] for n, w in params["boxes"][name].items()}, x[:, h]) for h in range(heads)]
        logits[name] = np.stack([y @ p["w"][h] + p["b"][h] for h, y in enumerate(read)])
    assert 0.985 <= sigmoid(logits["alpha"]).mean() <= 0.995
    assert 0.02 / 1.5 <= softplus(logits["eta"]).mean() <= 0.02 * 1.5


def test_gates_stay_in_their_range():
    """alpha <= 1 and eta >= 0 whatever the read-outs say: reads are finite and retention never amplifies."""
    config = change(chunk_proj=2, chunk_mem=2, momentum="gate")
    layer = self_modifying(config)
    params = layer.init(jax.random.key(0))
    params["gates"] = jax.tree.map(lambda w: 1e4 * jnp.sign(w), params["gates"])
    params["gates"]["eta"]["b"] = -1e6 + 0 * params["gates"]["eta"]["b"]  # no writes: only retention is left
    start = layer.init_state(params)
    state, y = layer.apply(params, start, jnp.asarray(stream(8), jnp.float32))
    assert np.isfinite(y).all()
    for old, new in zip(jax.tree.leaves(start.levels), jax.tree.leaves(state.levels), strict=True):
        assert (jnp.abs(new) <= jnp.abs(old)).all()


def test_examples_of_a_batch_are_isolated(x64):
    """Spec test 36: another example 0, bit for bit the same example 1."""
    config = change(chunk_proj=2, chunk_mem=2)
    layer, params = self_modifying(config), float64(shaken(config))
    run = compiled(jax.vmap(lambda r: layer.apply(params, layer.init_state(params), r)))
    first, second = run(np.stack([stream(6), stream(6, seed=1)])), run(np.stack([stream(6, seed=2), stream(6, seed=1)]))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert (a[1] == b[1]).all()
    assert (first[1][0] != second[1][0]).all()


def test_defaults_start_as_the_specification_says():
    """Identity filters, small read-outs, and boxes with different weights per head and name."""
    params = self_modifying(SelfModifyingConfig(dim=8, heads=2, momentum="gate")).init(jax.random.key(0))
    for kernel in params["conv"].values():
        assert (kernel[-1] == 1).all() and (kernel[:-1] == 0).all()
    assert float(params["gates"]["alpha"]["b"][0]) == pytest.approx(4.595, abs=1e-3)
    assert float(params["gates"]["eta"]["b"][0]) == pytest.approx(-3.902, abs=1e-3)
    assert float(params["gates"]["mu"]["b"][0]) == 0
    weights = [box["w1"][h] for box in params["boxes"].values() for h in range(2)]
    assert len({float(w.sum()) for w in weights}) == len(weights)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


def _equal_keys(rule, alpha, eta):
    """(M_C k, M_0 k, v) for a chunk of C = 16 equal pairs with a unit key, on a matrix memory."""
    rng = np.random.default_rng(0)
    k, v, w = rng.normal(size=3), rng.normal(size=3), rng.normal(size=(3, 3))
    k /= np.linalg.norm(k)
    n = nest(level(linear_memory(3, 3), rule, 16, objective=l2_regression))
    repeat = lambda x: jnp.tile(x, (16, 1))  # noqa: E731
    gates = {"eta": jnp.full(16, eta), "alpha": jnp.full(16, alpha)}
    state, _ = n.apply(
        n.init(({"w": jnp.asarray(w)},)), Tokens(repeat(k), repeat(v), eta=gates["eta"], alpha=gates["alpha"])
    )
    return k @ state.levels[0].start["w"], k @ w, v


@pytest.mark.parametrize("alpha, step", [(1.0, 0.9), (0.97, 0.4)])
def test_decay_keeps_a_chunk_of_equal_keys_stable(alpha, step, x64):
    """(S7.8): the factor of the old content for DGD and for plain gradient descent, eta' = `step`."""
    eta = step / (1 - step)  # ||k|| = 1: eta' = eta / (1 + eta)
    a, c = alpha - step, 16
    total = (1 - a**c) / (1 - a)
    got, old, v = _equal_keys(dgd(), alpha, eta)
    assert_close(got, (a**c - step * total) * old + step * total * v, 1e-10)
    sums = c if alpha == 1 else (1 - alpha**c) / (1 - alpha)
    got, old, v = _equal_keys(dgd(decay=False), alpha, eta)
    assert_close(got, (alpha**c - step * sums) * old + step * sums * v, 1e-10)


def test_the_fixed_point_is_half_the_value(x64):
    """(S7.9): C = 1, alpha = 1, 2 M k = v; without the decay term M k = v."""
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 3))
    k /= np.linalg.norm(k)
    for rule, want in ((dgd(0.5), v / 2), (dgd(0.5, decay=False), v)):
        n = nest(level(linear_memory(3, 3, 1.0), rule, 1, objective=l2_regression))
        params = float64(n.params(jax.random.key(0)))
        state, _ = n.apply(n.init(params), Tokens(jnp.tile(k, (100, 1)), jnp.tile(v, (100, 1))))
        assert_close(k @ state.levels[0].start["w"], want, 1e-10)


# --- switches and errors ----------------------------------------------------------------------------------------------


def test_a_switch_changes_only_what_it_names():
    """Spec test 44: start weights have the same names and shapes, except for boxes made static."""
    shapes = lambda c: jax.tree.map(jnp.shape, jax.eval_shape(self_modifying(c).init, jax.random.key(0))["boxes"])  # noqa: E731
    default = shapes(BASE)
    assert set(default) == {"k", "v", "eta", "alpha", "mem"}
    same = ({"dgd_decay": False}, {"momentum": None}, {"retention": False}, {"stage": 2}, {"exact": False})
    same += ({"mlp_rule": "layerwise"}, {"read": "before"}, {"conv_window": 0}, {"remat": False})
    same += ({"error_clip": 0.5}, {"value_norm": True}, {"surprise": 1.0, "gate_retention": True})
    for switch in same:
        assert shapes(change(**switch)) == default
    for box in ("k", "v"):
        assert shapes(change(static=(box,))) == {n: s for n, s in default.items() if n != box}
    assert shapes(change(stage=1)) == {"mem": default["mem"]}
    assert shapes(change(adaptive_q=True)) == default | {"q": default["mem"]}


@pytest.mark.parametrize(
    "switch, message",
    [
        ({"dim": 5, "heads": 2}, "dim=5, heads=2"),
        ({"memory": "deep"}, "'deep'"),
        ({"stage": 4}, "4"),
        ({"read": "after"}, "'after'"),
        ({"mlp_rule": "none"}, "'none'"),
        ({"static": ("q",)}, "'q'"),
        ({"surprise": -1.0}, "must not be negative; got -1.0"),
        ({"chunk_proj": 4, "chunk_mem": 6}, r"\[4, 6\]"),
    ],
)
def test_what_is_refused(switch, message):
    with pytest.raises(ValueError, match=message):
        self_modifying(change(**switch))
