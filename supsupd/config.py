"""The configuration: command line over environment over TOML file over defaults."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from supsupd.choices import OBJECTIVE_ALIASES, Method, Objective, Scenario
from supsupd.paths import DATABASE_NAME, MAX_SOCKET_PATH, default_socket, default_state

ENV_PREFIX = "SUPSUPD_"
MIB = 1 << 20


class ConfigError(Exception):
    """The configuration can't be used; `problems` holds one line for each thing that is wrong."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def _not_empty(value: Any) -> Any:
    if value == "":  # would mean the current folder
        raise PydanticCustomError("path_empty", "Input should be a path that is not empty")
    return value


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _existing_directory(path: Path) -> Path:
    if not path.is_dir():
        raise PydanticCustomError("watch_missing", "Input should be a folder that exists")
    return path


def _short_enough(path: Path) -> Path:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        limit = {"limit": MAX_SOCKET_PATH}
        raise PydanticCustomError("socket_path_long", "Input should be a path of at most {limit} bytes", limit)
    return path


def _split(separator: str) -> BeforeValidator:
    """In the environment a list is written as PATH is: values with a separator between them."""

    def split(value: Any) -> Any:
        return [part for part in value.split(separator) if part] if isinstance(value, str) else value

    return BeforeValidator(split)


def _objective(value: Any) -> Any:
    return OBJECTIVE_ALIASES.get(value, value) if isinstance(value, str) else value


