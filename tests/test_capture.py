"""`dgd` for the layers of ordinary networks: factors of one backward pass, and what the rules make of them (spec 3)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hope_jax import (
    Outer,
    add_delta_decay,
    contract,
    dgd,
    factor_labels,
    gram,
    heavy_ball,
    local_surprise,
    mean_factors,
    minibatch,
    value_and_factors,
)
from hope_jax.models import ModelConfig, build_lm
from hope_jax.types import is_outer
from tests.oracles import assert_close, compiled, float64, gelu, gelu_slope, numpy64, proximal, write

N, K, F, V = 6, 3, 5, 2  # all different: a shape says which array it is
FACTORED, DENSE = "factored", "dense"


def _mlp(params: Any, x: jax.Array) -> jax.Array:
    hidden = jax.nn.gelu(x @ params["w1"] + params["b1"][None])
    return hidden @ params["w2"]


def _mlp_loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(jnp.square(_mlp(params, x) - y))


def _mlp_data(rng) -> tuple[Any, Any, Any]:
    draw = lambda *shape: rng.normal(size=shape)  # noqa: E731
    params = {"w1": draw(K, F) / K**0.5, "b1": 0.1 * draw(F), "w2": draw(F, V) / F**0.5}
    return params, draw(N, K), draw(N, V)


def _mlp_factors(params, x, y) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By hand in float64: weight -> (inputs [N, K], errors at the output [N, V])."""
    z = x @ params["w1"] + params["b1"]
    error = gelu(z) @ params["w2"] - y
    return {"w1": (x, gelu_slope(z) * (error @ params["w2"].T)), "w2": (gelu(z), error)}


def _check(loss: Any, params: Any, *args: Any, labels: Any = None, length: int = 64) -> Any:
    """Same value and gradient as `jax.value_and_grad`, and factors exactly where the labels say; the errors."""
    if labels is not None:
        assert factor_labels(loss, params, *args) == labels
    both = lambda *args: (value_and_factors(loss)(*args), jax.value_and_grad(loss)(*args))  # noqa: E731
    (value, errors), (want, gradients) = compiled(both)(params, *args)
    got = contract(errors)
    assert jax.tree.structure(got) == jax.tree.structure(gradients)
    eps = 8 * float(jnp.finfo(value.dtype).eps) * length**0.5
    np.testing.assert_allclose(value, want, rtol=eps, atol=eps)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(gradients), strict=True):
        atol = eps * max(float(np.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a, b, rtol=eps, atol=atol, err_msg=jax.tree_util.keystr(path))
    return errors


def test_factors_of_an_mlp_are_its_inputs_and_errors(x64, rng):
    params, x, y = _mlp_data(rng)
    errors = _check(_mlp_loss, params, x, y)
    for name, (key, delta) in _mlp_factors(params, x, y).items():
        assert_close(tuple(errors[name]), (delta, key))


class _NNXModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first, self.norm = nnx.Linear(K, F, rngs=rngs), nnx.LayerNorm(F, rngs=rngs)
        self.last = nnx.Linear(F, V, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(nnx.relu(self.first(x))))


def test_an_nnx_model_is_a_function_of_its_state(rng):
    graph, shapes = nnx.split(nnx.eval_shape(lambda: _NNXModel(nnx.Rngs(0))), nnx.Param)
    params = jax.tree.map(lambda s: _of(s.shape, rng), shapes)
    x, y = jnp.asarray(rng.normal(size=(2, N, K)), jnp.float32), jnp.ones((2, N, V))

    def loss(params, x, y):
        return jnp.mean(jnp.square(nnx.merge(graph, params)(x) - y))

    errors = nnx.to_pure_dict(_check(loss, params, x, y))
    assert {name: is_outer(e["kernel"]) for name, e in errors.items() if "kernel" in e} == {"first": True, "last": True}
    assert errors["first"]["kernel"].key.shape == (2 * N, K)  # batch and time are tokens
    assert_close(errors["first"]["kernel"].key, x.reshape(-1, K), 0)
    labels = factor_labels(loss, params, x, y)
    tx = optax.partition({FACTORED: dgd(0.1), DENSE: optax.sgd(0.1)}, labels)
    updates, _ = jax.eval_shape(lambda p: tx.update(value_and_factors(loss)(p, x, y)[1], tx.init(p), p), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def _transformer(**options: Any) -> tuple[Any, Any, Any]:
    config: Any = dict(name="transformer", dim=8, layers=2, heads=2, vocab_size=11, max_length=8) | options
    lm, rng = build_lm(ModelConfig(**config)), np.random.default_rng(0)
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    normal = lambda s: jnp.asarray(rng.normal(size=s.shape) / s.shape[-2] ** 0.5, jnp.float32)  # noqa: E731
    params: Any = jax.tree_util.tree_map_with_path(
        lambda path, s: jnp.ones(s.shape) if "scale" in jax.tree_util.keystr(path) else normal(s), shapes
    )
    tokens = rng.integers(0, 11, (3, 7))

    def loss(params, tokens):
        _, logits = lm.apply(params, lm.init_state(params, tokens.shape[0]), tokens[:, :-1], phase=0)
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:]).mean()

    return loss, params, tokens


