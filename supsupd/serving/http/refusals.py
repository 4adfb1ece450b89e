"""What is answered to requests that never become any: in bytes, since no application sees them."""

import http
import json

RETRY_SECONDS = 1


class Refusal(Exception):
    """A request that is refused before it is one: the status, and the one line why."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


def plain_answer(status: int, text: str) -> bytes:
    """A whole answer, the last one on its connection; 503 says when to come again."""
    body = json.dumps({"error": text}, separators=(",", ":")).encode("ascii")
    lines = [
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        *([f"retry-after: {RETRY_SECONDS}"] if status == 503 else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body
