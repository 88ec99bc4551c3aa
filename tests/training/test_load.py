"""A run read back as a model to go on with."""

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.models import build_lm, stack_levels
from hope_jax.training.load import load_pretrained, load_run


def test_levels_are_stacked_on_a_trained_run(trained):
    """From the run directory: the trained logits bit for bit at learning rate 0, and others from the first write on."""
    run, tokens = load_run(trained), jnp.arange(40, 49)[None]

    def logits(config, params):
        lm = build_lm(config)
        return jax.jit(lambda p: lm.apply(p, lm.init_state(p, 1), tokens, phase=0)[1])(params)

    expected = logits(run.config.model, run.state.params)
    still = stack_levels(load_pretrained(trained), {0: 4}, eta=0.0)
    np.testing.assert_array_equal(logits(*still), expected)
    adapting = stack_levels(load_pretrained(trained), {0: 4}, eta=10.0)
    moved = np.abs(logits(*adapting) - expected).max(axis=(0, 2)) > 1e-6
    np.testing.assert_array_equal(moved, np.arange(9) >= 4)
