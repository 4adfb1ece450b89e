"""The configuration: command line over environment over TOML file over defaults."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from storage.failpoints import VARIABLE as FAILPOINTS
from supsupd.choices import Method
from supsupd.layers import ENV_PREFIX, ConfigError, Layer, describe, merge, name_setting, read_toml
from supsupd.paths import DATABASE_NAME, default_socket, default_state
from supsupd.sections import (
    AbsolutePath,
    BankSettings,
    ColumnSettings,
    DatabaseUrl,
    IntakeSettings,
    LearningSettings,
    NetworkSettings,
    RecognitionSettings,
    ReservoirSettings,
    ServerTlsSettings,
    ServingSettings,
    SocketPath,
    SourceSettings,
    TcpAddress,
    TracingSettings,
    WatchFolder,
    split_list,
)

SQLITE = "sqlite:///"
RESERVED_NAMES = ("socket", "stdin")
CLIENT_VARIABLES = ("URL", "TOKEN", "TOKEN_FILE", "CA", "CERTIFICATE")
NO_SETTINGS = (FAILPOINTS, "SUPSUPD_REQUIRE_SERVICES", *(ENV_PREFIX + name for name in CLIENT_VARIABLES))
"""Variables that are for tests, and for the client's command line."""


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

    watch: Annotated[list[WatchFolder], split_list(os.pathsep)] = []
    stdin: bool = False
    """Learn from batches on the standard input."""
    sources: list[SourceSettings] = []
    database: DatabaseUrl | None = None
    """Where everything learned is kept; None: a SQLite file in the state folder."""
    state: AbsolutePath = Field(default_factory=default_state)
    socket: SocketPath = Field(default_factory=default_socket)
    http: TcpAddress | None = None
    """HOST:PORT to serve HTTP on, beside the socket."""
    grpc: TcpAddress | None = None
    """HOST:PORT to serve gRPC on."""
    grpc_socket: SocketPath | None = None
    """A Unix socket to serve gRPC on."""
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
    columns: ColumnSettings = ColumnSettings()
    serving: ServingSettings = ServingSettings()
    tls: ServerTlsSettings = ServerTlsSettings()
    tracing: TracingSettings = TracingSettings()

    _layers: list[Layer] = PrivateAttr(default_factory=list)

    @property
    def store(self) -> Path | str:
        """The database: a file of SQLite's, or a URL."""
        return self.state / DATABASE_NAME if self.database is None else self.database

    def name(self, key: str) -> str:
        """A dotted key as an error names it: FILE:LINE: KEY, or what the variable or the option is called."""
        return name_setting(self._layers, tuple(key.split(".")))

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
    def _learn_from_something(self) -> Self:
        if not (self.watch or self.stdin or self.sources):
            raise PydanticCustomError(
                "nothing_to_learn_from",
                "Input should be at least one folder to watch, unless stdin or sources are set",
                {"key": "watch", "given": []},
            )
        names = [source.name for source in self.sources]
        if twice := next((name for name in names if names.count(name) > 1 or name in RESERVED_NAMES), None):
            text = "Input should be a name of its own for each source, none of socket and stdin"
            raise PydanticCustomError("source_name", text, {"key": "sources", "given": twice})
        return self

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
    def _listen_apart(self) -> Self:
        """Each door has a place of its own; port 0 is a free one each time."""
        for key, other in (("grpc", "http"), ("grpc_socket", "socket")):
            given = getattr(self, key)
            if given is not None and given == getattr(self, other) and not str(given).endswith(":0"):
                text = "Input should be another one than that of {other}"
                raise PydanticCustomError("same_place", text, {"key": key, "given": str(given), "other": other})
        return self

    @model_validator(mode="after")
    def _keep_apart(self) -> Self:
        """What the daemon writes must not come back to it as input, and no file may be seen twice."""
        watched = [folder.resolve() for folder in self.watch]
        for i, folder in enumerate(watched):
            _refuse_inside("watch", folder, watched[:i] + watched[i + 1 :])
        for key in ("state", "socket", "grpc_socket", "predictions"):
            if (path := getattr(self, key)) is not None:
                _refuse_inside(key, path.resolve(), watched)
        if self.database is not None and self.database.startswith(SQLITE):
            _refuse_inside("database", Path(self.database.removeprefix(SQLITE)).resolve(), watched)
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


def load_settings(flags: Mapping[str, Any] | None = None, file: Path | None = None) -> Settings:
    """The settings from `flags` (None: not given), SUPSUPD_* variables, the TOML `file` and the defaults, in
    this order. Opens nothing but `file`. Raises ConfigError."""
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    layers = [Layer("command line", given), _environment()]
    if file is not None:
        layers.append(read_toml(file))
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        merged = merge(merged, layer.values)
    try:
        settings = Settings(**merged)
    except ValidationError as error:
        raise ConfigError([describe(detail, layers, Settings) for detail in error.errors()]) from None
    settings._layers = layers
    return settings


def _environment() -> Layer:
    values = EnvSettingsSource(Settings)()
    for name, value in os.environ.items():
        key = name.removeprefix(ENV_PREFIX).lower()
        # The library passes over names that it does not know; a misspelt one must not pass.
        if name.startswith(ENV_PREFIX) and name not in NO_SETTINGS and key.split("__")[0] not in Settings.model_fields:
            values[key] = value
    return Layer("environment", values)
