"""The same run with another architecture: what says something about one kind of model only goes back to its default."""

from collections.abc import Sequence
from typing import Any

from hope_jax.models import ARCHITECTURES, ModelConfig
from hope_jax.training.config import TrainConfig
from hope_jax.training.overrides import apply_overrides


def architecture_changes(model: ModelConfig, name: str) -> dict[str, Any]:
    """The fields of a model config that change with its name; sizes stay.

    >>> architecture_changes(ModelConfig(cms_chunks=(16,), eta_init=0.002), "hope_attention")["eta_init"]
    0.02
    """
    there, here = model.architecture, ARCHITECTURES[name]
    changes: dict[str, Any] = {"name": name}
    if name != model.name:
        changes["mlp_chunks"] = ()
    if here.channel != there.channel:
        changes |= {"cms_chunks": (), "bptt_chunks": (), "cms_variant": "sequential", "cms_meta": "first_order"}
    if here.projections != there.projections:
        changes["eta_init"] = ModelConfig.eta_init  # that of one kind of memory says nothing of another
    return changes


def with_architecture(config: TrainConfig, name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """The run with another architecture.

    Args:
      config: a run.
      name: one of `ARCHITECTURES`.
      overrides: key=value, of other fields.

    Raises:
      UserError: as `apply_overrides`.

    >>> from hope_jax.training.presets import preset
    >>> hope = preset("30m")
    >>> titans = with_architecture(hope, "titans")
    >>> hope.cms_periods, titans.cms_periods, titans.model.dim == hope.model.dim
    ((1, 16), (), True)
    """
    changes = {f"model.{field}": value for field, value in architecture_changes(config.model, name).items()}
    if ARCHITECTURES[name].channel != config.model.architecture.channel:
        changes["cms_periods"] = ()
    return apply_overrides(config, overrides, changes)
