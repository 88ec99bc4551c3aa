"""Which parameters are hidden matrices, and optimizers in two parts: a rule for them and AdamW for the rest."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hope_jax.types import Params, leaf_name, path_string

type Labels = Any  # a tree of "matrix" and "other" like the parameters or a prefix of them, or a function that makes it

MATRIX, OTHER = "matrix", "other"
_WORDS = {"embed", "embedding", "embeddings", "embedder", "unembed", "unembedding", "wte", "wpe", "head", "ln"}
_WORDS |= {"conv", "gates", "adjust"}  # in a name on the way to a leaf
_WORDS |= {"norm", "layernorm", "rmsnorm", "groupnorm", "batchnorm"}
_VECTORS = {"scale", "bias", "logits", "skip", "persistent"}  # in the leaf's own name


def hidden_matrices(params: Params) -> Any:
    """A tree of "matrix" for hidden matrices and "other" for everything else, by shape and by name.

    A hidden matrix has two or more axes, the last two longer than one (leading axes are layers, heads, ...), and its
    path names no embedding, head, norm, gate or convolution, nor a vector stacked over layers (scale, bias, ...). A
    kernel that keeps heads apart, such as [dim, heads, width] in `nnx.MultiHeadAttention`, is not one matrix this way:
    label it yourself, or reshape it.

    Args:
        params: a tree of arrays or shapes; for other names than these write a function of your own.

    Example:
        >>> import jax.numpy as jnp
        >>> w = jnp.zeros((4, 4))
        >>> hidden_matrices({"embedding": w, "wq": w, "conv": {"q": w}, "norm": {"scale": w}})
        {'conv': {'q': 'other'}, 'embedding': 'other', 'norm': {'scale': 'other'}, 'wq': 'matrix'}

    Reference: spec 4.8; Muon (Jordan et al. 2024) leaves the same ones to AdamW.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: MATRIX if _is_hidden(path, leaf) else OTHER, params)


def muon_dimension_numbers(params: Params) -> Any:
    """The same matrices for `optax.contrib.muon(muon_weight_dimension_numbers=...)`, leading axes independent.

    Example:
        >>> import jax.numpy as jnp
        >>> muon_dimension_numbers({"wq": jnp.zeros((3, 4, 4)), "bias": jnp.zeros(4)})
        {'bias': None, 'wq': MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)}
    """
    axes = optax.contrib.MuonDimensionNumbers(-2, -1)
    return jax.tree.map(lambda label: axes if label == MATRIX else None, hidden_matrices(params))


def _is_hidden(path: Any, leaf: Any) -> bool:
    if leaf.ndim < 2 or min(leaf.shape[-2:]) < 2:
        return False
    names = path_string(path).lower().split("/")
    words = [set(re.findall(r"[a-z]+", name)) for name in names]
    return not (_WORDS & set().union(*words) or _VECTORS & words[-1])


def by_matrix(
    matrix: optax.GradientTransformation,
    other: optax.GradientTransformation,
    labels: Labels | None = None,
    default: Callable[[Params], Any] = hidden_matrices,
) -> optax.GradientTransformationExtraArgs:
    """One transformation for the matrices and another for the rest.

    Args:
        matrix: for the leaves labelled "matrix".
        other: for those labelled "other".
        labels: a tree or a function of the parameters; None: `default`, which may find no matrix.

    Raises:
        ValueError: at `init`, labels of the caller that are neither, or that make nothing a matrix.
    """

    def resolve(tree: Params) -> Any:
        made_of = default if labels is None else labels
        return made_of(tree) if callable(made_of) else made_of

    parts = optax.partition({MATRIX: matrix, OTHER: other}, resolve)

    def init(params: Params) -> optax.OptState:
        found = resolve(params)
        for path, label in jax.tree_util.tree_leaves_with_path(found):
            if label not in (MATRIX, OTHER):
                raise ValueError(f'{path_string(path)} has the label {label!r}; a label is "matrix" or "other"')
        if labels is not None and MATRIX not in jax.tree.leaves(found) and jax.tree.leaves(params):
            names = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
            raise ValueError(
                f'labels make none of the parameters {", ".join(names[:8])} a "matrix"; check the names they look for, '
                "or use optax.adamw"
            )
        return parts.init(params)

    return optax.GradientTransformationExtraArgs(init, parts.update)


def check_matrices(params: Params, who: str) -> None:
    """Raises ValueError, with the path of the leaf, if one of the parameters is no matrix."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.ndim(leaf) < 2:
            raise ValueError(
                f'{who} takes matrices [..., K, V]; {leaf_name(path)} has shape {jnp.shape(leaf)}: label it "other"'
            )


def matrices_and_adamw(
    matrix: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: Any,
    labels: Labels | None,
    adam_learning_rate: optax.ScalarOrSchedule | None,
    adam_b1: Any,
    adam_b2: Any,
    adam_eps: Any,
    adam_weight_decay: Any,
) -> optax.GradientTransformationExtraArgs:
    """A direction for the matrices, with decoupled weight decay, and AdamW for the rest.

    Args:
        matrix: directions of the matrices, not yet negated.
        learning_rate: of the matrices, and of AdamW unless `adam_learning_rate` is given.
        weight_decay: of the matrices.
        labels: as in `by_matrix`.
        adam_learning_rate, adam_b1, adam_b2, adam_eps, adam_weight_decay: of AdamW, which has finite derivatives where
            a gradient is exactly zero.
    """
    adamw = optax.adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        adam_b1,
        adam_b2,
        adam_eps,
        eps_root=1e-16,
        weight_decay=adam_weight_decay,
    )
    decayed = optax.add_decayed_weights(weight_decay)
    return by_matrix(optax.chain(matrix, decayed, optax.scale_by_learning_rate(learning_rate)), adamw, labels)
