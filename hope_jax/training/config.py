"""The configuration of a run: frozen dataclasses, written to the run directory as YAML and read back.

Presets are in `presets.py`, the parsing of `key=value` in `overrides.py`.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from hope_jax.models import ModelConfig, check_sequence_length, prefix_widths
from hope_jax.training.errors import UserError
from hope_jax.training.files import write_text
from hope_jax.training.invocation import command
from hope_jax.training.overrides import from_dict, leaves, one_line, to_dict

CONFIG_FILE = "config.yaml"

# What may differ between a run and its continuation: how long, how often and on what, but not what is
# computed.
FREE_ON_RESUME = (
    "steps",
    "eval_every",
    "eval_batches",
    "final_eval_batches",
    "checkpoint_every",
    "sync_checkpoints",
    "keep_checkpoints",
    "keep_every",
    "stall_seconds",
    "heartbeat_seconds",
    "sample_bytes",
    "mesh.",
    "wandb",
    "peak_flops",
)


@dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each mesh axis (`hope_jax/placement.py`); one device is 1 x 1 x 1 x 1."""

    data: int = 1  # rows of the batch
    fsdp: int = 1  # rows of the batch, and parameters and optimizer state
    tensor: int = 1  # heads and hidden widths
    sequence: int = 1  # tokens; inside a memory, heads

    def __post_init__(self):
        _check_positive(self, "data", "fsdp", "tensor", "sequence")

    @property
    def size(self) -> int:
        """How many devices."""
        return self.data * self.fsdp * self.tensor * self.sequence

    def describe(self) -> str:
        """As it is written on the command line.

        >>> MeshConfig(data=2, tensor=4).describe()
        'data=2,fsdp=1,tensor=4,sequence=1'
        """
        return ",".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items())


