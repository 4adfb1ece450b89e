"""The messages of Open Inference Protocol v2 over gRPC, with Triton's additions, as far as they are used here.

They are made at run time in a pool of their own: any other package may bring its own `inference.*` messages into the
same process, and no generated code is tied to a version of protobuf. What counts on the wire are the numbers.
"""

from __future__ import annotations

import re
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "supsupd.oip"

# One message for each paragraph: its name, then its fields as in a .proto file. `|` marks fields of which at most one
# is set.
MESSAGES = """
ServerLiveRequest

ServerLiveResponse
bool live = 1

ServerReadyRequest

ServerReadyResponse
bool ready = 1

ModelReadyRequest
string name = 1
string version = 2

ModelReadyResponse
bool ready = 1

ServerMetadataRequest

ServerMetadataResponse
string name = 1
string version = 2
repeated string extensions = 3

ModelMetadataRequest
string name = 1
string version = 2

TensorMetadata
string name = 1
string datatype = 2
repeated int64 shape = 3

ModelMetadataResponse
string name = 1
repeated string versions = 2
string platform = 3
repeated TensorMetadata inputs = 4
repeated TensorMetadata outputs = 5

InferParameter
| bool bool_param = 1
| int64 int64_param = 2
| string string_param = 3
| double double_param = 4
| uint64 uint64_param = 5

InferTensorContents
repeated bool bool_contents = 1
repeated int32 int_contents = 2
repeated int64 int64_contents = 3
repeated uint32 uint_contents = 4
repeated uint64 uint64_contents = 5
repeated float fp32_contents = 6
repeated double fp64_contents = 7
repeated bytes bytes_contents = 8

InferInputTensor
string name = 1
string datatype = 2
repeated int64 shape = 3
map InferParameter parameters = 4
InferTensorContents contents = 5

InferRequestedOutputTensor
string name = 1
map InferParameter parameters = 2

ModelInferRequest
string model_name = 1
string model_version = 2
string id = 3
map InferParameter parameters = 4
repeated InferInputTensor inputs = 5
repeated InferRequestedOutputTensor outputs = 6
repeated bytes raw_input_contents = 7

InferOutputTensor
string name = 1
string datatype = 2
repeated int64 shape = 3
map InferParameter parameters = 4

ModelInferResponse
string model_name = 1
string model_version = 2
string id = 3
map InferParameter parameters = 4
repeated InferOutputTensor outputs = 5
repeated bytes raw_output_contents = 6

ModelStreamInferResponse
string error_message = 1
ModelInferResponse infer_response = 2

ModelConfigRequest
string name = 1
string version = 2

ModelInput
string name = 1
DataType data_type = 2
repeated int64 dims = 4

ModelTensorReshape
repeated int64 shape = 1

ModelOutput
string name = 1
DataType data_type = 2
repeated int64 dims = 3
ModelTensorReshape reshape = 5

ModelDynamicBatching
repeated int32 preferred_batch_size = 1
uint64 max_queue_delay_microseconds = 2

SpecificVersions
repeated int64 versions = 1

ModelVersionPolicy
SpecificVersions specific = 3

ModelConfig
string name = 1
string platform = 2
ModelVersionPolicy version_policy = 3
int32 max_batch_size = 4
repeated ModelInput input = 5
repeated ModelOutput output = 6
ModelDynamicBatching dynamic_batching = 11
string backend = 17

ModelConfigResponse
ModelConfig config = 1

ModelStatisticsRequest
string name = 1
string version = 2

StatisticDuration
uint64 count = 1
uint64 ns = 2

InferStatistics
StatisticDuration success = 1
StatisticDuration fail = 2
StatisticDuration queue = 3
StatisticDuration compute_input = 4
StatisticDuration compute_infer = 5
StatisticDuration compute_output = 6
StatisticDuration cache_hit = 7
StatisticDuration cache_miss = 8

InferBatchStatistics
uint64 batch_size = 1
StatisticDuration compute_input = 2
StatisticDuration compute_infer = 3
StatisticDuration compute_output = 4

MemoryUsage
string type = 1
int64 id = 2
uint64 byte_size = 3

ModelStatistics
string name = 1
string version = 2
uint64 last_inference = 3
uint64 inference_count = 4
uint64 execution_count = 5
InferStatistics inference_stats = 6
repeated InferBatchStatistics batch_stats = 7
repeated MemoryUsage memory_usage = 8

ModelStatisticsResponse
repeated ModelStatistics model_stats = 1

ModelRepositoryParameter
| bool bool_param = 1
| int64 int64_param = 2
| string string_param = 3
| bytes bytes_param = 4

RepositoryIndexRequest
string repository_name = 1
bool ready = 2

ModelIndex
string name = 1
string version = 2
string state = 3
string reason = 4

RepositoryIndexResponse
repeated ModelIndex models = 1

RepositoryModelLoadRequest
string repository_name = 1
string model_name = 2
map ModelRepositoryParameter parameters = 3

RepositoryModelLoadResponse

RepositoryModelUnloadRequest
string repository_name = 1
string model_name = 2
map ModelRepositoryParameter parameters = 3

RepositoryModelUnloadResponse

LogSetting
| bool bool_param = 1
| uint32 uint32_param = 2
| string string_param = 3

LogSettingsRequest
map LogSetting settings = 1

LogSettingsResponse
map LogSetting settings = 1
"""

# In the order of their numbers, from 0.
DATA_TYPES = (
    *("TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64", "TYPE_INT8"),
    *("TYPE_INT16", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING", "TYPE_BF16"),
)

_FIELD = re.compile(r"(?:(\||repeated|map) )?(\w+) (\w+) = (\d+)")
_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {name.removeprefix("TYPE_").lower(): number for name, number in _Field.Type.items()}


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="supsupd/oip.proto", package=PACKAGE, syntax="proto3")
    types = file.enum_type.add(name="DataType")
    for number, name in enumerate(DATA_TYPES):
        types.value.add(name=name, number=number)
    for paragraph in MESSAGES.strip().split("\n\n"):
        name, *fields = paragraph.split("\n")
        message = file.message_type.add(name=name)
        for line in fields:
            _add_field(message, line)
    return file


def _add_field(message: descriptor_pb2.DescriptorProto, line: str) -> None:
    found = _FIELD.fullmatch(line)
    assert found, line
    how, kind, name, number = found.groups()
    if how == "map":  # on the wire: repeated pairs
        pair = message.nested_type.add(name=name.capitalize() + "Entry")
        pair.options.map_entry = True
        _add_field(pair, "string key = 1")
        _add_field(pair, f"{kind} value = 2")
        kind = f"{message.name}.{pair.name}"
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if how in ("map", "repeated"):
        field.label = _Field.LABEL_REPEATED
    if how == "|":
        if not message.oneof_decl:
            message.oneof_decl.add(name="choice")
        field.oneof_index = 0
    scalar = _SCALARS.get(kind)
    if scalar is not None:
        field.type = scalar
    else:
        field.type = _Field.TYPE_ENUM if kind == "DataType" else _Field.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{kind}"


def _classes() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    file = _file()
    pool.Add(file)
    return {
        message.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{message.name}"))
        for message in file.message_type
    }


MESSAGE: dict[str, Any] = _classes()
"""The class of each message, by its name."""
