"""What holds for every implementation of the delta rule, whatever the numbers (spec 5.7, tests 17, 18, 21)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from hope_kernels import Config, delta_rule
from hope_kernels.delta_rule.arg_specs import ArgSpec, make_arguments
from hope_kernels.delta_rule.config import default_block_t
from hope_kernels.testing import FAST_COMPILE, relative_error, tolerance

SPEC = ArgSpec(batch=2, tokens=33, heads=3, key_width=6, value_width=4, momentum=True)
TIME_ARGUMENTS = ("q", "k", "u", "eta", "log_alpha", "log_mu")
EVERY = pytest.mark.parametrize("implementation", ["reference", "xla"])  # those that run anywhere
OTHERS = pytest.mark.parametrize("implementation", ["xla"])


@pytest.fixture(scope="module")
def arguments():
    return make_arguments(SPEC)


def call(implementation, **static) -> Any:
    return partial(delta_rule, implementation=implementation, **static)


def jit(function) -> Any:
    return jax.jit(function, compiler_options=FAST_COMPILE)


def assert_close(found, expected, length=39):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(x, y) <= tolerance(x.dtype, length)


def assert_equal(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


@OTHERS
def test_the_tile_changes_nothing(implementation, arguments):
    one_tile = jit(call(implementation, config=Config(block_t=33)))(**arguments)
    for block_t in (1, 7, 16, None):
        assert_close(jit(call(implementation, config=Config(block_t=block_t)))(**arguments), one_tile)


@EVERY
@pytest.mark.parametrize(("tokens", "at", "exact"), [(80, 32, True), (33, 11, False)])
def test_two_calls_are_one(implementation, tokens, at, exact):
    """Bit for bit when the split falls between tiles and every call has several of them."""
    arguments = make_arguments(SPEC._replace(tokens=tokens))
    run = jit(call(implementation, config=Config(block_t=16)))
    first = run(**{n: a[:, :at] if n in TIME_ARGUMENTS else a for n, a in arguments.items()})
    rest = {n: arguments[n][:, at:] for n in TIME_ARGUMENTS}
    second = run(**rest, initial_state=first.state, initial_momentum=first.momentum)
    found = (jnp.concatenate([first.y, second.y], axis=1), second.state, second.momentum)
    (assert_equal if exact else assert_close)(found, tuple(run(**arguments)))


@EVERY
def test_a_rule_that_does_nothing_leaves_the_state_bit_for_bit(implementation, arguments):
    zero = jnp.zeros_like(arguments["eta"])
    k, u, state = arguments["k"], jnp.zeros_like(arguments["u"]), arguments["initial_state"]
    run = jit(call(implementation, config=Config(block_t=16)))
    assert_equal(run(None, k, u, zero, log_alpha=zero, initial_state=state).state, state)
    everything_masked = run(**arguments, mask=jnp.zeros(k.shape[:3], bool))
    assert_equal(everything_masked.state, state)
    assert_equal(everything_masked.momentum, arguments["initial_momentum"])


@EVERY
@pytest.mark.parametrize("read", ["start", "after"])
def test_no_tokens(implementation, arguments, read):
    none = {n: a[:, :0] if n in TIME_ARGUMENTS else a for n, a in arguments.items()}
    out = delta_rule(**none, read=read, implementation=implementation)
    assert out.y is not None and out.y.shape == (2, 0, 3, 4)
    assert_equal(out.state, arguments["initial_state"])
    assert_equal(out.momentum, arguments["initial_momentum"])


@EVERY
@pytest.mark.parametrize("read", ["start", "before", "after"])
def test_a_packed_document_is_a_call_of_its_own(implementation, read):
    """Every document but the first starts empty; what comes out at the end is the last one's."""
    arguments = make_arguments(SPEC._replace(batch=1, documents=3))
    ids = np.asarray(arguments.pop("segment_ids"))[0]
    packed = jit(call(implementation, read=read, config=Config(block_t=16)))(**arguments, segment_ids=jnp.array([ids]))
    starts = {n: arguments.pop(n) for n in ("initial_state", "initial_momentum")}
    reads, last = [], None
    for i in np.unique(ids):
        document = {n: a[:, ids == i] for n, a in arguments.items()}
        last = call("reference", read=read)(**document, **(starts if i == ids[0] else {}))
        reads.append(last.y)
    assert len(reads) == 3 and last is not None
    assert_close(tuple(packed), (jnp.concatenate(reads, axis=1), last.state, last.momentum))


