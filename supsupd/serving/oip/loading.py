"""What a request to load a model wants."""

from collections.abc import Mapping
from typing import Any

from supsupd.serving.engine import ExtensionNotSupported
from supsupd.serving.oip.strict_json import ProtocolError, field, parse_object


def version_to_load(parameters: Mapping[str, Any]) -> int | None:
    """The version named by the parameter `version`, or by `config`, JSON of a ModelConfig whose `version_policy` is
    {"specific": {"versions": [V]}}; None where there is none. What else a config says is not looked at.

    Raises ProtocolError, and ExtensionNotSupported for models in files.
    """
    if any(name.startswith("file:") for name in parameters):
        raise ExtensionNotSupported("models are learned here; files are not loaded")
    if "version" in parameters:
        return _number(parameters["version"])
    config = field(parameters, "config", str, None)
    if config is None:
        return None
    policy = field(parse_object(config.encode()), "version_policy", dict, {})
    versions = field(field(policy, "specific", dict, {}), "versions", list, [])
    if len(versions) > 1:
        raise ProtocolError("bad_request: one version of a model can be served, not several")
    return _number(versions[0]) if versions else None


def _number(version: Any) -> int:
    """ModelConfig's JSON may write 64-bit numbers as text."""
    text = str(version) if type(version) in (int, str) else ""
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ProtocolError("bad_request: version must be a number of 1 to 18 digits")
    return int(text)
