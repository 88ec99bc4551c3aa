"""The long-term memory of Titans, an MLP: through `hope_kernels.mlp_memory`, and through the nest's general path."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hope_jax import Nest, Tokens, dgd, l2_regression, level, mlp_memory, nest, titans_lmm
from hope_kernels.mlp_memory.arg_specs import ArgSpec, make_arguments


def cases(length: int = 512, width: int = 64, hidden: int = 64, chunk: int = 16) -> tuple[dict[str, Callable], Any]:
    """Forward+backward of four heads as functions of one argument, and that argument."""
    memory = mlp_memory(width, hidden)
    rule = dgd(exact=False, decay=False, momentum="gate")
    general = level(memory, rule, chunk, objective=l2_regression)
    arguments = make_arguments(ArgSpec(1, length, 4, width, hidden, chunk))
    args = {n: a[0] for n, a in arguments.items() if "momentum" not in n}
    nests = {
        "mlp_memory": titans_lmm(memory, chunk),
        "nest": nest(general),
        "nest, remat": nest(general, remat=True),
    }
    return {name: _both(n) for name, n in nests.items()}, args


def _both(n: Nest) -> Callable[[Any], Any]:
    def loss(a: Any) -> jax.Array:
        xs = Tokens(a["k"], a["v"], a["q"], a["eta"], log_alpha=a["log_alpha"], log_mu=a["log_mu"])
        return jnp.sum(jnp.sin(n.apply(n.init(({"w1": a["w1"], "w2": a["w2"]},)), xs, phase=0)[1]))

    return jax.grad(loss)