@EVERY
def test_value_heads_that_share_a_key_head(implementation):
    arguments = make_arguments(SPEC._replace(heads=4, key_heads=2))
    repeated = {n: jnp.repeat(a, 2, axis=2) if n in ("q", "k") else a for n, a in arguments.items()}
    run = jit(call(implementation, config=Config(block_t=16)))
    assert_close(run(**arguments), run(**repeated))


@EVERY
def test_scale_multiplies_the_reads_alone(implementation, arguments):
    run = lambda scale: jit(call(implementation, scale=scale))(**arguments)  # noqa: E731
    assert_close(tuple(run(0.25)), (0.25 * run(1.0).y, run(1.0).state, run(1.0).momentum))


@EVERY
def test_high_precision_of_bfloat16_inputs(implementation):
    """Products in float32: as exact as the float32 inputs that the bfloat16 ones are."""
    arguments = make_arguments(SPEC._replace(dtype="bfloat16"))
    found = jit(call(implementation, precision="high"))(**arguments)
    expected = call("reference")(**{n: a.astype(jnp.float32) for n, a in arguments.items()})
    assert_close((found.state, found.momentum), (expected.state, expected.momentum))


@OTHERS
def test_a_policy_can_keep_the_states_by_name(implementation, capsys):
    """With their name allowed, `jax.checkpoint` saves the tile-start states; without, only the inputs."""
    arguments = make_arguments(ArgSpec(1, 64, 2, 4, 3))

    def kept(policy):
        run = jax.checkpoint(call(implementation, config=Config(block_t=16)), policy=policy)
        print_saved_residuals(lambda a: jnp.sum(run(**a).y), arguments)
        return [line.split()[0] for line in capsys.readouterr().out.splitlines() if "argument" not in line]

    states = "f32[4,1,2,4,3]"
    assert states in kept(jax.checkpoint_policies.save_only_these_names("delta_rule_states"))
    assert states not in kept(jax.checkpoint_policies.nothing_saveable)


@EVERY
def test_heads_and_batch_are_independent(implementation, arguments):
    run = jit(call(implementation, config=Config(block_t=16)))
    out = run(**arguments)
    other_heads, other_batch = jnp.array([2, 0, 1]), jnp.array([1, 0])

    def on_head_axis(name, x):
        return x[:, :, other_heads] if name in TIME_ARGUMENTS else x[:, other_heads]

    heads = run(**{n: on_head_axis(n, a) for n, a in arguments.items()})
    assert_equal(tuple(heads), (out.y[:, :, other_heads], out.state[:, other_heads], out.momentum[:, other_heads]))
    assert_equal(run(**{n: a[other_batch] for n, a in arguments.items()}), jax.tree.map(lambda x: x[other_batch], out))


@EVERY
def test_a_rotation_of_keys_and_state_leaves_the_reads(implementation, arguments, rng):
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    rotation = jnp.asarray(rotation, jnp.float32)
    rotated = {**arguments, "q": arguments["q"] @ rotation, "k": arguments["k"] @ rotation}
    for name in ("initial_state", "initial_momentum"):
        rotated[name] = jnp.einsum("kj,bhkv->bhjv", rotation, arguments[name])
    run = jit(call(implementation, config=Config(block_t=16)))
    assert_close(run(**rotated).y, run(**arguments).y)


@OTHERS
def test_linear_in_state_momentum_and_write(implementation, arguments):
    linear = ("u", "initial_state", "initial_momentum")
    run = jit(call(implementation, config=Config(block_t=16)))
    doubled = run(**{n: 2 * a if n in linear else a for n, a in arguments.items()})
    assert_equal(doubled, jax.tree.map(lambda x: 2 * x, run(**arguments)))