MIXER = dict.fromkeys(("wk", "wo", "wq", "wv"), FACTORED)
MLP = dict.fromkeys(("w_down", "w_gate", "w_up"), FACTORED) | {"norm": {"scale": DENSE}}
TRANSFORMER = {
    "blocks": {"mixer": MIXER, "mixer_norm": {"scale": DENSE}, "mlp": MLP},
    "embedding": DENSE,
    "final_norm": {"scale": DENSE},
}


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_a_tied_head_is_no_layer(remat):
    loss, params, tokens = _transformer(remat=remat)
    assert factor_labels(loss, params, tokens) == TRANSFORMER


def test_factors_of_a_transformer():
    """Layers under a scan; a head of its own is a layer."""
    loss, params, tokens = _transformer(tie_embeddings=False)
    errors = _check(loss, params, tokens, labels=TRANSFORMER | {"head": FACTORED})
    wq, wk = (errors["blocks"]["mixer"][name] for name in ("wq", "wk"))
    assert wq.key.shape == wq.delta.shape == (2, 3 * 6, 8)  # [L, C, K]
    assert_close(wq.key, wk.key, 0)  # the same input
    first = params["embedding"][tokens[:, :-1]].reshape(-1, 8)
    normed = first / jnp.sqrt(jnp.mean(first**2, axis=-1, keepdims=True) + 1e-6)
    assert_close(wq.key[0], normed, 1e-5)  # tokens in their order


def test_a_cast_weight_is_a_layer(rng):
    """The factors stay in the compute dtype; `jax.grad` rounds once more, to the weight's."""
    loss = lambda w: jnp.sum(jnp.sin((jnp.bfloat16(X) @ w.astype(jnp.bfloat16)).astype(jnp.float32)))  # noqa: E731
    w = _of((K, V), rng)
    tx: Any = minibatch(optax.sgd(-1.0))

    def both(w):
        error = value_and_factors(loss)(w)[1]
        assert error.key.dtype == error.delta.dtype == jnp.bfloat16
        return tx.update(error, tx.init(w), w)[0], jax.grad(loss)(w)

    got, want = compiled(both)(w)
    assert got.dtype == w.dtype
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=2**-7 * np.abs(want).max())


def test_factors_in_the_compute_dtype():
    loss, params, tokens = _transformer(dtype="bfloat16")
    _, errors = jax.eval_shape(value_and_factors(loss), params, tokens)
    wq = errors["blocks"]["mixer"]["wq"]
    assert wq.key.dtype == wq.delta.dtype == jnp.bfloat16
    for layers in (dgd(0.1), minibatch(dgd(0.1))):
        tx = optax.partition({FACTORED: layers, DENSE: optax.sgd(0.1)}, TRANSFORMER)
        updates, _ = jax.eval_shape(lambda p, e, tx=tx: tx.update(e, tx.init(p), p), params, errors)
        assert jax.tree.map(lambda u: (u.shape, u.dtype), updates) == jax.tree.map(lambda p: (p.shape, p.dtype), params)


