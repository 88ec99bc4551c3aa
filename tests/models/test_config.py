"""A model config refuses what it cannot build, with the value and the remedy."""

import dataclasses

import pytest

from hope_jax.models import ModelConfig, count_parameters, match_parameters


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "mamba"}, r"name must be one of \('hope', 'hope_attention', .*'transformer'.*\); got 'mamba'"),
        ({"dim": 30, "heads": 4}, "heads must divide dim; got dim=30, heads=4"),
        ({"name": "transformer", "dim": 30, "heads": 2}, "even head width; got 15"),
        ({"layers": 0}, "layers must be a positive integer; got 0"),
        ({"dim": 64.0}, "dim must be a positive integer; got 64.0"),
        ({"cms_hidden": (), "cms_chunks": (4,)}, r"cms_chunks \(4,\) has more entries than cms_hidden \(\)"),
        ({"cms_hidden": (32, 0)}, "each entry of cms_hidden must be a positive integer; got 0"),
        ({"momentum": 1.0}, "momentum must be None, 'gate' or a number in"),
        ({"momentum": "gates"}, "got 'gates'"),
        ({"conv_window": -1}, "conv_window must be 0"),
        ({"surprise": "1"}, "surprise must be None or a positive number; got '1'"),
        ({"surprise_temperature": None}, "surprise_temperature must be 0.0 or a positive number; got None"),
        ({"gate_retention": True}, "belong to a surprise gate; give surprise"),
        ({"eta_init": 0.0}, "eta_init must be positive; got 0.0"),
        ({"chunk_proj": 4, "chunk_mem": 6}, "one of chunk_proj, chunk_mem must divide the other; got 4 and 6"),
        ({"erase_max": 2.5}, r"erase_max must lie in \(0, 2\]; got 2.5"),
        ({"name": "delta_net", "head_dim": 8}, "only attention over a cache .* takes head_dim=8"),
        ({"name": "swa", "kv_heads": 1}, "only attention over a cache .* takes kv_heads=1"),
        ({"name": "transformer", "mlp_chunks": (4, 8), "cms_variant": "independent"}, "a block has one MLP"),
        ({"name": "transformer", "mlp_chunks": (4, 4), "cms_variant": "nested"}, "needs two fast levels"),
        ({"static": ("q",)}, "static holds some of 'k' and 'v'; got"),
        ({"cms_chunks": (4, 6)}, r"chunk sizes must divide, fastest first; got .*\[4, 6\]"),
        ({"cms_chunks": (8, 4)}, r"chunk sizes must divide, fastest first; got .*\[8, 4\]"),
        ({"cms_chunks": (2, 4, 8)}, "has more entries than cms_hidden"),
        ({"name": "transformer", "cms_chunks": (4,)}, "transformer has no CMS levels"),
        ({"cms_chunks": (4,), "bptt_chunks": (1, 1)}, "has more entries than there are fast levels"),
        ({"cms_chunks": (4,), "bptt_chunks": (0,)}, "each entry of bptt_chunks that is not None"),
        ({"cms_variant": "parallel"}, "cms_variant must be one of"),
        ({"cms_meta": "second_order"}, "cms_meta must be one of"),
        ({"cms_variant": "nested", "cms_chunks": (4,)}, r"needs two fast levels, .* got chunk sizes \(4,\)"),
        ({"mlp_chunks": (4, 4)}, r"name='hope' has cms_chunks; got \(4, 4\)"),
        ({"name": "transformer", "mlp_chunks": (4,)}, r"one entry per layer.*got \(4,\) for 2 layers"),
        ({"name": "transformer", "mlp_chunks": (4, 0)}, "each entry of mlp_chunks that is not None .* got 0"),
        ({"name": "transformer", "mlp_chunks": (4, 6)}, r"chunk sizes must divide, .* got mlp_chunks=\[4, 6\]"),
        ({"name": "transformer", "mlp_chunks": (4, 4), "bptt_chunks": (1, 1)}, "has more entries than there are fast"),
        ({"cms_eta": -0.1}, "cms_eta must not be negative; got -0.1"),
        ({"name": "transformer", "kv_heads": 3, "heads": 4}, "kv_heads must divide heads; got kv_heads=3, heads=4"),
        ({"name": "transformer", "kv_heads": 0}, "kv_heads must be a positive integer; got 0"),
        ({"name": "transformer", "head_dim": 0}, "head_dim must be a positive integer; got 0"),
        ({"name": "transformer", "head_dim": 5}, "even head width; got 5"),
        (
            {"name": "transformer", "rope_llama3": (8.0, 1.0, 4.0)},
            r"rope_llama3 needs factor, .* got \(8.0, 1.0, 4.0\)",
        ),
        ({"name": "transformer", "rope_llama3": (8.0, 4.0, 1.0, 8192)}, "low < high"),
        ({"norm_eps": 0.0}, "norm_eps must be positive; got 0.0"),
        ({"dtype": "float16"}, r"dtype must be one of \('float32', 'bfloat16'\); got 'float16'"),
        ({"remat": "all"}, "remat must be one of"),
        ({"read": "after"}, "read must be one of"),
        ({"objective": "l1"}, r"objective must be one of \('l2', 'dot_product'\); got 'l1'"),
        ({"omega_window": 0}, "omega_window must be a positive integer; got 0"),
        ({"miras": "titan"}, r"miras must be one of \('moneta', 'yaad', 'memora'\); got 'titan'"),
        ({"mlp_hidden": 0}, "mlp_hidden must be a positive integer; got 0"),
        ({"max_length": 0}, "max_length must be a positive integer; got 0"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)