@dataclass(frozen=True)
class StartConfig:
    """What a run begins from (`origin.py`): random parameters, or those of another run."""

    run: str = ""  # the directory of another run; "" draws the parameters
    momentum: Literal["carry", "reset"] = "carry"  # whether its momenta go on or start again


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes.

    >>> TrainConfig(steps=10, warmup_steps=2).steps
    10
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    start: StartConfig = field(default_factory=StartConfig)
    data: str = "embedded"  # or a file, folder, pattern or hub:NAME; several as SOURCE:WEIGHT,SOURCE:WEIGHT
    text_column: str = "text"  # of tables
    tokenizer: str = "bytes"  # or the path of a tokenizers JSON file
    # "ignore": windows are cut anywhere, the memory starts empty in each. "reset": documents are packed into windows,
    # each starts empty. "carry": each row reads one stream and its memory goes on from step to step; "carry_reset"
    # empties it where a document begins.
    documents: Literal["ignore", "reset", "carry", "carry_reset"] = "ignore"
    document_multiple: int = 0  # documents begin at multiples of it: larger is faster and pads more; 0: the least
    seed: int = 0

    steps: int = 600
    batch_size: int = 8  # windows per step, over all devices
    accumulate: int = 1  # microbatches that a step is computed in
    seq_len: int = 512  # predicted bytes per window

    learning_rate: float = 3e-3  # at the end of the warm-up
    final_learning_rate: float = 3e-4  # at the end of the cosine
    warmup_steps: int = 50  # at most half of the schedule
    decay_steps: int = 0  # length of warm-up and cosine together; 0 means steps
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0  # global norm of the gradient
    cms_periods: tuple[int, ...] = ()  # level i of the CMS steps every cms_periods[i] steps; () means every step

    # Weights of the losses of prefixes of the final representation, each half as wide as the next and the last all of
    # it; () is (1,), the head alone. Evaluations are of the whole.
    matryoshka: tuple[float, ...] = ()

    eval_every: int = 100
    eval_batches: int = 8  # of a microbatch each, in evaluations during training
    final_eval_batches: int = 0  # at the end; 0 reads all of the validation text
    checkpoint_every: int = 200
    # Wait for each save: a kill then loses at most checkpoint_every steps. A save that runs beside the steps counts
    # when it is complete, before the next one begins at the latest: a kill may lose up to twice as many.
    sync_checkpoints: bool = False
    keep_checkpoints: int = 2  # the latest
    keep_every: int = 0  # and for good those of every so many steps; 0 for none
    sample_bytes: int = 300  # of the sample printed at the end
    wandb: str = ""  # a project of Weights & Biases that gets the records too
    peak_flops: float = 0.0  # of one device, for the MFU; 0 takes the published figure, where there is one
    stall_seconds: int = 1800  # without a step, after which the run says where it stands
    heartbeat_seconds: int = 100  # of silence, after which a process of several counts as dead

    def __post_init__(self):
        _check_positive(self, "steps", "batch_size", "accumulate", "seq_len", "learning_rate", "clip_norm")
        _check_positive(self, "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints")
        _check_positive(self, "stall_seconds", "heartbeat_seconds")
        _check_not_negative(self, "seed", "warmup_steps", "decay_steps", "final_eval_batches", "sample_bytes")
        _check_not_negative(self, "document_multiple", "keep_every")
        _check_not_negative(self, "final_learning_rate", "weight_decay", "beta1", "beta2", "peak_flops")
        if not self.start.run and self.start != StartConfig():
            raise UserError(
                f"start.momentum={self.start.momentum} is of the run that this begins from; give start.run=RUN"
            )
        self._check_model()
        self._check_matryoshka()
        self._check_documents()
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size={self.batch_size} does not divide into accumulate={self.accumulate} "
                "microbatches; make batch_size a multiple of accumulate"
            )
        shards = self.mesh.data * self.mesh.fsdp
        if self.microbatch % shards:
            raise UserError(
                f"a microbatch of {self.microbatch} windows does not divide over "
                f"mesh.data * mesh.fsdp = {shards} devices; "
                f"make batch_size a multiple of {shards * self.accumulate}"
            )
        self._check_heads()
        if self.seq_len % self.mesh.sequence:
            raise UserError(
                f"seq_len={self.seq_len} does not divide over mesh.sequence={self.mesh.sequence} devices; "
                f"make it a multiple of {self.mesh.sequence}"
            )
        if max(self.beta1, self.beta2) >= 1:
            raise UserError(f"beta1={self.beta1}, beta2={self.beta2}: both must be below 1, for example 0.9 and 0.95")
        if any(period < 1 for period in self.cms_periods):
            raise UserError(f"cms_periods={self.cms_periods}: every period must be at least 1, for example 1,4")
        levels = len(self.model.cms_hidden) if self.model.has_cms else 0
        if len(self.cms_periods) > levels:
            raise UserError(
                f"cms_periods={self.cms_periods}: model={self.model.name} has {levels or 'no'} CMS levels; "
                f"give {f'at most {levels} periods' if levels else 'none'}"
            )

    def _check_heads(self) -> None:
        """Heads that do not divide would be computed on every device, silently."""
        axes = {"tensor": self.mesh.tensor} | (
            {} if self.model.architecture.cache else {"sequence": self.mesh.sequence}
        )
        if self.model.heads % math.prod(axes.values()):
            names = " * ".join(f"mesh.{name}={size}" for name, size in axes.items())
            raise UserError(
                f"model.heads={self.model.heads} does not divide over {names} devices; change the heads or the mesh "
                "(memories are divided by heads)"
            )

    def _check_model(self) -> None:
        check_sequence_length(self.model, self.seq_len)
        if self.tokenizer == "bytes" and self.model.vocab_size != 256:
            raise UserError(f"model.vocab_size={self.model.vocab_size}: the data are bytes, so it must be 256")
        if self.model.architecture.cache and self.seq_len > self.model.max_length:
            raise UserError(
                f"seq_len={self.seq_len} does not fit the attention cache of model.max_length="
                f"{self.model.max_length}; make one smaller or the other larger"
            )

    def _check_matryoshka(self) -> None:
        weights = self.matryoshka
        if weights and (min(weights) < 0 or max(weights) == 0):
            raise UserError(
                f"matryoshka={weights}: weights are 0 or more and one is above, for example 0.1,0.2,0.3,0.4"
            )
        if weights:
            try:
                prefix_widths(self.model, len(weights))
            except ValueError as error:
                raise UserError(f"matryoshka={weights}: {one_line(error)}") from error

    def _check_documents(self) -> None:
        if self.carries and self.model.architecture.cache:
            raise UserError(
                f"documents={self.documents}: the attention cache of model={self.model.name} is full after "
                f"model.max_length={self.model.max_length} tokens; give documents=reset or a model with a memory"
            )
        least = segment_length(self.model)
        if self.segment % least:
            raise UserError(
                f"document_multiple={self.document_multiple} must be a multiple of {least}, the tokens that "
                f"model={self.model.name} reads at once; leave it out for the least"
            )
        if self.documents in ("reset", "carry_reset") and self.seq_len % self.segment:
            raise UserError(
                f"seq_len={self.seq_len}: with documents={self.documents} each document begins at a multiple of "
                f"{self.segment} tokens; make seq_len a multiple of it"
            )

    @property
    def segment(self) -> int:
        """Documents begin at multiples of this many tokens where the memory starts afresh with them."""
        return self.document_multiple or segment_length(self.model)

    @property
    def carries(self) -> bool:
        """Whether memory goes from one step to the next."""
        return self.documents in ("carry", "carry_reset")

    @property
    def schedule_steps(self) -> int:
        """The length of the learning-rate schedule."""
        return self.decay_steps or self.steps

    @property
    def microbatch(self) -> int:
        """Windows per microbatch."""
        return self.batch_size // self.accumulate


