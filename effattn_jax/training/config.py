"""The configuration of a run: five frozen records, every field documented where it stands.

The command line, the help, `config.json` and the comparison of a run folder with a command are all made from these.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from effattn_jax.data import DataConfig
from effattn_jax.models import ModelConfig
from effattn_jax.training.options import read_fields, split_options


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its schedule and the clipping before it."""

    name: str = "adamw"
    """Optimizer: adamw, amos, lamb, lars, lion, sgd, tiger."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up, reaching its end at the last step."""
    final_learning_rate: float = 1e-4
    """Learning rate at the last step (cosine and linear)."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0; at most half of the run."""
    beta1: float = 0.9
    """Decay of the first moment (sgd, lars, tiger: the momentum; amos: that of the update, 0 for none)."""
    beta2: float = 0.99
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decay of matrices and embeddings, times the learning rate; biases and norms are left out (amos has its own), and so
    are a mixer's own tables: of positions (shaw, xl, tupe, disentangled, t5), of synthesizers and external memories, the
    projections over time of linformer, hedgehog's feature maps, rep_mlp's convolutions, the state matrices of s4 ... mamba."""
    extra_l2: float = 0.0
    """Amos: further decay of all parameters, not times the learning rate."""
    clip_norm: float | None = 1.0
    """Longest global gradient norm; None turns clipping off."""
    clip: Literal["hard", "soft"] = "hard"
    """Form of the clipping: g min(1, c / |g|), or g c / (|g| + c)."""
    lookahead_period: int = 0
    """Updates after which Lookahead pulls the weights back to slow ones; 0 is without it."""
    lookahead_step: float = 0.5
    """Share of the way that the slow weights go each time."""
    groups: tuple[str, ...] = ()
    """Rules "REGEX: option=value, ..." of parameter groups, first match in the '/'-joined path; they replace weight-decay
    and its exclusions (adamw, amos, lamb, lion, sgd). Options: lr_multiplier, weight_decay, trust_ratio, clip_norm,
    clip_group, soft_clip, lazy, state_dtype; amos: scale, slot_shape."""

    def validate(self) -> None:
        """Check the numbers.

        Raises:
          ValueError: naming the field, its value and the rule.

        Example:
          >>> OptimConfig(beta1=2).validate()
          Traceback (most recent call last):
          ValueError: optim.beta1 must be in [0, 1), got 2.
        """
        for name, value in flat(self):
            may_be_inf = name == "clip_norm" and self.clip == "hard"  # it then only reads the norm
            if isinstance(value, float) and not math.isfinite(value) and not may_be_inf:
                raise ValueError(f"optim.{name} must be finite, got {value}.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"optim.clip_norm must be positive or None, got {self.clip_norm}.")
        if not self.learning_rate > 0:
            raise ValueError(f"optim.learning_rate must be positive, got {self.learning_rate}.")
        if not 0 < self.lookahead_step <= 1:
            raise ValueError(f"optim.lookahead_step must be in (0, 1], got {self.lookahead_step}.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} must be in [0, 1), got {getattr(self, name)}.")
        for name in ("final_learning_rate", "warmup_steps", "epsilon", "weight_decay", "extra_l2", "lookahead_period"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optim.{name} must not be negative, got {getattr(self, name)}.")

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a run of so many.

        Example:
          >>> OptimConfig(warmup_steps=100).warmup(40)
          20
        """
        return min(self.warmup_steps, steps // 2)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, what is written, and when."""

    steps: int = 1000
    """Number of updates. The schedule ends there, so another number is another run; a constant one past its warm-up goes on."""
    seed: int = 0
    """Seed of the initial parameters, of the order of the data and of dropout."""
    microbatches: int = 1
    """Parts in which a batch is computed (gradient accumulation); a divisor of data.batch-size."""
    run_dir: str | None = None
    """Folder of the run; None means runs/PRESET. The same command resumes what it finds there."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step is always saved. The two newest and the best evaluated are kept."""
    eval_every: int = 250
    """Steps between evaluations; the last step is always evaluated."""
    eval_batches: int | None = 20
    """Validation batches in an evaluation, evenly spaced over the validation set; None takes all of it."""
    eval_also: tuple[str, ...] = ()
    """Further evaluations of the final model, each "NAME=value, NAME=value" of data fields and of model settings of
    inference, such as "data.context=4096, data.batch-size=8" or "data.sampling-rate=2, model.rate=0.5"."""
    log_every: int = 10
    """Steps between rows of metrics.csv."""
    sample_tokens: int = 200
    """Tokens of text sampled at each evaluation; 0 samples nothing."""
    sample_prompt: str | None = None
    """Text that samples continue; None takes the beginning of the validation data."""
    sample_temperature: float = 0.8
    """Temperature of the samples; 0 is greedy."""
    profile_steps: str | None = None
    """START,STOP: write a profiler trace of these steps into the run folder."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: str | None = None
    """Weights & Biases project to log to; None logs nothing there."""
    compile_cache: str | None = "auto"
    """Folder of compiled programs; auto is JAX_COMPILATION_CACHE_DIR or the user's cache folder, None keeps none."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices and processes. A run may go on with another mesh."""

    data: int = -1
    """Groups of devices with rows of their own; -1 takes all devices that the other axes leave."""
    fsdp: int = 1
    """Groups with rows of their own that also share the parameters out."""
    tensor: int = 1
    """Devices that share the heads and features of a layer."""
    sequence: int = 1
    """Devices that share the time axis of a row."""
    cpu_devices: int | None = None
    """Devices that jax makes of a CPU, to try a mesh without accelerators; None leaves it as jax has it."""
    coordinator: str | None = None
    """host:port of process 0, where several processes train together (TPU pods need none of these three)."""
    num_processes: int | None = None
    """Number of processes that train together."""
    process_id: int | None = None
    """Number of this process, from 0."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run is made from."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """Shape and parts of the model."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """What is learned, and from which data."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def validate(self) -> None:
        """Check what can be checked before any data is read.

        Raises:
          ValueError: naming the field, its value and the rule.

        Example:
          >>> Config(train=TrainConfig(steps=0)).validate()
          Traceback (most recent call last):
          ValueError: train.steps must be positive, got 0.
        """
        self.data.validate()
        self.model.validate()
        if not self.model.mlp_ratio * self.model.width < 2**31:
            given = f"{self.model.mlp_ratio} and {self.model.width}"
            raise ValueError(f"model.mlp_ratio times model.width must be less than 2**31, got {given}.")
        for name in ("steps", "microbatches", "checkpoint_every", "eval_every", "log_every"):
            if getattr(self.train, name) < 1:
                raise ValueError(f"train.{name} must be positive, got {getattr(self.train, name)}.")
        if self.train.seed < 0 or self.train.seed >= 2**32:
            raise ValueError(f"train.seed must lie in 0 ... 2**32 - 1, got {self.train.seed}.")
        if self.data.batch_size % self.train.microbatches:
            given = f"{self.train.microbatches} and {self.data.batch_size}"
            raise ValueError(f"train.microbatches must divide data.batch_size, got {given}.")
        if 0 < self.model.random_positions < self.data.context:
            given = f"{self.model.random_positions} and {self.data.context}"
            raise ValueError(f"model.random_positions must be 0 or at least data.context, got {given}.")
        if self.mesh.cpu_devices is not None and self.mesh.cpu_devices < 1:
            raise ValueError(f"mesh.cpu_devices must be positive or None, got {self.mesh.cpu_devices}.")
        if self.train.run_dir == "":
            raise ValueError("train.run_dir must be a folder or None, got ''.")
        self._check_sampling()
        self.optim.validate()
        window = profile_window(self.train.profile_steps)
        if window and window[0] >= self.train.steps:
            raise ValueError(
                f"train.profile_steps must begin before step {self.train.steps}, got {self.train.profile_steps!r}."
            )
        for text in self.train.eval_also:
            try:
                changed(self, text).data.validate()
            except ValueError as error:
                raise ValueError(f"evaluation {text!r}: {error}") from error

    def _check_sampling(self) -> None:
        """What evaluations and samples on the way need, which would otherwise be found wrong at the first of them."""
        train = self.train
        if train.eval_batches is not None and train.eval_batches < 1:
            raise ValueError(f"train.eval_batches must be positive or None, got {train.eval_batches}.")
        if train.sample_tokens < 0:
            raise ValueError(f"train.sample_tokens must not be negative, got {train.sample_tokens}.")
        if not 0 <= train.sample_temperature < math.inf:
            raise ValueError(f"train.sample_temperature must lie in [0, inf), got {train.sample_temperature}.")
        if train.sample_prompt == "":
            raise ValueError("train.sample_prompt must hold some text or be None, got ''.")


FREE = (
    "train.run_dir",
    "train.checkpoint_every",
    "train.eval_every",
    "train.eval_batches",
    "train.eval_also",
    "train.log_every",
    "train.sample_",
    "train.profile_steps",
    "train.tensorboard",
    "train.wandb",
    "train.compile_cache",
    "mesh.",
    "data.path",
)
"""Fields (by prefix) that may change between two starts of a run, because they change no update. The text behind
`data.path` is compared by its contents instead, so it may be moved but not edited."""


def changed(config: Config, text: str) -> Config:
    """The config of an evaluation of the same parameters: other data, or other settings of the model at inference.

    Args:
      config: the run's.
      text: "NAME=value, NAME=value", the names dotted, data.FIELD or model.FIELD.

    Raises:
      ValueError: text that is not of this form, an unknown field, a value of another type, a model field that is fixed by training, or another
        share of the run's own data for validation.

    Example:
      >>> changed(Config(), "data.context=4096, model.rate=0.5").data.context
      4096
    """
    options = split_options(text)
    rooms = {"data": {}, "model": {}}
    for name, value in (options or {}).items():
        room, _, field = name.replace("-", "_").partition(".")
        known = {f.name for f in dataclasses.fields(DataConfig)} if room == "data" else None
        if room not in rooms or not field or (known and field not in known):
            raise ValueError(f"an evaluation must name data.FIELD or model.FIELD, got {name!r}.")
        rooms[room][field] = value
    if not options:
        raise ValueError(f'an evaluation must be a text "NAME=value, ...", each name once, got {text!r}.')
    data = dataclasses.replace(config.data, **read_fields(DataConfig, rooms["data"], "data."))
    if "validation_fraction" in rooms["data"] and "path" not in rooms["data"]:
        raise ValueError(
            "data.validation_fraction may change with data.path only: it says what the run was trained on."
        )
    model = at_inference(config, read_fields(ModelConfig, rooms["model"], "model."))
    return dataclasses.replace(config, data=data, model=model)


def at_inference(config: Config, settings: Mapping[str, Any]) -> ModelConfig:
    """The run's model with other settings of inference; `train_length` is the run's context unless something else is said.

    Example:
      >>> at_inference(Config(data=DataConfig(context=64)), {"log_scale": "inference"}).train_length
      64
    """
    if settings and config.model.train_length is None:
        settings = {"train_length": config.data.context, **settings}
    return config.model.at_inference(**settings)


def profile_window(text: str | None) -> tuple[int, int] | None:
    """START,STOP as two numbers of steps.

    Raises:
      ValueError: if it is not two increasing whole numbers.

    Example:
      >>> profile_window("10,20")
      (10, 20)
    """
    if text is None:
        return None
    try:
        start, stop = (int(part) for part in text.split(","))
    except ValueError:
        start, stop = 0, 0
    if not 0 <= start < stop:
        raise ValueError(f"train.profile_steps must be START,STOP with 0 <= START < STOP, got {text!r}.")
    return start, stop


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs (dotted name, value) of every field.

    Example:
      >>> dict(flat(Config()))["train.seed"]
      0
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flat(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def from_dict(values: Mapping[str, Any], kind: type = Config) -> Any:
    """The inverse of `dataclasses.asdict`; fields that are missing take their defaults.

    Raises:
      ValueError: for a name that is no field.

    Example:
      >>> from_dict(dataclasses.asdict(Config())) == Config()
      True
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}.")

    def field(hint: Any, value: Any) -> Any:
        if dataclasses.is_dataclass(hint):
            return from_dict(value, hint)
        return tuple(value) if typing.get_origin(hint) is tuple else value  # JSON knows lists only

    return kind(**{name: field(hints[name], value) for name, value in values.items()})


def differences(old: Config, new: Config) -> list[str]:
    """Lines `name: old -> new` for the fields that make the two different runs.

    With a constant schedule `train.steps` only says where to stop, and may change unless the warm-up, at most half of the run, changes with it.

    Example:
      >>> differences(Config(), Config(train=TrainConfig(seed=1, log_every=3)))
      ['train.seed: 0 -> 1']
    """
    constant = old.optim.schedule == new.optim.schedule == "constant"
    goes_on = constant and old.optim.warmup(old.train.steps) == new.optim.warmup(new.train.steps)
    free = FREE + (("train.steps",) if goes_on else ())
    pairs = zip(flat(old), flat(new))
    return [f"{name}: {a!r} -> {b!r}" for (name, a), (_, b) in pairs if a != b and not name.startswith(free)]
