"""Known sequence models as named nests: each is one level, and the table of `hope_jax` is proven on them.

All are for one head of one example:

    key_width, value_width   K and V of a matrix memory
    memory                   an MLP, `mlp_memory` or `deep_memory`
    chunk_size               tokens per chunk, where the error is taken at the chunk's start. Models without it write
                             token by token, and a whole call is still one call of the kernel, because the error -v of
                             `dot_product` does not depend on the weights.

They return a `Nest` over `Tokens` with key and query [T, K], value [T, V] and the gates that each docstring names [T];
ys are the reads [T, V].
"""

import jax
import jax.numpy as jnp
import optax

from hope_jax.levels import level
from hope_jax.local import heads_first, local_write
from hope_jax.memories import linear_memory
from hope_jax.nesting import nest
from hope_jax.objectives import dot_product, l2_regression
from hope_jax.transforms import dgd, retention
from hope_jax.types import LevelState, Memory, Nest, Outer, Tokens
from hope_jax.writing import write_chunk


def linear_attention(key_width: int, value_width: int) -> Nest:
    """Hebbian linear attention, S_t = S_{t-1} + k_t v_t^T, y_t = q_t S_t. Gates: none.

    Gradient descent with step 1 on the dot-product objective.

    Example:
        >>> import jax.numpy as jnp
        >>> from hope_jax import Tokens
        >>> n, x = linear_attention(2, 1), jnp.ones((3, 2))
        >>> state, y = n.apply(n.init(({"w": jnp.zeros((2, 1))},)), Tokens(x, jnp.ones((3, 1)), x))
        >>> y[:, 0].tolist()
        [2.0, 4.0, 6.0]

    Reference: paper (15), (64); arXiv:2006.16236.
    """
    return _running(key_width, value_width, optax.sgd(1.0))


def retnet(key_width: int, value_width: int, alpha: float) -> Nest:
    """Linear attention with a constant decay, S_t = alpha S_{t-1} + k_t v_t^T. Gates: none.

    Raises:
        ValueError: alpha, the RETAINED fraction, outside (0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> from hope_jax import Tokens
        >>> n, x = retnet(1, 1, alpha=0.5), jnp.ones((3, 1))
        >>> n.apply(n.init(({"w": jnp.zeros((1, 1))},)), Tokens(x, x, x))[1][:, 0].tolist()
        [1.0, 1.5, 1.75]

    Reference: arXiv:2307.08621.
    """
    return _running(key_width, value_width, optax.chain(optax.sgd(1.0), retention(alpha)))


def gated_linear_attention(key_width: int, value_width: int) -> Nest:
    """Decay and step from the data, S_t = alpha_t S_{t-1} + eta_t k_t v_t^T, as in Mamba-2. Gates: eta, alpha.

    Example:
        >>> import jax.numpy as jnp
        >>> from hope_jax import Tokens
        >>> n, x, half = gated_linear_attention(1, 1), jnp.ones((3, 1)), jnp.full(3, 0.5)
        >>> n.apply(n.init(({"w": jnp.zeros((1, 1))},)), Tokens(x, x, x, eta=half, alpha=half))[1][:, 0].tolist()
        [0.5, 0.75, 0.875]

    Reference: arXiv:2405.21060.
    """
    return _running(key_width, value_width, dgd(exact=False, decay=False))


def delta_net(key_width: int, value_width: int) -> Nest:
    """DeltaNet, S_t = (I - eta_t k_t k_t^T) S_{t-1} + eta_t k_t v_t^T. Gates: eta.

    DGD on the dot-product objective is the delta rule.

    Example:
        >>> import jax.numpy as jnp
        >>> from hope_jax import Tokens
        >>> n, x = delta_net(1, 1), jnp.ones((3, 1))
        >>> n.apply(n.init(({"w": jnp.zeros((1, 1))},)), Tokens(x, x, x, eta=jnp.full(3, 0.5)))[1][:, 0].tolist()
        [0.5, 0.75, 0.875]

    Reference: paper (65); arXiv:2406.06484.
    """
    return _running(key_width, value_width, dgd(exact=False))


def gated_delta_net(key_width: int, value_width: int) -> Nest:
    """Gated DeltaNet, S_t = alpha_t (I - eta_t k_t k_t^T) S_{t-1} + eta_t k_t v_t^T. Gates: eta, alpha.

    Example:
        >>> import jax.numpy as jnp
        >>> from hope_jax import Tokens
        >>> n, x, half = gated_delta_net(1, 1), jnp.ones((3, 1)), jnp.full(3, 0.5)
        >>> n.apply(n.init(({"w": jnp.zeros((1, 1))},)), Tokens(x, x, x, eta=half, alpha=half))[1][:, 0].tolist()
        [0.5, 0.625, 0.65625]

    Reference: arXiv:2412.06464.
    """
    return _running(key_width, value_width, dgd(exact=False, decayed_erase=True))