AbsolutePath = Annotated[Path, BeforeValidator(_not_empty), AfterValidator(_absolute)]
WatchFolder = Annotated[AbsolutePath, AfterValidator(_existing_directory)]
SocketPath = Annotated[AbsolutePath, AfterValidator(_short_enough)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """One table of the file: unknown keys are errors and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageTransforms(Section):
    """What is done to images, stored with the network: the first three to every row, flips and crops in training."""

    resize: Annotated[list[PositiveInt], _split(","), Field(min_length=2, max_length=2)] | None = None
    """(height, width)."""
    mean: Annotated[list[float], _split(",")] | None = None
    sd: Annotated[list[PositiveFloat], _split(",")] | None = None
    """Per channel, of values scaled to 0..1 if they are whole numbers."""
    horizontal_flip: bool = False
    vertical_flip: bool = False
    crop: Annotated[int, Field(ge=0)] = 0
    """Random shifts by up to so many pixels."""

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.mean is None) != (self.sd is None) or len(self.mean or []) != len(self.sd or []):
            context = {"key": "network.transforms.sd", "given": self.sd}
            text = "Input should be as many values as network.transforms.mean"
            raise PydanticCustomError("mean_and_sd", text, context)
        return self


class NetworkSettings(Section):
    """The fixed random network. Only read when the state directory is new: it never changes afterwards."""

    kind: Annotated[str, Field(min_length=1)] = "mlp"
    """mlp, units, conv, conv2, conv4, conv6, resnet18-gem, or a classification model of torchvision by its name."""
    input_shape: Annotated[list[PositiveInt], _split(","), Field(max_length=3)] = []
    """Shape of one row, (d) or (H, W[, C]); empty: that of the first labelled batch."""
    hidden: Annotated[list[PositiveInt], _split(",")] | None = None
    """Widths of the hidden linear layers. None: 300, 100 (mlp), 2048, 2048 (units), 256, 256 (conv networks)."""
    channels: Annotated[list[Annotated[int, Field(ge=0)]], _split(",")] = []
    """Of each convolution of a conv network, 0 for a pooling; empty: its kind's own, conv4's for conv."""
    width: PositiveFloat = 1.0
    """Factor on the channels of the conv networks and of resnet18-gem."""
    norm: Literal["none", "group", "batch", "task", "fixed"] | None = None
    """Between convolutions. None: group. task: statistics of each task's own, stored with its masks."""
    pretrained: AbsolutePath | None = None
    """A safetensors file of weights that take the place of the random signs."""
    outputs: PositiveInt | None = None
    """None: the classes of the first batch x `headroom`."""
    headroom: PositiveInt = 10
    seed: Seed = 0
    normalisation: Literal["sample", "feature", "none"] = "sample"
    """sample: each row by itself; feature: each input by the first `feature_rows` rows, then frozen."""
    feature_rows: PositiveInt = 256
    transforms: ImageTransforms = ImageTransforms()


class LearningSettings(Section):
    """How one batch trains its task's mask."""

    rule: Literal["threshold", "edge-popup"] = "threshold"
    optimiser: Literal["rmsprop", "adam"] = "rmsprop"
    lr: PositiveFloat = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the step size over the steps of one batch; cosine ends at 0."""
    steps: PositiveInt = 20
    """Optimiser steps for a batch; a larger batch takes one pass over its rows, up to `max_steps`."""
    max_steps: PositiveInt = 500
    minibatch: PositiveInt = 128
    density: Fraction = 0.5
    """The fraction of weights kept, for the edge-popup rule."""
    density_budget: Literal["uniform", "erdos-renyi"] = "uniform"
    """The same density in each layer, or more where a layer has few weights for its width."""
    transfer: Literal["none", "mean", "best", "auto"] = "none"
    """Where a new task's scores start: at random, from the mean of all tasks, from the mask that does best on its
    first batch, or whichever of these does best on held-out rows after training."""
    foreign: Literal["none", "rotated", "shuffled"] = "none"
    """Superfluous outputs trained as "none of these": on images turned by quarters, or on rows with shuffled inputs."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    averaging: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """Decay of the running average of the scores, from which the mask is taken."""
    held_out: Fraction = 0.125
    """The fraction of a batch that is watched, not trained on."""
    active_tasks: PositiveInt = 32
    """Tasks whose scores and optimiser state are kept; older ones go on from their bits."""
    threads: PositiveInt = 1
    """CPU threads of training and scoring. Masks repeat bit for bit for the same number."""
    seed: Seed = 0


class RecognitionSettings(Section):
    """When a batch is known, new or unsure, and which task a query is of."""

    scenario: Scenario = "NNs"
    """Whether the task is given in training and in inference (GG), in training (GN) or never (NN), and whether tasks
    share their labels (s) or not (u). A state directory stays with given tasks, or without."""
    rule: Literal["calibrated", "paper"] = "calibrated"
    """calibrated: by labels, at stated error rates; paper: by the paper's k max nu, from inputs alone."""
    false_alarm: Fraction = 1e-3
    """The chance that a batch of a known task is taken for something else."""
    promote_error: Fraction = 1e-6
    """The chance that noise becomes a task."""
    memory_rows: PositiveInt = 256
    """Rows that a task's record of its own errors and evidence remembers: how fast it may drift."""
    max_provisional: PositiveInt = 8
    """Provisional tasks kept at once; the one longest untouched is given up for a new one."""
    patience_batches: PositiveInt = 64
    """Batches after which a provisional task that has proved nothing is given up."""
    max_new_per_hour: Annotated[int, Field(ge=0)] = 64
    """New tasks in any hour; what proves itself beyond them waits. 0: no limit."""
    paper_epsilon: PositiveFloat = 0.125
    """The paper's rule makes a new mask where k max nu is below 1 + this."""
    check_batches: PositiveInt = 100
    """The paper's rule looks at every so many batches, and trains the current mask in between."""
    inference: Method = "exact"
    """How a query's task is found, where the query says nothing else; so for the objective."""
    objective: Annotated[Objective, BeforeValidator(_objective)] = "entropy"
    shortlist_above: PositiveInt = 1024
    """With more tasks than these, a query is scored under `shortlist` masks: those of the most likely inputs."""
    shortlist: PositiveInt = 128
    batch_shortlist: Annotated[int, Field(ge=4)] = 16
    """Tasks that a labelled batch is compared with first: those used last, and those of the most likely inputs. What
    none of them explains is shown to all."""
    features: bool = False
    """Keep statistics of each task's inputs, in features of the whole network, for objective features."""

    @property
    def tasks_given(self) -> bool:
        """Whether a labelled batch says which task it belongs to."""
        return self.scenario != "NNs"

    @property
    def labels_shared(self) -> bool:
        """Whether a task may answer with labels that it has never seen."""
        return self.scenario in ("GNs", "NNs")

    @property
    def task_rule(self) -> Literal["ignored", "labelled", "all"]:
        """Which batches have to say their task, in the words of `streams.tasks`."""
        if not self.tasks_given:
            return "ignored"
        return "all" if self.scenario == "GG" else "labelled"


class BankSettings(Section):
    """How much memory the masks may take."""

    memory_bytes: PositiveInt = 2048 * MIB
    """Packed masks in memory; those used longest ago are read from the store when they are wanted."""
    ready_bytes: PositiveInt = 128 * MIB
    """Weights under the masks used last, ready to run."""


class ReservoirSettings(Section):
    """The Hopfield reservoir, which keeps finished masks of hidden units as attractors (the paper's HopSupSup)."""

    enabled: bool = False
    """Needs network.kind units. The mask of a task is finished when another task gets a batch of the stream."""
    descent: Literal["projected", "paper"] = "projected"
    """projected: the slope of the evidence goes through the matrices and has the strength of the energy's; paper: the
    slope of the entropy as it is."""
    steps: PositiveInt = 30
    lr: PositiveFloat = 500.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    gamma: PositiveFloat = 1.5e-3
    """What the energy weighs at the last step."""
    warn_load: Fraction = 0.8
    """The share of the capacity, 0.138 masks for each unit of the narrowest layer, from which on the log warns."""


class IntakeSettings(Section):
    """When a file counts as finished, and how much may wait."""

    settle_seconds: PositiveFloat = 1.0
    incomplete_seconds: PositiveFloat = 5.0
    scan_seconds: PositiveFloat = 5.0
    max_batch_bytes: PositiveInt = 256 * MIB
    max_queue: PositiveInt = 256

    @property
    def max_unpacked_bytes(self) -> int:
        """Of the arrays of one batch: what may be packed in `max_batch_bytes`."""
        return 2 * self.max_batch_bytes


class ServingSettings(Section):
    """The limits of the socket."""

    max_body_bytes: PositiveInt = 64 * MIB
    body_seconds: PositiveFloat = 30.0
    """The time in which a whole request body must have come."""
    shutdown_seconds: PositiveFloat = 8.0


class Settings(BaseSettings):
    """Everything that the daemon can be told; made by `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
        enable_decoding=False,  # lists are split below, not JSON
        extra="forbid",
        frozen=True,
        validate_default=True,
    )

    watch: Annotated[list[WatchFolder], _split(os.pathsep), Field(min_length=1)] = []
    state: AbsolutePath = Field(default_factory=default_state)
    socket: SocketPath = Field(default_factory=default_socket)
    predictions: AbsolutePath | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_format: Literal["auto", "console", "json"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    network: NetworkSettings = NetworkSettings()
    learning: LearningSettings = LearningSettings()
    recognition: RecognitionSettings = RecognitionSettings()
    bank: BankSettings = BankSettings()
    reservoir: ReservoirSettings = ReservoirSettings()
    intake: IntakeSettings = IntakeSettings()
    serving: ServingSettings = ServingSettings()

    @property
    def database(self) -> Path:
        return self.state / DATABASE_NAME

    @property
    def inference(self) -> Method:
        """How a query's task is found: as set; else by recovering its mask where there is a reservoir."""
        unset = "inference" not in self.recognition.model_fields_set
        return "recover" if self.reservoir.enabled and unset else self.recognition.inference

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # load_settings merges the layers itself: an error must name the layer that it comes from.
        return (init_settings,)

    @model_validator(mode="after")
    def _keep_superfluous(self) -> Self:
        """Objective g looks at outputs that stand for no class."""
        if self.recognition.objective == "g" and self.network.outputs == 1:
            raise PydanticCustomError(
                "no_superfluous",
                "Input should be 2 or more: recognition.objective g needs an output beyond the classes",
                {"key": "network.outputs", "given": 1},
            )
        return self

    @model_validator(mode="after")
    def _keep_features(self) -> Self:
        """Objective features needs what only recognition.features keeps."""
        if self.recognition.objective == "features" and not self.recognition.features:
            text = "Input should be true: recognition.objective features needs it"
            context = {"key": "recognition.features", "given": False}
            raise PydanticCustomError("no_features", text, context)
        return self

    @model_validator(mode="after")
    def _mask_units(self) -> Self:
        """The reservoir holds a bit for each unit: its matrices are quadratic in the mask's length."""
        if self.reservoir.enabled and self.network.kind != "units":
            raise PydanticCustomError(
                "not_units",
                "Input should be 'units', since reservoir.enabled is true",
                {"key": "network.kind", "given": self.network.kind},
            )
        if self.recognition.inference == "recover" and not self.reservoir.enabled:
            raise PydanticCustomError(
                "no_reservoir",
                "Input should be 'exact', 'one-shot' or 'binary', since reservoir.enabled is false",
                {"key": "recognition.inference", "given": "recover"},
            )
        return self

    @model_validator(mode="after")
    def _keep_apart(self) -> Self:
        """What the daemon writes must not come back to it as input, and no file may be seen twice."""
        watched = [folder.resolve() for folder in self.watch]
        for i, folder in enumerate(watched):
            _refuse_inside("watch", folder, watched[:i] + watched[i + 1 :])
        for key in ("state", "socket", "predictions"):
            if (path := getattr(self, key)) is not None:
                _refuse_inside(key, path.resolve(), watched)
        return self


def _refuse_inside(key: str, path: Path, folders: list[Path]) -> None:
    for folder in folders:
        if path.is_relative_to(folder):
            # `key` travels in the context: a model validator has no location of its own.
            raise PydanticCustomError(
                "inside_watch",
                "Input should be a path outside the watched folder {folder}",
                {"folder": str(folder), "key": key, "given": str(path)},
            )


class _Layer:
    """One place that settings come from, with the name that it gives to each key."""

    def __init__(self, origin: str, values: Mapping[str, Any]) -> None:
        self.origin = origin
        self.values = values

    def holds(self, loc: tuple[str, ...]) -> bool:
        node: Any = self.values
        for part in loc:
            if not isinstance(node, Mapping):
                return True  # a scalar where a table is wanted: the value that failed is here
            if part not in node:
                return False
            node = node[part]
        return True

    def name(self, loc: tuple[str, ...]) -> str:
        if self.origin == "environment":
            return ENV_PREFIX + "__".join(part.upper() for part in loc)
        return "--" + "-".join(loc) if self.origin == "command line" else ".".join(loc)


def load_settings(flags: Mapping[str, Any] | None = None, file: Path | None = None) -> Settings:
    """The settings from `flags` (None: not given), SUPSUPD_* variables, the TOML `file` and the defaults, in
    this order. Opens nothing but `file`. Raises ConfigError."""
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    layers = [_Layer("command line", given), _environment()]
    if file is not None:
        layers.append(_Layer(str(file), _read_toml(file)))
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        merged = _merge(merged, layer.values)
    try:
        return Settings(**merged)
    except ValidationError as error:
        raise ConfigError([_describe(detail, layers) for detail in error.errors()]) from None


def _environment() -> _Layer:
    values = EnvSettingsSource(Settings)()
    for name, value in os.environ.items():
        key = name.removeprefix(ENV_PREFIX).lower()
        # The library passes over names that it does not know; a misspelt one must not pass.
        if name.startswith(ENV_PREFIX) and key.split("__")[0] not in Settings.model_fields:
            values[key] = value
    return _Layer("environment", values)


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_bytes().decode())
    except OSError as error:
        raise ConfigError([f"{file}: {error.strerror}; expected a TOML file that can be read"]) from None
    except ValueError as error:  # bad TOML or not UTF-8
        raise ConfigError([f"{file}: {error}; expected TOML in UTF-8"]) from None


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _describe(detail: ErrorDetails, layers: list[_Layer]) -> str:
    """One line: where, which key, what was given, what was expected."""
    context = detail.get("ctx", {})
    loc = tuple(part for part in detail["loc"] if isinstance(part, str)) or tuple(context["key"].split("."))
    given = context.get("given", detail["input"])
    layer = next((layer for layer in layers if layer.holds(loc)), _Layer("defaults", {}))
    shown = repr(str(given) if isinstance(given, Path) else given)
    return f"{layer.origin}: {layer.name(loc)}: given {shown}; expected {_expected(detail, loc)}"


def _expected(detail: ErrorDetails, loc: tuple[str, ...]) -> str:
    if detail["type"] == "extra_forbidden":
        section: Any = Settings
        for part in loc[:-1]:
            section = section.model_fields[part].annotation
        return "one of the keys " + ", ".join(sorted(section.model_fields))
    if loc == ("watch",) and detail["type"] == "too_short":
        return "at least one folder to watch"
    if detail["type"] == "model_type":
        return "a table of settings"
    return detail["msg"].removeprefix("Input should be ").removeprefix("Input should ")
