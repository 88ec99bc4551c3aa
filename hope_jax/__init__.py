"""Nested Learning in JAX: a model is a set of associative memories, each with its own objective, rule and clock.

    memory      what is remembered with      linear_memory, mlp_memory, deep_memory
    objective   what remembering means       dot_product, l2_regression, lp_regression, huber, huber_norm
    rule        how it is written            any optax.GradientTransformation: dgd, optax.sgd, a chain, ...
    clock       how often it is written      chunk_size
    level       one memory, rule and clock   level(memory, rule, chunk_size, objective=...)
    nest        levels in time               nest(*levels) -> params, init, apply

What is known by other names is an arrangement of these (tests/test_identities.py proves each line, or says where):

    linear attention        level(linear_memory, optax.sgd(1.0), any C, dot_product, read="after")
    RetNet                  the same with optax.chain(optax.sgd(1.0), retention(alpha))
    gated linear attention  the same with dgd(exact=False, decay=False) and gates eta, alpha
    Mamba-2                 the same with log_alpha = -exp(a) eta, keys that the heads share, and the value in the read
    DeltaNet                level(linear_memory, dgd(exact=False), any C, dot_product, read="after")
                          = level(linear_memory, dgd(exact=False, decay=False), C = 1, l2_regression, read="after")
    Gated DeltaNet          DeltaNet with dgd(exact=False, decayed_erase=True) and gates eta, alpha
    Longhorn                DeltaNet with dgd()
    TTT-Linear              level(linear_memory, dgd(exact=False, decay=False), C, l2_regression, read="after")
    TTT-MLP                 the same with mlp_memory
    DLA                     level(mlp_memory, dgd(exact=False, decay=False), C, dot_product) with gates eta, alpha
    DGD on L2 (93)          level(linear_memory, dgd(), C, l2_regression, read="start")
    Titans LMM              level(memory, dgd(exact=False, decay=False, momentum="gate"), C, l2_regression)
                          = one with optax.chain(optax.sgd(eta), heavy_ball(mu), retention(alpha)) for constant eta
    MAC                     y = attention over [persistent vectors, answers of a Titans LMM, segment]; the LMM learns y
                            and the output is y * LMM(y)
    MAG                     silu(norm(sliding-window attention)) * norm(Titans LMM), both of the same input
    MAL                     sliding-window attention over norm(Titans LMM)
    Oja (66)                level(linear_memory, dgd(exact=False, decay=False), C = 1, read="after") with its own error
                          = DeltaNet of the transposed state, whose writes are the keys of a gated linear attention
    Omega rule (68)         omega: TTT with retention on the last c tokens, errors and reads at the chunk's start
    Atlas                   omega with optax.chain(heavy_ball(), newton_schulz, step, retention()), one write per chunk
    Moneta                  miras(memory, C, objective=lp_regression(3), link=lq(4))
    Yaad                    miras(memory, C, objective=huber_norm())
                          = level(memory, dgd(exact=False, decay=False), C, huber_norm())
    Memora                  miras(memory, C, objective=l2_regression, link=softmax)
    Comba                   DeltaNet with a gate alpha, on closed_loop(tokens): two steps, and a query less a key
    RWKV-7                  rwkv7, no nest: the delta rule with a decay per channel and a second key, which erases
    SRWM                    self_referential, no nest: the delta rule of a matrix that makes its own keys, values, rates
    LSTM                    lstm, no nest: a vector that is written and forgotten by gates
    Linear Attention++      y_t = a_t S_t, two matrices that remember the same pairs, one reading for the other
    softmax attention       softmax_attention: the regression without weights, solved for every query (62)
    sliding-window attention  softmax_attention(window=c): the same over the last c tokens (63)
    Transformer             blocks of softmax attention and a SwiGLU
    Samba                   blocks of Mamba-2 and of sliding-window attention in turn, a SwiGLU in each
    self-modifying Titans   nest(level(k, v, eta, alpha boxes, dgd, C_proj), level(mem box, dgd, C_mem))
    CMS                     nest(*[level(cms_memory, tx, C_l)]) with the gradient of the chain's loss as error
    nested CMS              the same, each level followed by level(cms_memory, tx_{l+1}, C_{l+1}, restarts=True)
    independent CMS         the same levels side by side: x + sum of softmax(logits)_l MLP_l(norm(x))
    Hope                    blocks of self-modifying Titans and a CMS
    Hope-Attention          blocks of softmax attention and a CMS
    momentum                optax.trace: a level whose data are gradients; heavy_ball after optax.sgd
                          = generalised_momentum(optax.chain(ggd(dot_product), retention(alpha))) of Outer factors
    GGD (59)                ggd(objective, retention): the dot product is gradient descent, the regression dgd()
    heavy ball              nest of m, optax.chain(optax.sgd(eta), retention(alpha)), and w, optax.sgd(1.0) of error -m,
                            with the model at w + m
    delta momentum          delta_momentum: dgd whose weights are m and whose keys are gradients
    Muon                    output_momentum(sigma=newton_schulz): momentum read through its polar factor
    Adam                    two levels average g and v = g^2; the update is the regression (101) of sqrt(v) on gradients
    RMSProp                 the same, where all targets but the latest are zero
    AdaGrad                 RMSProp that forgets nothing
    M3 (75)                 levels of clocks 1 and f whose data are gradients, read through newton_schulz: m3
    MLP block               a level with learning rate 0
"""