def _scan(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, w)


def _nested_scan(w, x):
    return jax.lax.scan(lambda x, w: _scan(w, x), x, w, reverse=True)[0]


X: Any = np.random.default_rng(3).normal(size=(4, N, K)).astype(np.float32)
SQUARE = (4, K, K)
LAYERS = {
    "plain": ((K, V), lambda w: jnp.tanh(X @ w)),
    "einsum": ((K, V), lambda w: jnp.tanh(jnp.einsum("btk,kv->vbt", X, w))),
    "weight first": ((K, V), lambda w: jnp.tanh(jax.lax.dot_general(w, X, (((0,), (2,)), ((), ()))))),
    "jit": ((K, V), lambda w: jax.jit(lambda w, x: (jnp.tanh(x @ w), w))(w, X)[0]),
    "vmap over tokens": ((K, V), lambda w: jax.vmap(jax.vmap(lambda x: jnp.tanh(x @ w)))(X)),
    "vmap over weights": ((4, K, V), lambda w: jax.vmap(lambda w, x: jnp.tanh(x @ w))(w, X)),
    "vmap over inner axis": ((N, K, V), lambda w: jax.vmap(lambda w, x: jnp.tanh(x @ w), (0, 1), 2)(w, X)),
    "weights first": ((4, K, V), lambda w: jnp.tanh(jax.lax.dot_general(w, X, (((1,), (2,)), ((0,), (0,)))))),
    "scan": (SQUARE, lambda w: _scan(w, X)[0]),
    "nested scan": ((2, *SQUARE), lambda w: _nested_scan(w, X)),
    "scan of vmap": ((2, *SQUARE), lambda w: jax.vmap(lambda w, x: _scan(w, x)[0], (1, 0))(w, X)),
    "recomputed": (SQUARE, lambda w: jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), X, w)[0]),
}


@jax.custom_jvp
def _opaque(w):
    return X @ w


_opaque.defjvp(lambda primals, tangents: (_opaque(*primals), X @ tangents[0]))

OTHERS = {
    "used twice": ((K, K), lambda w: X @ w @ w),
    "used beside": ((K, V), lambda w: jnp.sum(X @ w) + jnp.sum(w**2)),
    "used at every step": ((K, K), lambda w: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), X, None, 3)[0]),
    "carried": ((K, K), lambda w: jax.lax.scan(lambda c, _: ((c[0], jnp.tanh(c[1] @ c[0])), None), (w, X), None, 3)[0]),
    "scanned and returned": (SQUARE, lambda w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), w), X, w)),
    "transposed": ((V, K), lambda w: X @ w.T),
    "summed over its columns": ((V, K), lambda w: jnp.einsum("btk,vk->btv", X, w)),
    "three axes": ((K, 2, V), lambda w: jnp.einsum("btk,khv->bthv", X, w)),
    "element-wise": ((K,), lambda w: X * w[None, None]),
    "conditional": ((K, V), lambda w: jax.lax.cond(w[0, 0] > 9, lambda w: X @ w, lambda w: X @ w + 1, w)),
    "custom derivative": ((K, V), lambda w: _opaque(w)),
    "stopped": ((K, V), lambda w: X @ jax.lax.stop_gradient(w)),
    "part": ((2, K, V), lambda w: X @ w[1]),
    "unused": ((K, V), lambda w: X),
}


def _of(shape, rng):
    return jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)


def _total(tree):
    return sum(jnp.sum(leaf * leaf) + jnp.sum(leaf) for leaf in jax.tree.leaves(tree))


def test_a_layer_by_any_name_and_what_is_none(rng):
    """All cases in one program, each a leaf of its own: what is no layer gets its dense gradient."""
    cases = LAYERS | OTHERS
    params = {name: _of(shape, rng) for name, (shape, _) in cases.items()}
    loss = lambda params: sum(_total(f(params[name])) for name, (_, f) in cases.items())  # noqa: E731
    labels = dict.fromkeys(LAYERS, FACTORED) | dict.fromkeys(OTHERS, DENSE)
    errors = _check(loss, params, labels=labels, length=X.size)
    for name, (shape, _) in LAYERS.items():
        assert errors[name].key.shape[:-2] == errors[name].delta.shape[:-2] == shape[:-2]


