"""Configs: overrides, their mistakes, YAML and back, and what may change on resuming."""

import dataclasses

import pytest

from hope_jax.models import ModelConfig
from hope_jax.models.config import NAMES
from hope_jax.training.config import (
    TrainConfig,
    config_hash,
    continue_config,
    differences,
    read_config,
    write_config,
)
from hope_jax.training.errors import UserError
from hope_jax.training.overrides import apply_overrides, leaf_types
from hope_jax.training.presets import PRESETS, describe_presets, preset


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("steps=1_000", "steps", 1000),
        ("learning_rate=1e-2", "learning_rate", 0.01),
        ("cms_periods=1,4", "cms_periods", (1, 4)),
        ("cms_periods=", "cms_periods", ()),
        ("matryoshka=0.5,0,1", "matryoshka", (0.5, 0.0, 1.0)),
        ("data=a=b.txt", "data", "a=b.txt"),
        ("mesh.data=2", "mesh", TrainConfig().mesh.__class__(data=2)),
        ("model.tie_embeddings=false", "model", ModelConfig(tie_embeddings=False)),
        ("model=transformer", "model", ModelConfig(name="transformer")),
        ("model.momentum=none", "model", ModelConfig(momentum=None)),
        ("model.momentum=gate", "model", ModelConfig(momentum="gate")),
        ("model.momentum=0.5", "model", ModelConfig(momentum=0.5)),
        ("model.mlp_hidden=32", "model", ModelConfig(mlp_hidden=32)),
    ],
)
def test_overrides_are_parsed_by_type(override, key, value):
    assert getattr(apply_overrides(TrainConfig(), [override]), key) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stps=4", "unknown key 'stps'; did you mean 'steps'"),
        ("dim=4", "did you mean 'model.dim'"),
        ("model.dmi=4", "did you mean 'model.dim'"),
        ("model=transfromer", "did you mean 'transformer'"),
        ("steps=four", "steps=four: expected a whole number"),
        ("steps=1.5", "expected a whole number"),
        ("learning_rate=fast", "expected a number"),
        ("model.tie_embeddings=maybe", "expected true or false"),
        ("cms_periods=1,x", "expected a whole number"),
        ("steps", "write key=value"),
        ("=4", "write key=value"),
        ("steps=0", "steps=0 must be greater than 0"),
        ("learning_rate=nan", "learning_rate=nan must be a finite number"),
        (f"seed={10**400}", "must be below"),
        ("seed=-1", "seed=-1 must be 0 or greater"),
        ("cms_periods=1,0", "every period must be at least 1"),
        ("matryoshka=0,0", "weights are 0 or more and one is above"),
        ("matryoshka=1,1,1,1,1,1,1,1", "8 prefixes, each half as wide as the next, do not fit dim=64"),
        ("accumulate=3", "batch_size a multiple of accumulate"),
        ("mesh.data=3", "make batch_size a multiple of 3"),
        ("beta2=1", "below 1"),
        ("model.cms_chunks=4,6", r"chunk sizes must divide, fastest first; got cms_chunks=\[4, 6\]"),
        ("model.vocab_size=300", "must be 256"),
        ("model.heads=3", "heads must divide dim"),
    ],
)
def test_mistakes_are_one_line_with_a_remedy(override, message):
    with pytest.raises(UserError, match=message) as caught:
        apply_overrides(TrainConfig(), [override])
    assert "\n" not in str(caught.value)


def test_an_unknown_key_lists_all_keys():
    with pytest.raises(UserError) as caught:
        apply_overrides(TrainConfig(), ["nothing_like_it=1"])
    assert all(key in str(caught.value) for key in leaf_types(TrainConfig))


def test_overrides_may_be_valid_only_together():
    assert apply_overrides(TrainConfig(), ["model.heads=3", "model.dim=96"]).model.heads == 3


def test_sequence_longer_than_the_cache_is_refused():
    with pytest.raises(UserError, match=r"seq_len=512.*model.max_length=\s*64"):
        apply_overrides(TrainConfig(), ["model=transformer", "model.max_length=64"])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_yaml(name, tmp_path):
    periods = () if preset(name).model.name == "transformer" else ("cms_periods=1,4",)
    config = apply_overrides(preset(name), [*periods, "model.bptt_chunks=", "learning_rate=1e-5"])
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config
    assert "learning_rate: 1.0e-05" in (tmp_path / "config.yaml").read_text()
    assert name in describe_presets()


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_takes_every_architecture(name):
    for one in PRESETS:
        layers = ["model.layers=2"] if one == "smoke" else []  # samba alternates two mixers
        config = preset(one, [f"model={name}", *layers])
        assert config.model.name == name and config.model.dim == preset(one).model.dim
        assert config.model.has_cms or not config.cms_periods
        self_made = config.model.architecture.projections == preset(one).model.architecture.projections
        assert config.model.eta_init == (preset(one).model if self_made else ModelConfig()).eta_init
    with pytest.raises(UserError, match="has 2 CMS levels" if config.model.has_cms else "has no CMS levels"):
        preset("tiny", [f"model={name}", "cms_periods=1,1,1"])


def test_unknown_preset():
    with pytest.raises(UserError, match="unknown preset 'tniy'; did you mean 'tiny'"):
        preset("tniy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not a run directory"),
        ("steps: [", "not readable YAML"),
        ("hello", "not readable YAML"),
        ("stps: 3", "config.yaml: unknown key 'stps'"),
        ("seed: 2024-99-99", "not readable YAML"),
        ("steps: many", "steps=many: expected a whole number"),
    ],
)
def test_unreadable_config(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


def test_hash_ignores_what_may_change():
    config = TrainConfig(decay_steps=600)
    longer = dataclasses.replace(config, steps=5_000, eval_every=7)
    assert config_hash(longer) == config_hash(config)
    assert config_hash(dataclasses.replace(config, clip_norm=1)) == config_hash(config)  # 1.0 once read from YAML
    for changes in ({"seed": 1}, {"matryoshka": (0.5, 0.5)}):
        assert config_hash(dataclasses.replace(config, **changes)) != config_hash(config)


@dataclasses.dataclass(frozen=True)
class Later(TrainConfig):
    """A field more than today's."""

    extra: int = 3


def test_a_run_goes_on_when_the_config_gets_a_field_more():
    assert config_hash(Later(seed=7)) == config_hash(TrainConfig(seed=7)) != config_hash(TrainConfig(seed=8))
    assert config_hash(Later(seed=7, extra=4)) != config_hash(Later(seed=7))


def test_continuing_keeps_the_schedule_and_names_what_differs(tmp_path):
    write_config(TrainConfig(steps=600, decay_steps=600), tmp_path)
    assert continue_config(TrainConfig(steps=900), tmp_path).decay_steps == 600
    other = apply_overrides(TrainConfig(), ["model.dim=32", "seed=3"])
    with pytest.raises(UserError, match=r"model.dim: 64 there, 32 here; .*--run DIR") as caught:
        continue_config(other, tmp_path)
    assert "seed: 0 there, 3 here" in str(caught.value)
    assert differences(other, other) == []