MIN_SEGMENT = 16  # tokens; shorter segments would be mostly overhead


def segment_length(model: ModelConfig) -> int:
    """The least number of tokens that a model reads at once where its memory may start afresh before any of them.

    Attention hides documents from each other token by token; a memory starts a document with a whole chunk.

    >>> segment_length(ModelConfig(chunk_proj=4, chunk_mem=12)), segment_length(ModelConfig(name="transformer"))
    (24, 1)
    """
    if model.architecture.cache and not model.fast_chunks:
        return 1
    chunk = math.lcm(model.chunk_proj, model.chunk_mem, *model.fast_chunks)
    return chunk * -(-MIN_SEGMENT // chunk)


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check_size(name, value)
        if not value > 0:
            raise UserError(f"{name}={value} must be greater than 0")


def _check_size(name: str, value: float) -> None:
    if isinstance(value, int):
        if value >= 2**63:
            raise UserError(f"{name}={value} must be below 2**63")
    elif not math.isfinite(value):
        raise UserError(f"{name}={value} must be a finite number")


def _check_not_negative(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check_size(name, value)
        if not value >= 0:
            raise UserError(f"{name}={value} must be 0 or greater")


def write_config(config: TrainConfig, run_dir: Path) -> None:
    """Writes config.yaml."""
    text = yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None)
    write_text(run_dir / CONFIG_FILE, text)


def read_config(run_dir: Path) -> TrainConfig:
    """Reads config.yaml of a run.

    Raises:
      UserError: there is no run, or its config is not one that this version can read.
    """
    path = run_dir / CONFIG_FILE
    if not path.exists():
        raise UserError(
            f"{run_dir} is not a run directory (no {CONFIG_FILE}); train one with: {command('train', 'tiny')}"
        )
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError) as error:  # bytes that are no text, dates that are none
        raise UserError(f"{path} is not readable YAML; restore it or train a new run") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not readable YAML; restore it or train a new run")
    try:
        return from_dict(TrainConfig(), values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def config_hash(config: TrainConfig) -> str:
    """A fingerprint of what a run computes: `FREE_ON_RESUME` left out.

    Fields at their default do not count, so that runs go on when the config gets a field more.
    """
    usual = type(config)()
    config = from_dict(usual, to_dict(config))  # as config.yaml reads it: 1 in the place of a float is 1.0
    left_out = FREE_ON_RESUME if config.start.run else (*FREE_ON_RESUME, "start.")
    default = leaves(usual)
    values = {
        key: value for key, value in leaves(config).items() if not key.startswith(left_out) and value != default[key]
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def differences(ours: TrainConfig, theirs: TrainConfig) -> list[str]:
    """The keys that keep a run from being continued, as "key: theirs there, ours here"."""
    mine, other = leaves(ours), leaves(theirs)
    return [
        f"{key}: {other[key]} there, {mine[key]} here"
        for key in mine
        if mine[key] != other[key] and not key.startswith(FREE_ON_RESUME)
    ]


def continue_config(config: TrainConfig, run_dir: Path) -> TrainConfig:
    """The config to resume a run with: its schedule, and what `FREE_ON_RESUME` lets `config` change.

    Raises:
      UserError: the run directory belongs to another config; the message names the keys.
    """
    previous = read_config(run_dir)
    wanted = config if config.decay_steps else dataclasses.replace(config, decay_steps=previous.decay_steps)
    different = differences(wanted, previous)
    if different:
        raise UserError(
            f"{run_dir} belongs to another config ({'; '.join(different)}); "
            "give the same config, or another directory with --run DIR"
        )
    return wanted