def test_a_product_of_two_weights_has_no_input(rng):
    """a^T b contracts the rows of both: neither is the other's token."""
    params = {"a": _of((K, 4), rng), "b": _of((K, V), rng), "layer": _of((K, V), rng)}
    loss = lambda p: _total(X @ p["layer"]) + _total(p["a"].T @ p["b"])  # noqa: E731
    assert factor_labels(loss, params) == {"a": DENSE, "b": FACTORED, "layer": FACTORED}  # b's inputs are a.T
    loss = lambda p: _total(X @ p["layer"]) + _total(jax.lax.dot_general(p["a"], p["b"], (((0,), (0,)), ((), ()))))  # noqa: E731
    assert factor_labels(loss, params) == {"a": DENSE, "b": DENSE, "layer": FACTORED}


def _products(jaxpr) -> list[tuple[int, ...]]:
    """Shapes of all matrix products of a program."""
    shapes = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            shapes.append(eqn.outvars[0].aval.shape)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            shapes += _products(inner) if hasattr(inner, "eqns") else []
    return shapes


def test_one_backward_pass_without_dense_gradients(rng):
    """Two products forward and two back: the gradients' own are missing, and nothing is computed twice.

    The error of x itself, which `jax.grad` does not compute, is dead code to the compiler.
    """
    params, x, y = _mlp_data(rng)
    factored, dense = (
        _products(jax.make_jaxpr(transform(_mlp_loss))(params, x, y).jaxpr)
        for transform in (value_and_factors, jax.value_and_grad)
    )
    assert sorted(factored) == sorted([(N, F), (N, V), (N, F), (N, K)])
    gradients = {(K, F), (F, K), (F, V), (V, F)}
    assert len([s for s in dense if s not in gradients]) == len(factored) - 1 == len(dense) - 2


def test_auxiliary_outputs_and_keywords(rng):
    """Among them a layer's own weight, and arguments that are no arrays."""
    params, x, y = _mlp_data(rng)

    def loss(params, x, *, y, scale, kind):
        assert kind == "plain"
        return scale * _mlp_loss(params, x, y), {"weights": params, "x": x}

    captured = lambda p: value_and_factors(loss, has_aux=True)(p, x, y=y, scale=2.0, kind="plain")  # noqa: E731
    (value, aux), errors = compiled(captured)(params)
    want, gradients = compiled(jax.value_and_grad(_mlp_loss))(params, x, y)
    np.testing.assert_allclose(value, 2 * want, rtol=1e-6)
    assert_close(aux, {"weights": float32(params), "x": x}, 1e-7)
    assert_close(contract(errors), jax.tree.map(lambda g: 2 * g, gradients), 1e-5)


def float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def test_factors_are_differentiable(x64, rng):
    """The loss after one mini-batch step, differentiated through the step, is that with dense gradients."""
    params, x, y = float64(_mlp_data(rng))
    eta = 0.05

    def after(params, factored):
        if factored:
            _, errors = value_and_factors(_mlp_loss)(params, x, y)
            tx: Any = minibatch(optax.chain(add_delta_decay(), optax.sgd(eta)))
            updates, _ = tx.update(errors, tx.init(params), params)
            return _mlp_loss(optax.apply_updates(params, updates), x, y)
        g = jax.grad(_mlp_loss)(params, x, y)
        hidden = jax.nn.gelu(x @ params["w1"] + params["b1"][None])
        decay = {"w1": x.T @ x @ params["w1"], "b1": 0.0, "w2": hidden.T @ hidden @ params["w2"]}
        return _mlp_loss(jax.tree.map(lambda p, g, d: p - eta * (g + d), params, g, decay), x, y)

    assert_close(*compiled(lambda p: [jax.grad(after)(p, factored) for factored in (True, False)])(params))


