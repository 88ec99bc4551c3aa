"""The definitions as float64 NumPy, one token at a time, written from the formulas and not from the library.

Rows everywhere: a matrix memory is `y = x @ S` with S [K, V] (spec 0, "Two layouts").
"""

import jax
import jax.numpy as jnp
import numpy as np

TIGHT = 1e-12  # absolute, float64, order-one data
GELU_C = np.sqrt(2 / np.pi)


def float64(tree):
    """Every floating leaf as float64; needs the `x64` fixture."""
    is_float = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if is_float(x) else x, tree)


def numpy64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def compiled(function, **options):
    """`jax.jit` for programs that run once: the compiler's optimizations would take longer than they save."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


def assert_close(got, want, atol=TIGHT):
    """Trees of the same structure, equal to `atol`."""
    got_leaves, got_def = jax.tree.flatten(got)
    want_leaves, want_def = jax.tree.flatten(want)
    assert got_def == want_def
    for a, b in zip(got_leaves, want_leaves, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)


def primitives(jaxpr, found=None):
    """Names of all primitives of a program and of the programs inside it."""
    found = set() if found is None else found
    for eqn in jaxpr.eqns:
        found.add(eqn.primitive.name)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                primitives(inner, found)
    return found


def gelu(x):
    return 0.5 * x * (1 + np.tanh(GELU_C * (x + 0.044715 * x**3)))


def gelu_slope(x):
    t = np.tanh(GELU_C * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * GELU_C * (1 + 3 * 0.044715 * x**2)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def mlp_read(params, x, residual=True):
    """(89): x + W1 gelu(W2 x), or a matrix read when there is only `w`."""
    if "w" in params:
        return x @ params["w"]
    y = gelu(x @ params["w2"]) @ params["w1"]
    return x + y if residual else y


def mlp_factors(params, key, delta):
    """Spec 2.3: weight name -> (input of the weight, error at its output), for one token."""
    if "w" in params:
        return {"w": (key, delta)}
    z = key @ params["w2"]
    return {"w1": (gelu(z), delta), "w2": (key, gelu_slope(z) * (params["w1"] @ delta))}


def mlp_gradient(params, key, delta):
    return {name: np.outer(k, d) for name, (k, d) in mlp_factors(params, key, delta).items()}


def write(state, z, key, push, erase=0.0, alpha=1.0, mu=None):
    """(S5.1) for one token: Z <- mu Z + k u^T, S <- (alpha I - b k k^T) S + Z."""
    z = np.outer(key, push) + (0.0 if mu is None else mu * z)
    return alpha * state - erase * np.outer(key, key @ state) + z, z


def proximal(eta, key):
    """eta' of (S3.2)."""
    return eta / (1 + eta * key @ key)
