"""The reference is the recurrence as it is printed, run here as a plain NumPy loop in float64."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from hope_kernels import delta_rule
from hope_kernels.delta_rule.arg_specs import ArgSpec, make_arguments

SPEC = ArgSpec(batch=2, tokens=7, heads=3, key_width=4, value_width=5, momentum=True, dtype="float64")


def run(arguments, **options) -> Any:
    return delta_rule(**arguments, **options, implementation="reference")


def numpy_loop(q, k, u, eta, alpha, mu, mask, s, z, read):
    """(S2.1), or (S5.1) with mu, one head at a time; S is [V, K] as in the paper."""
    batch, tokens, heads, _ = k.shape
    y = np.zeros((batch, tokens, heads, u.shape[-1]))
    s_end, z_end = s.copy(), z.copy()
    for b in range(batch):
        for h in range(heads):
            m, p = s[b, h].T.copy(), z[b, h].T.copy()
            start = m.copy()
            for t in range(tokens):
                key, query, before = k[b, t, h], q[b, t, h], m
                if mask[b, t, h]:
                    erased = m @ (alpha[b, t, h] * np.eye(len(key)) - eta[b, t, h] * np.outer(key, key))
                    write = np.outer(u[b, t, h], key)
                    if mu is not None:
                        p = mu[b, t, h] * p + write
                        write = p
                    m = erased + write
                y[b, t, h] = {"start": start, "before": before, "after": m}[read] @ query
            s_end[b, h], z_end[b, h] = m.T, p.T
    return y, s_end, z_end


@pytest.mark.parametrize("read", ["start", "before", "after"])
@pytest.mark.parametrize("momentum", [False, True])
def test_reference_is_the_printed_recurrence(x64, rng, momentum, read):
    arguments = make_arguments(SPEC._replace(momentum=momentum))
    mask = rng.uniform(size=arguments["eta"].shape) < 0.7
    found = run(arguments, mask=jnp.asarray(mask), read=read)
    host = {name: np.asarray(value) for name, value in arguments.items()}
    y, s, z = numpy_loop(
        host["q"],
        host["k"],
        host["u"],
        host["eta"],
        np.exp(host["log_alpha"]),
        np.exp(host["log_mu"]) if momentum else None,
        mask,
        host["initial_state"],
        host.get("initial_momentum", np.zeros_like(host["initial_state"])),
        read,
    )
    np.testing.assert_allclose(found.y, y, atol=1e-13)
    np.testing.assert_allclose(found.state, s, atol=1e-13)
    if momentum:
        np.testing.assert_allclose(found.momentum, z, atol=1e-13)
    else:
        assert found.momentum is None


def test_absent_gates_mean_no_erasing_and_no_forgetting(x64):
    arguments = make_arguments(SPEC._replace(momentum=False, erase=False, decay=False))
    zero = jnp.zeros(arguments["k"].shape[:3])
    without = run(arguments)
    explicit = run({**arguments, "eta": zero, "log_alpha": zero})
    np.testing.assert_allclose(without.y, explicit.y, atol=1e-14)
    np.testing.assert_allclose(without.state, explicit.state, atol=1e-14)