def test_local_surprise_is_the_error_at_each_output(x64, rng):
    params, x, y = _mlp_data(rng)
    surprise = compiled(lambda p: local_surprise(_mlp_loss, p, x, y))(params)
    assert surprise["b1"] is None
    for name, (_, delta) in _mlp_factors(params, x, y).items():
        assert_close(tuple(surprise[name]), (jnp.asarray(delta), jnp.asarray(np.linalg.norm(delta, axis=-1))))


def test_no_surprise_has_a_finite_gradient():
    x, w = jnp.eye(2), jnp.ones((2, 3))
    size = lambda y: local_surprise(lambda w: 0.5 * jnp.sum((x @ w - y) ** 2), w).norm.sum()  # noqa: E731
    value, slope = compiled(jax.value_and_grad(size))(x @ w)
    assert value == 0
    assert np.isfinite(slope).all()


def test_local_surprise_of_a_transformer_is_per_layer_and_token():
    loss, params, tokens = _transformer()
    surprise = jax.eval_shape(lambda p: local_surprise(loss, p, tokens), params)
    assert surprise["blocks"]["mlp"]["w_down"].norm.shape == (2, 3 * 6)
    assert surprise["embedding"] is None


RULES = {
    "tokens": lambda eta: dgd(eta),
    "exact": lambda eta: minibatch(dgd(eta)),
    "first order": lambda eta: minibatch(dgd(eta, exact=False)),
}


def _step_by_hand(rule, start, key, delta, eta):
    if rule == "tokens":
        for k, d in zip(key, delta, strict=True):
            step = proximal(eta, k)
            start, _ = write(start, 0, k, -step * d, step)
        return start
    a, g = key.T @ key, key.T @ delta
    if rule == "exact":
        return np.linalg.solve(np.eye(len(a)) + eta * a, start - eta * g)
    return start - eta * (a @ start + g)


@pytest.mark.parametrize(
    "rule, mean", [(r, None) for r in RULES] + [("tokens", "tokens"), ("exact", 4), ("first order", "tokens")]
)
def test_every_form_of_the_step_on_captured_factors(rule, mean, x64, rng):
    """(S3.2) token by token, (S3.3), (S3.4); the rule for a mean is the rule on the sum with eta / n."""
    params, x, y = _mlp_data(rng)
    n = {None: 1, "tokens": N, 4: 4}[mean]
    eta = 0.3
    loss = lambda p: _mlp_loss(p, x, y) / n  # noqa: E731
    labels = factor_labels(loss, params)
    layers: Any = RULES[rule](eta)
    layers = layers if mean is None else optax.chain(mean_factors(mean), layers)
    tx: Any = optax.partition({FACTORED: layers, DENSE: optax.sgd(0.1)}, labels)
    update = lambda p: tx.update(value_and_factors(loss)(p)[1], tx.init(p), p)[0]  # noqa: E731
    after = numpy64(optax.apply_updates(params, compiled(update)(params)))
    for name, (key, delta) in _mlp_factors(params, x, y).items():
        assert_close(after[name], _step_by_hand(rule, params[name], key, delta, eta / n))
    assert_close(after["b1"], params["b1"] - 0.1 * _mlp_factors(params, x, y)["w1"][1].sum(0) / n)


def test_stacked_layers_step_alone(x64, rng):
    """[L, K, V] under a scan: each matrix takes its own step."""
    w, x = rng.normal(size=(2, K, K)) / 2, rng.normal(size=(N, K))

    def steps(w):
        _, error = value_and_factors(lambda w: _total(_scan(w, x)[0]))(w)
        return error, {name: rule(0.2).update(error, rule(0.2).init(w), w)[0] for name, rule in RULES.items()}

    error, updates = compiled(steps)(w)
    for name, update in updates.items():
        for i in range(2):
            want = _step_by_hand(name, w[i], np.asarray(error.key[i]), np.asarray(error.delta[i]), 0.2)
            assert_close(w[i] + update[i], want)


