"""The same run with another architecture."""

from collections.abc import Sequence
from typing import Any

from hope_jax.models import ARCHITECTURES, ModelConfig
from hope_jax.training.config import TrainConfig
from hope_jax.training.overrides import apply_overrides


def with_architecture(config: TrainConfig, name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """What says something about one kind of model only goes back to its default; sizes stay.

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
    there, here = config.model.architecture, ARCHITECTURES[name]
    changes: dict[str, Any] = {"model.name": name}
    if name != config.model.name:
        changes["model.mlp_chunks"] = ()
    if here.channel != there.channel:
        changes |= {
            "cms_periods": (),
            "model.cms_chunks": (),
            "model.bptt_chunks": (),
            "model.cms_variant": "sequential",
        }
    if here.projections != there.projections:
        changes["model.eta_init"] = ModelConfig.eta_init  # that of one kind of memory says nothing of another
    return apply_overrides(config, overrides, changes)