def longhorn(key_width: int, value_width: int) -> Nest:
    """Longhorn, DeltaNet with the exact step eta' = eta / (1 + eta ||k||^2). Gates: eta.

    Example:
        >>> import jax.numpy as jnp
        >>> from hope_jax import Tokens
        >>> n, x = longhorn(1, 1), jnp.ones((3, 1))
        >>> n.apply(n.init(({"w": jnp.zeros((1, 1))},)), Tokens(x, x, x, eta=jnp.ones(3)))[1][:, 0].tolist()
        [0.5, 0.75, 0.875]

    Reference: arXiv:2407.14207.
    """
    return _running(key_width, value_width, dgd())


def dgd_attention(key_width: int, value_width: int, chunk_size: int) -> Nest:
    """DGD on L2 with errors and reads at the chunk's start. Gates: eta, alpha.

    Example:
        >>> import jax.numpy as jnp
        >>> from hope_jax import Tokens
        >>> n, x = dgd_attention(1, 1, chunk_size=2), jnp.ones((3, 1))
        >>> n.apply(n.init(({"w": jnp.zeros((1, 1))},)), Tokens(x, x, x, eta=jnp.ones(3)))[1][:, 0].tolist()
        [0.0, 0.0, 0.75]

    Reference: paper (93).
    """
    return nest(level(linear_memory(key_width, value_width), dgd(), chunk_size, objective=l2_regression))


def ttt_linear(key_width: int, value_width: int, chunk_size: int) -> Nest:
    """TTT-Linear: gradient descent on L2, errors at the chunk's start, running reads. Gates: eta.

    Example:
        >>> import jax.numpy as jnp
        >>> from hope_jax import Tokens
        >>> n, x = ttt_linear(1, 1, chunk_size=2), jnp.ones((3, 1))
        >>> n.apply(n.init(({"w": jnp.zeros((1, 1))},)), Tokens(x, x, x, eta=jnp.full(3, 0.5)))[1][:, 0].tolist()
        [0.5, 1.0, 1.0]

    Reference: arXiv:2407.04620.
    """
    rule = dgd(exact=False, decay=False)
    return nest(level(linear_memory(key_width, value_width), rule, chunk_size, objective=l2_regression, read="after"))


def ttt_mlp(memory: Memory, chunk_size: int) -> Nest:
    """TTT-MLP: as TTT-Linear with an MLP for a memory. Gates: eta.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from hope_jax import Tokens, mlp_memory
        >>> n, x = ttt_mlp(mlp_memory(4, 8), chunk_size=2), jnp.ones((6, 4))
        >>> n.apply(n.init(n.params(jax.random.key(0))), Tokens(x, x, x, eta=jnp.full(6, 0.1)))[1].shape
        (6, 4)

    Reference: arXiv:2407.04620.
    """
    return nest(level(memory, dgd(exact=False, decay=False), chunk_size, objective=l2_regression, read="after"))


def deep_linear_attention(memory: Memory, chunk_size: int) -> Nest:
    """DLA: gradient descent with retention on the dot product of a deep memory. Gates: eta, alpha.

    Errors and reads are taken at the chunk's start.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from hope_jax import Tokens, mlp_memory
        >>> n, x, g = deep_linear_attention(mlp_memory(4, 8), chunk_size=2), jnp.ones((6, 4)), jnp.full(6, 0.5)
        >>> n.apply(n.init(n.params(jax.random.key(0))), Tokens(x, x, x, eta=g, alpha=g))[1].shape
        (6, 4)

    Reference: arXiv:2505.23735; spec 2.5.
    """
    return nest(level(memory, dgd(exact=False, decay=False), chunk_size, objective=dot_product))


def _running(key_width: int, value_width: int, tx: optax.GradientTransformation) -> Nest:
    """A matrix under `dot_product`, written and read token by token."""
    lev = level(linear_memory(key_width, value_width), tx, 1, objective=dot_product, read="after")

    def whole(state: LevelState, xs: Tokens) -> tuple[LevelState, jax.Array | None]:
        value = heads_first(xs.value)
        error = {"w": Outer(dot_product.delta(value, value), heads_first(xs.key))}  # whatever the weights answer
        end, rule, y = write_chunk(lev, state.start, state.rule, local_write(error, xs))
        return state._replace(start=end, running=end, rule=rule), None if y is None else jnp.moveaxis(y, -2, 0)

    return nest(lev, whole=whole)