def test_lists_from_a_text_file_become_tuples():
    config = ModelConfig(cms_hidden=[32, 32], cms_chunks=[4])  # pyright: ignore[reportArgumentType]
    assert (config.cms_hidden, config.cms_chunks) == ((32, 32), (4,))
    assert hash(config) == hash(dataclasses.replace(config))


def test_levels_of_whole_layers_are_sorted_by_their_clock():
    config = ModelConfig(name="transformer", layers=5, mlp_chunks=(16, None, 4, 4, 16))
    assert config.fast_chunks == (4, 16)
    assert ModelConfig(cms_chunks=(4, 8)).fast_chunks == (4, 8)
    assert ModelConfig(name="transformer", mlp_chunks=(None, None)).fast_chunks == ()


def test_counts_are_the_arithmetic_of_the_architecture():
    vocab, dim, layers, hidden = 50, 16, 3, 24
    attention, norms = 4 * dim * dim, 2 * dim
    config = ModelConfig(name="transformer", vocab_size=vocab, dim=dim, layers=layers, mlp_hidden=hidden)
    expected = vocab * dim + dim + layers * (attention + norms + 3 * dim * hidden)
    assert count_parameters(config) == expected
    assert count_parameters(dataclasses.replace(config, tie_embeddings=False)) == expected + vocab * dim
    cms = dataclasses.replace(config, name="hope_attention", cms_hidden=(hidden, hidden))
    level = dim + 2 * dim * hidden
    assert count_parameters(cms) == vocab * dim + dim + layers * (attention + dim + 2 * level)
    fast = dataclasses.replace(cms, cms_chunks=(4,))
    assert count_parameters(fast) == count_parameters(cms)  # a clock is not a parameter


@pytest.mark.parametrize("target", [60_000, 100_000, 250_000, 1_000_000])
def test_transformer_is_fitted_by_its_mlp(target):
    config = ModelConfig(name="transformer")
    fitted = match_parameters(config, target)
    assert abs(count_parameters(fitted) - target) <= 0.01 * target
    assert dataclasses.replace(fitted, mlp_hidden=None) == config  # the width of the model was enough


def test_transformer_is_fitted_by_its_dim_where_the_mlp_cannot_shrink_enough():
    config = ModelConfig(name="transformer", dim=128, vocab_size=1000)
    fitted = match_parameters(config, 100_000)  # below embedding and attention of dim 128
    assert fitted.dim < 128
    assert abs(count_parameters(fitted) - 100_000) <= 1_000


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="give 2 layers of transformer 10 parameters"):
        match_parameters(ModelConfig(name="transformer", dim=8), 10)