@OTHERS
def test_vmap_is_a_loop(implementation, arguments):
    """Mapping over calls without batch and heads, with gradients, as a nest does."""

    def loss(one):
        one = {n: a[None, :, None] if n in TIME_ARGUMENTS else a[None, None] for n, a in one.items()}
        out = call(implementation, config=Config(block_t=16))(**one)
        return jnp.sum(jnp.square(out.y)) + jnp.sum(jnp.square(out.state)), out.state

    heads = {n: a[0].swapaxes(0, 1) if n in TIME_ARGUMENTS else a[0] for n, a in arguments.items()}
    grad = jax.grad(loss, has_aux=True)
    mapped = jit(jax.vmap(grad))(heads)
    one_by_one = jit(grad)
    loop = [one_by_one({n: a[i] for n, a in heads.items()}) for i in range(3)]
    assert_close(mapped, jax.tree.map(lambda *x: jnp.stack(x), *loop))


@OTHERS
def test_gradient_under_scan_and_remat(implementation, arguments):
    """A chain of calls in a scan, rematerialised or not, has the gradient of the one long call."""
    tokens = {n: a[:, :32] if n in TIME_ARGUMENTS else a for n, a in arguments.items()}

    def one_call(arguments):
        return sum(jnp.sum(jnp.sin(x)) for x in call(implementation)(**arguments))

    def chain(wrap, arguments):
        def step(carry, chunk):
            out = call(implementation)(**chunk, initial_state=carry[0], initial_momentum=carry[1])
            return (out.state, out.momentum), jnp.sum(jnp.sin(out.y))

        chunks = {n: jnp.moveaxis(arguments[n].reshape(2, 4, 8, *arguments[n].shape[2:]), 1, 0) for n in TIME_ARGUMENTS}
        start = (arguments["initial_state"], arguments["initial_momentum"])
        end, reads = jax.lax.scan(wrap(step), start, chunks)
        return jnp.sum(reads) + sum(jnp.sum(jnp.sin(x)) for x in end)

    expected = jit(jax.grad(one_call))(tokens)
    for wrap in (lambda f: f, jax.checkpoint):
        assert_close(jit(jax.grad(partial(chain, wrap)))(tokens), expected)


@OTHERS
def test_masked_tokens_have_no_gradient(implementation, arguments, rng):
    mask = jnp.asarray(rng.uniform(size=(2, 33, 3)) < 0.5)
    poisoned = {
        n: jnp.where(mask if a.ndim == 3 else mask[..., None], a, jnp.nan) if n in TIME_ARGUMENTS and n != "q" else a
        for n, a in arguments.items()
    }

    def loss(arguments):
        return sum(jnp.sum(jnp.sin(x)) for x in call(implementation)(**arguments, mask=mask))

    gradients = jit(jax.grad(loss))(poisoned)
    for name, gradient in gradients.items():
        assert bool(jnp.isfinite(gradient).all()), name
        if name in TIME_ARGUMENTS and name != "q":
            masked = ~mask if gradient.ndim == 3 else ~mask[..., None]
            assert float(jnp.abs(jnp.where(masked, gradient, 0)).max()) == 0, name
            assert float(jnp.abs(gradient).max()) > 0, name


@OTHERS
def test_memory_of_the_gradient_grows_linearly(implementation):
    """Four times the tokens, at most about four times the temporaries; one state per token would be far above."""

    def temporaries(tokens):
        spec = ArgSpec(1, tokens, 2, 32, 32)
        shapes = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in make_arguments(spec).items()}

        def loss(arguments):
            return jnp.sum(call(implementation, config=Config(block_t=64))(**arguments).y)

        analysis = jit(jax.grad(loss)).lower(shapes).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    short, long = temporaries(512), temporaries(2048)
    inputs = 2 * 2048 * (3 * 32 + 2) * 4
    states = 2 * (2048 // 64) * 32 * 32 * 4
    assert long <= 4.5 * short
    assert long <= 4 * (inputs + states)


def test_default_tile_pads_little():
    for tokens in range(1, 1000):
        block_t = default_block_t(tokens)
        assert 1 <= block_t <= 64
        assert block_t == tokens or block_t % 16 == 0
        assert -tokens % block_t < 16 * -(-tokens // block_t)