def test_inputs_in_the_place_of_factors(x64, rng):
    """A dense gradient with the layer's inputs, or with their gram, also where labels mask the other leaves."""
    params, x, y = _mlp_data(rng)
    factors = _mlp_factors(params, x, y)
    inputs = {"w1": factors["w1"][0], "b1": None, "w2": factors["w2"][0]}
    grams = {name: None if k is None else k.T @ k for name, k in inputs.items()}
    labels = factor_labels(_mlp_loss, params, x, y)
    tx: Any = optax.partition({FACTORED: dgd(0.3), DENSE: optax.sgd(0.1)}, labels)
    whole: Any = minibatch(tx)

    def steps(p):
        yield tx.update(jax.grad(_mlp_loss)(p, x, y), tx.init(p), p, inputs=inputs)[0]
        yield tx.update(jax.grad(_mlp_loss)(p, x, y), tx.init(p), p, gram=grams)[0]
        yield whole.update(value_and_factors(_mlp_loss)(p, x, y)[1], whole.init(p), p)[0]

    updates = compiled(lambda p: list(steps(p)))(params)
    for name, (key, delta) in factors.items():
        want = _step_by_hand("exact", params[name], key, delta, 0.3)
        for step in updates:
            assert_close(params[name] + step[name], want)


def test_minibatch_gives_ordinary_gradients_to_any_transformation(rng):
    params, x, y = _mlp_data(rng)
    tx: Any = minibatch(optax.adam(0.1))

    def both(p):
        got, _ = tx.update(value_and_factors(_mlp_loss)(p, x, y)[1], tx.init(p), p, unknown=1)
        return got, optax.adam(0.1).update(jax.grad(_mlp_loss)(p, x, y), optax.adam(0.1).init(p), p)[0]

    got, want = compiled(both)(params)
    assert_close(got, want, 1e-5)


def test_delta_decay_is_the_first_order_form(x64, rng):
    params, x, y = _mlp_data(rng)
    del params["b1"]
    loss = lambda p: _mlp_loss(p | {"b1": jnp.zeros(F)}, x, y)  # noqa: E731
    rules: Any = [minibatch(tx) for tx in (dgd(0.3, exact=False), optax.chain(add_delta_decay(), optax.sgd(0.3)))]
    steps = lambda p: [tx.update(value_and_factors(loss)(p)[1], tx.init(p), p)[0] for tx in rules]  # noqa: E731
    assert_close(*compiled(steps)(params))


@pytest.mark.parametrize("rule", [*RULES, "scheduled"])
def test_dgd_trains_an_mlp(rule, rng):
    """Below half of the start in 20 steps of one compile, and a schedule through `inject_hyperparams`."""
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    params: Any = {"w1": jax.random.normal(k1, (2, 16)), "b1": jnp.zeros(16), "w2": jax.random.normal(k2, (16, 1)) / 4}
    x = jax.random.normal(k3, (32, 2))
    loss = lambda p: jnp.mean(jnp.square(_mlp(p, x) - jnp.prod(x, axis=1, keepdims=True)))  # noqa: E731
    if rule == "scheduled":
        layers: Any = optax.inject_hyperparams(dgd)(learning_rate=optax.linear_schedule(0.5, 0.1, 20))
    else:
        layers = RULES[rule](0.1 if rule == "first order" else 0.3)
    tx: Any = optax.partition(
        {FACTORED: optax.chain(mean_factors(), layers, heavy_ball(0.5)), DENSE: optax.sgd(0.1)},
        factor_labels(loss, params),
    )
    values = _train(tx, value_and_factors(loss), params, 20)
    assert values[-1] < 0.5 * values[0]


def _train(tx: Any, gradient: Any, params: Any, steps: int) -> list[float]:
    def step(params, state):
        value, errors = gradient(params)
        updates, state = tx.update(errors, state, params)
        return optax.apply_updates(params, updates), state, value

    compiled_step: Any = compiled(step)
    state, values = tx.init(params), []
    for _ in range(steps):
        params, state, value = compiled_step(params, state)
        values.append(float(value))
    assert compiled_step._cache_size() == 1
    return values


