"""What a request's head must say, beyond what the parser asks of it."""

from __future__ import annotations

from collections.abc import Sequence

import httptools

from supsupd.serving.http.refusals import Refusal

Header = tuple[bytes, bytes]
"""A name, in small letters, and a value."""


def check_head(version: str, headers: Sequence[Header], is_upgrade: bool) -> dict[bytes, bytes]:
    """The headers by their names, of which those that frame a request are there once. Raises Refusal."""
    fields = dict(headers)
    if version not in ("1.1", "1.0"):
        raise Refusal(400, "bad_request: expected HTTP/1.1")
    hosts = [name for name, _ in headers].count(b"host")
    if hosts > 1 or (version == "1.1" and not hosts):
        raise Refusal(400, f"bad_request: expected one Host, got {hosts}")
    coding = fields.get(b"transfer-encoding")
    if coding is not None and (version == "1.0" or coding.lower() != b"chunked"):
        raise Refusal(400, "bad_request: expected no Transfer-Encoding but chunked, in HTTP/1.1")
    if fields.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise Refusal(417, "expectation_failed: expected no Expect but 100-continue")
    if is_upgrade and (coding is not None or fields.get(b"content-length", b"0") != b"0"):
        raise Refusal(400, "bad_request: expected no body with Upgrade")
    return fields


def split_target(url: bytes) -> tuple[bytes, bytes]:
    """The path and the query that are asked for. Raises Refusal."""
    try:
        target = httptools.parse_url(url)
    except httptools.HttpParserInvalidURLError:
        raise Refusal(400, "bad_request: expected a path") from None
    return target.path or b"/", target.query or b""