from hope_jax.adamuon import adamuon, scale_by_adamuon
from hope_jax.attention import softmax_attention
from hope_jax.capture import LocalSurprise, factor_labels, local_surprise, value_and_factors
from hope_jax.cms import cms, cms_chain, cms_memory, cms_mixture, slow_period
from hope_jax.deep_momentum import deep_momentum
from hope_jax.ggd import generalised_momentum, ggd
from hope_jax.levels import level
from hope_jax.m3 import m3, scale_by_m3
from hope_jax.matrix_parameters import hidden_matrices, muon_dimension_numbers
from hope_jax.memories import deep_memory, linear_memory, mlp_memory
from hope_jax.minibatch import add_delta_decay, mean_factors, minibatch
from hope_jax.miras import memora, miras, moneta, yaad
from hope_jax.momentum import (
    delta_momentum,
    feature_momentum,
    learned_preconditioner,
    output_momentum,
    preconditioned_momentum,
)
from hope_jax.nesting import nest
from hope_jax.newton_schulz import newton_schulz
from hope_jax.objectives import clipped_dot_product, dot_product, huber, huber_norm, l2_regression, lp_regression
from hope_jax.oja import oja
from hope_jax.omega import atlas, omega
from hope_jax.optimizers import carry_momentum, cms_schedule, every, reset_momentum, steps_until_due
from hope_jax.self_modifying import SelfModifyingConfig, self_modifying
from hope_jax.sequence import (
    closed_loop,
    comba,
    delta_net,
    dgd_attention,
    gated_delta_net,
    gated_linear_attention,
    linear_attention,
    linear_attention_pp,
    longhorn,
    retnet,
    ttt_linear,
)
from hope_jax.sequence_layer import SequenceLayer
from hope_jax.start_levels import nest_with_starts
from hope_jax.titans import titans_lmm
from hope_jax.transforms import dgd, heavy_ball, retention
from hope_jax.types import (
    Level,
    LevelState,
    Memory,
    Nest,
    NestState,
    Objective,
    Outer,
    Tokens,
    Write,
    contract,
    gram,
)

__all__ = [
    "Level",
    "LevelState",
    "LocalSurprise",
    "Memory",
    "Nest",
    "NestState",
    "Objective",
    "Outer",
    "SelfModifyingConfig",
    "SequenceLayer",
    "Tokens",
    "Write",
    "adamuon",
    "add_delta_decay",
    "atlas",
    "carry_momentum",
    "clipped_dot_product",
    "closed_loop",
    "cms",
    "cms_chain",
    "cms_memory",
    "cms_mixture",
    "cms_schedule",
    "comba",
    "contract",
    "deep_memory",
    "deep_momentum",
    "delta_momentum",
    "delta_net",
    "dgd",
    "dgd_attention",
    "dot_product",
    "every",
    "factor_labels",
    "feature_momentum",
    "gated_delta_net",
    "gated_linear_attention",
    "generalised_momentum",
    "ggd",
    "gram",
    "heavy_ball",
    "hidden_matrices",
    "huber",
    "huber_norm",
    "l2_regression",
    "learned_preconditioner",
    "level",
    "linear_attention",
    "linear_attention_pp",
    "linear_memory",
    "local_surprise",
    "longhorn",
    "lp_regression",
    "m3",
    "mean_factors",
    "memora",
    "minibatch",
    "miras",
    "mlp_memory",
    "moneta",
    "muon_dimension_numbers",
    "nest",
    "nest_with_starts",
    "newton_schulz",
    "oja",
    "omega",
    "output_momentum",
    "preconditioned_momentum",
    "reset_momentum",
    "retention",
    "retnet",
    "scale_by_adamuon",
    "scale_by_m3",
    "self_modifying",
    "slow_period",
    "softmax_attention",
    "steps_until_due",
    "titans_lmm",
    "ttt_linear",
    "value_and_factors",
    "yaad",
]