@pytest.mark.parametrize("rule", ["tokens", pytest.param("exact", marks=pytest.mark.slow)])
def test_dgd_trains_a_transformer(rule):
    """Only the matrices of the blocks and the head learn, so that it is `dgd` that lowers the loss.

    Ten times the loss: at rest outputs are as large as their errors.
    """
    plain, params, tokens = _transformer(tie_embeddings=False)
    loss = lambda *args: 10 * plain(*args)  # noqa: E731
    layers = optax.chain(mean_factors(), RULES[rule](0.1))
    labels = factor_labels(loss, params, tokens)
    tx = optax.partition({FACTORED: layers, DENSE: optax.set_to_zero()}, labels)
    values = _train(tx, lambda p: value_and_factors(loss)(p, tokens), params, 20)
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize("axes, rule", [("Auto", "exact"), ("Explicit", "tokens")])
def test_sharded_like_one_device(axes, rule, rng):
    """Data over four devices, a weight's columns over two: the same update, where the weight is."""
    kinds = (getattr(jax.sharding.AxisType, axes),) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    placed = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))  # noqa: E731
    w, x = _of((K, 8), rng), _of((16, K), rng)
    tx: Any = RULES[rule](0.1)

    def step(w, x):
        _, error = value_and_factors(lambda w: _total(jnp.tanh(x @ w)))(w)
        return tx.update(error, tx.init(w), w)[0]

    want = compiled(step)(w, x)
    with jax.set_mesh(mesh):
        got = compiled(step)(placed(w, None, "model"), placed(x, "data"))
    assert got.sharding.spec == jax.P(None, "model")
    assert_close(got, want, 1e-5)


def test_empty_trees_and_leaves_that_are_none():
    for tx in (dgd(0.1), minibatch(dgd(0.1)), mean_factors(), minibatch(add_delta_decay())):
        anything: Any = tx
        assert anything.update({}, anything.init({}), {}, gram={})[0] == {}
    tx: Any = minibatch(dgd(0.1))
    params = {"w": jnp.ones((2, 1)), "none": None}
    error = {"w": Outer(jnp.ones((1, 1)), jnp.ones((1, 2))), "none": None}
    assert tx.update(error, tx.init(params), params)[0]["none"] is None


def test_contract_takes_trees():
    outer = Outer(jnp.ones((2, V)), jnp.ones((2, K)))
    assert_close(contract({"a": outer, "b": jnp.ones(3)}), {"a": 2 * jnp.ones((K, V)), "b": jnp.ones(3)}, 0)
    assert_close(gram(outer), 2 * jnp.ones((K, K)), 0)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: dgd(0.1).init({"a": {"b": jnp.ones(3)}}), ValueError, r"a/b has shape \(3,\).*partition"),
        (lambda: dgd(0.1).update({"w": jnp.ones((K, V))}, (), {"w": jnp.ones((K, V))}), TypeError, r"for w: .*inputs="),
        (lambda: dgd(0.1).update({"w": Outer(jnp.ones((1, V)), jnp.ones((1, K))), "v": jnp.ones((K, V))}, (),
                                 {"w": jnp.ones((K, V)), "v": jnp.ones((K, V))}), TypeError, r"for v: .*value_and"),
        (lambda: factor_labels(lambda p: jnp.sum(p["e"]), {"e": jnp.ones((2, 2))}), ValueError, r"\(e\) .*x @ w"),
        (lambda: local_surprise(lambda p: jnp.sum(p), jnp.ones(3)), ValueError, "jax.grad"),
        (lambda: value_and_factors(lambda w: X @ w)(jnp.ones((K, V))), TypeError, "scalar"),
        (lambda: mean_factors(0), ValueError, "got 0"),
        (lambda: mean_factors("batch"), ValueError, "'batch'"),  # pyright: ignore[reportArgumentType]
        (lambda: add_delta_decay().update(jnp.ones((K, V)), (), jnp.ones((K, V))), TypeError, "gram=.*minibatch"),
        (lambda: add_delta_decay().update(jnp.ones((K, V)), (), gram=jnp.ones((K, K))), ValueError, "current weights"),
    ],
)  # fmt: skip
def test_refusals_name_the_leaf_and_the_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()
