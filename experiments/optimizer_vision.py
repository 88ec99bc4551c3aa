"""AdamW, Muon, AdaMuon and M3 on a small Vision Transformer, each with its own learning rate from one sweep.

    python -m experiments.optimizer_vision [--data FOLDER] [--optimizers adamw muon adamuon m3]
        [--learning-rates 1e-3 3e-3 1e-2] [--seeds 0 1 2] [--tiny]

Images are scikit-learn's 1,797 digits of 8 x 8 (a quarter is held out), or those of a folder, one subfolder per class,
inside `train/` and `test/` or not; they are scaled to `size`. "bits_train" and "bits_test" are the cross-entropy of
the labels in bits at the end, on all training images and on all test images. Options of sequence models (chunks,
overrides, parameters) have no effect here. The paper (Figure 11) compares AdamW, Muon and M3 on ImageNet-21K with 24M
and 86M parameters: there M3 is lowest on both.

Cost of 400 steps at the defaults, compilation apart, in minutes of one core (AMD EPYC): 1.0.
"""

import dataclasses
import functools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.mad import epochs
from experiments.optimizer_comparison import ComparisonOptions, rule
from experiments.options import TINY_RESULTS
from experiments.running import Job, main
from experiments.training import Batch, Scores, summed
from experiments.vit import ViTConfig, vit
from hope_jax.training.errors import UserError
from hope_jax.training.overrides import one_line

SPLIT_SEED = 1_000_003  # of what is held out, where the data do not say


@dataclasses.dataclass(frozen=True)
class VisionOptions(ComparisonOptions):
    """Optimizers on images.

    Attributes:
      data: "digits", or a folder of images in one subfolder per class.
      size: height and width that the images of a folder are scaled to.
      patch: height and width of a patch.
    """

    models: tuple[str, ...] = ("vit",)
    weight_decays: tuple[float, ...] = (0.1,)
    steps: int = 400
    batch_size: int = 128
    layers: int = 4
    data: str = "digits"
    size: int = 32
    patch: int = 2

    KNOWN_MODELS: ClassVar[tuple[str, ...]] = ("vit",)
    COUNTS: ClassVar[tuple[str, ...]] = ("size", "patch", *ComparisonOptions.COUNTS)


TINY = VisionOptions(
    optimizers=("m3_literal_eps_0.1",),
    weight_decays=(0.0,),
    learning_rates=(3e-3,),
    steps=2,
    eval_every=2,
    batch_size=8,
    dim=8,
    head_width=8,
    layers=1,
    patch=4,
    results=TINY_RESULTS,
)


class Images(NamedTuple):
    """A data set: images in [-1, 1], a label for each."""

    train_NSSC: np.ndarray
    train_labels_N: np.ndarray
    test_NSSC: np.ndarray
    test_labels_N: np.ndarray
    classes: int


@functools.cache
def load(data: str, size: int) -> Images:
    """The digits, or the images of a folder.

    Raises:
      UserError: scikit-learn is not there, or the folder holds no images.
    """
    return digits() if data == "digits" else folder(Path(data), size)


def digits() -> Images:
    """1,797 handwritten digits, 8 x 8 (Alpaydin and Kaynak 1998, UCI, CC BY 4.0), a quarter held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits come with scikit-learn; pip install scikit-learn, or give --data FOLDER") from error
    flat_NP, labels_N = map(np.asarray, load_digits(return_X_y=True))
    images_NSSC = (flat_NP.reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)  # from 0 ... 16
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels_N))
    test, train = np.split(order, [len(order) // 4])
    return Images(images_NSSC[train], labels_N[train], images_NSSC[test], labels_N[test], 10)


def folder(path: Path, size: int) -> Images:
    """The images below a folder, its `train` and `test` or, without them, a quarter held out.

    Raises:
      UserError: `datasets` finds no images in classes there.
    """
    from datasets import ClassLabel, load_dataset

    with tempfile.TemporaryDirectory() as cache:
        try:
            found = load_dataset("imagefolder", data_dir=str(path), cache_dir=cache)
            if "test" not in found:
                found = found["train"].train_test_split(test_size=0.25, seed=SPLIT_SEED, shuffle=True)
            label = found["train"].features.get("label")
        except Exception as error:  # of many kinds, datasets' own among them
            raise UserError(f"no images to be read in {path}: {one_line(error)}") from error
        if not isinstance(label, ClassLabel):
            raise UserError(f"{path} has no classes; put the images of each class into a subfolder of its own")
        parts = [_arrays(found[split], size) for split in ("train", "test")]
    return Images(*parts[0], *parts[1], len(label.names))


def _arrays(rows: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    scaled = [np.asarray(image.convert("RGB").resize((size, size))) for image in rows["image"]]
    return np.stack(scaled).astype(np.float32) / 127.5 - 1, np.asarray(rows["label"])


def losses(logits_BC: jax.Array, batch: Batch) -> jax.Array:
    """[3]: nats, right answers and images, summed."""
    nats_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, jnp.asarray(batch.targets))
    weights_B = jnp.asarray(batch.weights)
    right_B = logits_BC.argmax(axis=-1) == batch.targets
    return jnp.stack([(nats_B * weights_B).sum(), (right_B * weights_B).sum(), weights_B.sum()])


def mean_nats(logits_BC: jax.Array, batch: Batch) -> jax.Array:
    """The loss."""
    nats, _, count = losses(logits_BC, batch)
    return nats / count


def in_batches(images: np.ndarray, labels: np.ndarray, rows: int) -> Iterator[Batch]:
    """All images in order, the last batch filled with images of weight zero."""
    for begin in range(0, len(images), rows):
        index = np.arange(begin, begin + rows)
        weights = (index < len(images)).astype(np.float32)
        index = index.clip(max=len(images) - 1)
        yield Batch(images[index], labels[index], weights)


def prepare(cell: VisionOptions) -> Job:
    """What one cell computes."""
    [optimizer], [seed] = cell.optimizers, cell.seeds
    images = load(cell.data, cell.size)
    _, size, _, channels = images.train_NSSC.shape
    try:
        config = ViTConfig(
            size=size,
            channels=channels,
            classes=images.classes,
            patch=cell.patch,
            dim=cell.dim,
            layers=cell.layers,
            heads=max(1, cell.dim // cell.head_width),
        )
        model = vit(config)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    pool = Batch(images.train_NSSC, images.train_labels_N, np.ones(len(images.train_labels_N), np.float32))
    batches = epochs(pool, np.random.default_rng(seed), cell.batch_size)
    train = list(in_batches(images.train_NSSC, images.train_labels_N, cell.batch_size))
    test = list(in_batches(images.test_NSSC, images.test_labels_N, cell.batch_size))
    measure = jax.jit(lambda params, batch: losses(model.apply(params, batch.tokens), batch))

    def evaluate(params: Any) -> Scores:
        (train_nats, _, trained), (test_nats, right, tested) = (summed(measure, params, part) for part in (train, test))
        bits = {"bits_train": train_nats / trained, "bits_test": test_nats / tested}
        return {name: float(nats) / math.log(2) for name, nats in bits.items()} | {"accuracy": float(right / tested)}

    column = f"{Path(cell.data).name}, {cell.steps} steps"
    return Job(column, "", config, model, batches, mean_nats, evaluate, cell, row=optimizer, tx=rule(cell))


if __name__ == "__main__":
    main("optimizer_vision", VisionOptions, TINY, prepare)
