"""Documents in one row are strangers: losses and gradients are those of each document alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.models import build_lm
from hope_jax.training.config import TrainConfig, segment_length
from hope_jax.training.documents import document_losses
from hope_jax.training.packing import Batch, pack, packed_row, stack
from hope_jax.training.step import build_program
from tests.models.cases import CASES, VOCAB

LENGTH = 48  # of a row
TOLERANCE = 2e-5  # float32, losses of order one, twice the tolerance of two ways through a model
QUICK = ("transformer", "hope_attention", "hope")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]


def config_of(name):
    return dataclasses.replace(CASES[name], max_length=LENGTH)


def documents(*sizes):
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, VOCAB, sum(sizes)).astype(np.uint8)
    return tokens, np.cumsum([0, *sizes[:-1]])


def packed(model, tokens, starts):
    """All windows of a text as one batch, and the document of each target."""
    sizes = {"length": LENGTH, "multiple": segment_length(model)}
    pieces = pack(starts, tokens.size, **sizes)
    windows = range(pieces.offsets.size - 1)
    of = np.searchsorted(starts, np.arange(tokens.size), side="right")
    ids = stack([packed_row(of, pieces, window, **sizes) for window in windows])
    return stack([packed_row(tokens, pieces, window, **sizes) for window in windows]), ids.targets * (ids.weights > 0)


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """A model, its parameters, and two rows of four documents."""
    model = config_of(request.param)
    lm = build_lm(model)
    params = jax.jit(lm.init)(jax.random.key(0))
    params = {**params, "embedding": 25 * params["embedding"]}  # logits of order one
    tokens, starts = documents(30, 12, 12, 30)
    batch, of = packed(model, tokens, starts)
    assert batch.tokens.shape[0] == 2 and sorted(set(of.ravel().tolist())) == [0, 1, 2, 3, 4]
    return model, lm, params, tokens, starts, batch, of


def losses(model, lm):
    return jax.jit(lambda params, state, batch: document_losses(lm, model, params, state, batch)[1])


def test_losses_of_a_document_are_those_of_the_document_alone(case):
    model, lm, params, tokens, starts, batch, of = case
    found = losses(model, lm)(params, lm.init_state(params, batch.tokens.shape[0]), batch)
    read = jax.jit(lambda x: lm.apply(params, lm.init_state(params, 1), x, phase=0))
    for number, document in enumerate(np.split(tokens, starts[1:]), 1):
        _, logits = read(document[None, :-1].astype(np.int32))
        alone = optax.softmax_cross_entropy_with_integer_labels(logits, document[None, 1:].astype(np.int32))[0]
        np.testing.assert_allclose(found[of == number], alone, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_no_gradient_leaks_across_a_boundary(case):
    """The loss of one document does not depend on the embedding of a token that occurs in another only."""
    model, lm, params, _, _, batch, of = case
    ours = of == 1
    row = int(np.nonzero(ours.any(axis=1))[0][0])
    assert len(set(of[row].tolist()) - {0}) > 1  # it has company
    untied = dataclasses.replace(model, tie_embeddings=False)  # or the loss reads every token's row
    lm = build_lm(untied)
    params = {**params, "head": jax.random.normal(jax.random.key(2), (model.dim, VOCAB))}
    strange = batch._replace(tokens=np.where(ours, np.minimum(batch.tokens, VOCAB // 2), VOCAB - 1 - batch.tokens % 8))
    strange = strange._replace(targets=np.where(ours, np.minimum(batch.targets, VOCAB // 2), VOCAB - 1))

    def loss(embedding):
        changed = {**params, "embedding": embedding}
        state = lm.init_state(changed, batch.tokens.shape[0])
        return (document_losses(lm, untied, changed, state, strange)[1] * ours).sum()

    grad = jax.jit(jax.grad(loss))(params["embedding"])
    used = np.unique(strange.tokens[ours])
    assert used.max() <= VOCAB // 2 < VOCAB - 8
    assert (np.abs(grad[used]).max(axis=1) > 0).sum() > 3
    assert not np.asarray(grad[VOCAB - 8 :]).any()


def test_without_flags_documents_do_see_each_other(case):
    """The test above can fail."""
    model, lm, params, _, _, batch, of = case
    fresh = lm.init_state(params, batch.tokens.shape[0])
    merged = batch._replace(starts=np.zeros_like(batch.starts))
    apart, together = (losses(model, lm)(params, fresh, one) for one in (batch, merged))
    assert float(jnp.abs(apart - together)[of > 0].max()) > 1e-3


def train_config(name, **changes):
    model = dataclasses.replace(config_of(name), vocab_size=256, layers=1)
    values = {"model": model, "steps": 8, "batch_size": 4, "seq_len": LENGTH, "warmup_steps": 2}
    return TrainConfig(**values | changes)  # type: ignore[arg-type]


def random_batch(config, seed=0, multiple=None):
    rng = np.random.default_rng(seed)
    shape, segments = (config.batch_size, config.seq_len), config.seq_len // (multiple or config.segment)
    tokens = rng.integers(1, VOCAB, (shape[0], shape[1] + 1)).astype(np.uint8)
    weights = (rng.random(shape) < 0.9).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, rng.random((shape[0], segments)) < 0.4)


@pytest.mark.parametrize(
    "name", ["delta_net", *(pytest.param(n, marks=pytest.mark.slow) for n in ("hope", "hope_fast"))]
)
@pytest.mark.parametrize("documents", [pytest.param("carry", marks=pytest.mark.slow), "carry_reset"])
def test_two_steps_that_carry_read_as_one_long_row(documents, name):
    """With a learning rate of zero: the losses of two steps are those of a row of twice the length."""
    config = train_config(name, documents=documents, learning_rate=1e-30, final_learning_rate=0.0, weight_decay=0.0)
    multiple = config.segment if documents == "carry_reset" else config.seq_len
    first, second = (random_batch(config, seed, multiple) for seed in (0, 1))
    if documents == "carry":
        first = first._replace(starts=np.ones_like(first.starts))
        second = second._replace(starts=np.zeros_like(second.starts))
    program = build_program(config)
    state = program.init()
    params = jax.device_get(state.params)
    found = []
    for batch in (first, second):
        state, metrics = program.train_step(state, program.put_batch(batch))
        found.append(float(metrics.loss))
    assert program.train_step._cache_size() == 1
    long = Batch(*(np.concatenate(leaves, axis=1) for leaves in zip(first, second, strict=True)))
    lm = build_lm(config.model)
    if documents == "carry":
        targets, fresh = long.targets.astype(np.int32), lm.init_state(params, config.batch_size)
        mask = long.weights > 0
        read = jax.jit(lambda params, x: lm.apply(params, fresh, x, phase=0, mask_BT=mask))
        _, logits = read(params, long.tokens)
        both = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    else:
        both = losses(config.model, lm)(params, lm.init_state(params, config.batch_size), long)
    for half, batch, loss in zip(np.split(np.asarray(both), 2, axis=1), (first, second), found, strict=True):
        assert loss == pytest.approx((half * batch.weights).sum() / batch.weights.sum(), rel=1e-5)


@pytest.mark.slow
def test_lanes_on_a_mesh_and_in_microbatches_are_those_of_one_device():
    def run(**changes):
        config = train_config("hope", documents="carry_reset", **changes)
        program = build_program(config)
        state, found = program.init(), []
        for step in range(3):
            state, metrics = program.train_step(state, program.put_batch(random_batch(config, step)))
            found.append(float(metrics.loss))
        return found, state

    from hope_jax.training.config import MeshConfig

    one, state = run()
    for changes in ({"accumulate": 2}, {"mesh": MeshConfig(data=2, fsdp=2)}):
        other, sharded = run(**changes)
        np.testing.assert_allclose(other, one, rtol=1e-4)  # a mean of means; three steps of Adam
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-3), sharded.lanes, state.lanes)
    assert all(leaf.addressable_shards[0].data.shape[0] == 1 for leaf in jax.tree.leaves(sharded.lanes))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "documents"), [("transformer", "reset"), ("delta_net", "carry_reset")])
def test_prefixes_of_a_representation_learn_from_documents_too(name, documents):
    """Matryoshka with the whole alone is the plain step, bit for bit; with other weights it is another."""

    def loss(**changes):
        config = train_config(name, documents=documents, **changes)
        program = build_program(config)
        return float(program.train_step(program.init(), program.put_batch(random_batch(config)))[1].loss)

    assert loss(matryoshka=(0.0, 0.0, 0.0, 1.0)) == loss() != loss(matryoshka=(1.0, 0.0, 0.0, 0.0))
