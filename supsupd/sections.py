"""The tables of the configuration: what may be set, within which bounds, and what it means."""

import os
import re
from ipaddress import IPv6Address
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic_core import PydanticCustomError

from supsupd.choices import OBJECTIVE_ALIASES, Method, Objective, Role, Scenario
from supsupd.paths import MAX_SOCKET_PATH

MIB = 1 << 20
FLOAT_BYTES = 4
_SECRET = re.compile("password|secret|token|key")
_PASSWORD = re.compile(r"(\w+://[^:@/\s]*):[^/\s]*@")
_PASSWORD_BEHIND = re.compile(r"([?&]\w*password=)[^&\s'\"]*")


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


def split_address(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or [IPV6]:PORT. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = str(IPv6Address(host[1:-1]))
    elif ":" in host:
        raise ValueError(text)
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ValueError(text)
    return host, int(port)


def _checked_address(text: str) -> str:
    try:
        split_address(text)
    except ValueError:
        raise PydanticCustomError("address", "Input should be HOST:PORT, such as 127.0.0.1:8000") from None
    return text


def split_list(separator: str) -> BeforeValidator:
    """In the environment a list is written as PATH is: values with a separator between them."""

    def split(value: Any) -> Any:
        return [part for part in value.split(separator) if part] if isinstance(value, str) else value

    return BeforeValidator(split)


def _objective(value: Any) -> Any:
    return OBJECTIVE_ALIASES.get(value, value) if isinstance(value, str) else value


def _with_database(value: Any) -> Any:
    if isinstance(value, str) and not value.startswith(("postgresql://", "sqlite:///")):
        raise PydanticCustomError("database_url", "Input should be a URL postgresql://… or sqlite:///…")
    return value


def hide_password(url: str) -> str:
    """The URL without its password, before the host or among the parameters."""
    return _PASSWORD_BEHIND.sub(r"\1***", _PASSWORD.sub(r"\1:***@", url))


def _hide_secrets(options: dict[str, str]) -> dict[str, str]:
    return {key: "***" if _SECRET.search(key) else value for key, value in options.items()}


SecretUrl = Annotated[str, Field(min_length=1), PlainSerializer(hide_password, when_used="json")]
Format = Literal["npz", "npy", "images", "tar", "parquet", "csv", "arrow", "jsonl", "json"]
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
DatabaseUrl = Annotated[SecretUrl, BeforeValidator(_with_database)]
AbsolutePath = Annotated[Path, BeforeValidator(_not_empty), AfterValidator(_absolute)]
WatchFolder = Annotated[AbsolutePath, AfterValidator(_existing_directory)]
TcpAddress = Annotated[str, AfterValidator(_checked_address)]
SocketPath = Annotated[AbsolutePath, AfterValidator(_short_enough)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """One table of the file: unknown keys are errors and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageTransforms(Section):
    """What is done to images, stored with the network: the first three to every row, flips and crops in training."""

    resize: Annotated[list[PositiveInt], split_list(","), Field(min_length=2, max_length=2)] | None = None
    """(height, width)."""
    mean: Annotated[list[float], split_list(",")] | None = None
    sd: Annotated[list[PositiveFloat], split_list(",")] | None = None
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
    input_shape: Annotated[list[PositiveInt], split_list(","), Field(max_length=3)] = []
    """Shape of one row, (d) or (H, W[, C]); empty: that of the first labelled batch."""
    hidden: Annotated[list[PositiveInt], split_list(",")] | None = None
    """Widths of the hidden linear layers. None: 300, 100 (mlp), 2048, 2048 (units), 256, 256 (conv networks)."""
    channels: Annotated[list[Annotated[int, Field(ge=0)]], split_list(",")] = []
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
    """Tasks whose scores and optimiser state are kept, as far as `memory_bytes` has room; older ones go on from their
    bits."""
    memory_bytes: PositiveInt = 144 * MIB
    """What is provisional may hold so much, rows counted as float32 and training states with them; so may the training
    states of tasks. A batch is learned from a quarter of it at most."""
    threads: PositiveInt = 1
    """CPU threads of training and scoring. Masks repeat bit for bit for the same number."""
    seed: Seed = 0

    def most_rows(self, values: int) -> int:
        """Of a batch whose rows have so many values each: as many as its steps can show, and as fit."""
        return max(1, min(self.max_steps * self.minibatch, self.memory_bytes // 4 // (FLOAT_BYTES * values)))


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
    """New tasks of one source or sender in any hour; what proves itself beyond them waits. 0: no limit."""
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
    """When a file counts as finished, what counts as the same batch, and how much may wait."""

    settle_seconds: PositiveFloat = 1.0
    incomplete_seconds: PositiveFloat = 5.0
    scan_seconds: PositiveFloat = 5.0
    marker: Literal["optional", "required"] = "optional"
    """required: a file is only taken once NAME.done or NAME.sha256 lies beside it."""
    watching: Literal["auto", "inotify", "polling"] = "auto"
    """auto: the system's hints, but on network file systems, where there are none for others' writes, only passes."""
    dedupe: Literal["content", "identity"] = "content"
    """content: equal bytes are one batch, wherever they come from; identity: only if they are the same delivery too."""
    key_hours: Annotated[float, Field(gt=0, le=87_600)] = 24.0
    """For so long an idempotency key is known; after that the same key is a new delivery."""
    max_batch_bytes: PositiveInt = 256 * MIB
    max_queue: PositiveInt = 256
    """Batches that may wait to be learned, of a source or sender as many as there is room for beside its own."""
    max_spool_bytes: PositiveInt = 4096 * MIB
    """Bytes of batches that may wait to be learned."""
    max_kept_bytes: PositiveInt = 1024 * MIB
    """Bytes that are kept of one source or sender's batches that were rejected, or wait for a first task; beyond,
    nothing more of it comes in until an operator retries or drops some."""
    min_free_bytes: Annotated[int, Field(ge=0)] = 256 * MIB
    """Nothing comes in while the disk of the state has less room than this, so that what came in can be learned."""
    decode_memory_bytes: PositiveInt = 2048 * MIB
    """Address space of a process that decodes batches; all that decode for sources may together take twice as much."""
    decode_processes: PositiveInt = 4
    """Processes that decode at the same time, each for another source; one more decodes what is learned."""
    decode_seconds: PositiveFloat = 30.0
    """The time in which a batch must be decoded."""

    @property
    def max_unpacked_bytes(self) -> int:
        """Of the arrays of one batch: what may be packed in `max_batch_bytes`."""
        return 2 * self.max_batch_bytes


class ColumnSettings(Section):
    """Which columns of a table (.parquet, .csv, Arrow) are what."""

    x: Annotated[list[str], split_list(",")] = []
    """The inputs, in this order, or one column of lists; empty: all that are nothing else."""
    y: str | None = None
    """The labels; None: the column `y` or `label`, if there is one."""
    task: str | None = None
    """The task; None: the column `task`, if there is one and the scenario wants it."""


class TlsSettings(Section):
    """PEM files. Without `ca` the system's authorities count; the other two are this client's own certificate."""

    ca: AbsolutePath | None = None
    certificate: AbsolutePath | None = None
    key: AbsolutePath | None = None


class NatsStream(Section):
    """A durable pull consumer of a NATS JetStream stream."""

    kind: Literal["nats"]
    name: SourceName
    url: SecretUrl = "nats://127.0.0.1:4222"
    stream: Annotated[str, Field(min_length=1)]
    subject: str | None = None
    """Only messages of this subject."""
    durable: Annotated[str, Field(min_length=1)] = "supsupd"
    credentials: AbsolutePath | None = None
    tls: TlsSettings | None = None
    format: Format | None = None
    """Of messages that do not say theirs; None: as their first bytes tell."""


class RedisStream(Section):
    """A consumer group of a Redis stream."""

    kind: Literal["redis"]
    name: SourceName
    url: SecretUrl = "redis://127.0.0.1:6379/0"
    key: Annotated[str, Field(min_length=1)]
    group: Annotated[str, Field(min_length=1)] = "supsupd"
    consumer: Annotated[str, Field(min_length=1)] = "supsupd"
    tls: TlsSettings | None = None
    format: Format | None = None


class KafkaTopic(Section):
    """All partitions of a Kafka topic; how far they are read is kept in the daemon's store."""

    kind: Literal["kafka"]
    name: SourceName
    servers: Annotated[str, Field(min_length=1)] = "127.0.0.1:9092"
    topic: Annotated[str, Field(min_length=1)]
    start: Literal["earliest", "latest"] = "earliest"
    """Where a partition is begun that was never read."""
    options: Annotated[dict[str, str], PlainSerializer(_hide_secrets, when_used="json")] = {}
    """Further settings of librdkafka, for security."""
    format: Format | None = None


SourceSettings = Annotated[NatsStream | RedisStream | KafkaTopic, Field(discriminator="kind")]


class ServingSettings(Section):
    """Who may ask, how much, and for how long."""

    # -- of one request
    max_body_bytes: PositiveInt = 64 * MIB
    """Of a request's body, and of what a compressed one unpacks to; over gRPC at most 16 MiB."""
    header_seconds: PositiveFloat = 5.0
    """The time in which a request's headers must have come, from its first byte or the connection's beginning."""
    body_seconds: PositiveFloat = 30.0
    """The time in which a whole request body must have come."""
    write_seconds: PositiveFloat = 30.0
    """How long a client may take nothing of what is written to it."""
    idle_seconds: PositiveFloat = 75.0
    """How long a connection is kept between two requests."""
    query_seconds: PositiveFloat = 30.0
    """How long a query may wait for its turn, unless it says less."""

    # -- of all together
    memory_bytes: PositiveInt = 384 * MIB
    """What requests and answers may hold, a quarter each: bodies of queries, what is made of them, answers, and bodies
    of batches."""
    max_connections: PositiveInt = 1024
    max_peer_connections: PositiveInt = 256
    """From one address, or one user of the Unix socket."""
    queue_requests: PositiveInt = 1024
    """Queries that may wait; more are refused with 429."""
    batch_rows: PositiveInt = 64
    """Rows of several queries that are answered in one pass; a larger query goes alone."""
    batch_window_ms: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """How long a query waits for others; 0: only while earlier ones are being answered."""
    parallel: PositiveInt = 2
    """Passes at the same time."""
    drain_seconds: Annotated[float, Field(ge=0, le=300)] = 0.0
    """How long a stopping daemon goes on answering, not ready any more, before it stops listening."""
    shutdown_seconds: PositiveFloat = 8.0
    """After that, how long what runs may take to end."""

    # -- access
    socket_group: str | None = None
    """A group whose members may use the Unix socket too; None: only its owner, and root."""
    socket_group_role: Role = "submit"
    tcp_role: Role = "admin"
    """The most that a token is good for over TCP."""
    hosts: Annotated[list[str], split_list(",")] = []
    """Host names that requests over TCP may name, beside localhost and the address listened on."""


class ServerTlsSettings(Section):
    """TLS on TCP; both HTTP and gRPC."""

    certificate: AbsolutePath | None = None
    """PEM, with the chain."""
    key: AbsolutePath | None = None
    client_ca: AbsolutePath | None = None
    """PEM; clients must have a certificate of one of these authorities (mutual TLS)."""


class TracingSettings(Section):
    """OpenTelemetry; off unless an endpoint is set."""

    endpoint: str | None = None
    """Of an OTLP collector over HTTP, such as http://127.0.0.1:4318."""
