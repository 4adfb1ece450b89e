"""Every state that credentials can be in, over one small file of tokens."""

import json

from supsupd.choices import ROLES
from supsupd.tokens import Tokens

UNKNOWN = "supsupd_0123456789ab_" + "A" * 43


class Credentials:
    """Made in the state folder `state`; `refused` and `granted` hold values of the header Authorization."""

    def __init__(self, state):
        self.tokens = Tokens(state)
        self.granted = {role: self.bearer(role) for role in ROLES}
        right = self.granted["admin"]
        self.refused = {
            "none": [],
            "wrong": [f"Bearer {UNKNOWN}"],
            "wrong secret": [right[:-1] + ("A" if right[-1] != "A" else "B")],
            "no bearer": [right.removeprefix("Bearer ")],
            "basic": [right.replace("Bearer", "Basic")],
            "empty": ["Bearer "],
            "expired": [self.expired("admin")],
            "revoked": [self.revoked("admin")],
            "two": [right, right],
            "two in one": [f"{right}, {right}"],
        }
        self.secrets = [
            value.rpartition("_")[2] for values in [*self.refused.values(), self.granted.values()] for value in values
        ]

    def bearer(self, role, **how):
        return f"Bearer {self.tokens.create(role, **how)[1]}"

    def expired(self, role):
        """A token whose time is over: the file says since when."""
        token, text = self.tokens.create(role, days=1)
        stored = json.loads(self.tokens.path.read_text())
        for row in stored["tokens"]:
            if row["id"] == token.id:
                row["expires"] = "2020-01-01T00:00:00Z"
        self.tokens.path.write_text(json.dumps(stored))
        return f"Bearer {text}"

    def revoked(self, role):
        token, text = self.tokens.create(role)
        self.tokens.revoke(token.id)
        return f"Bearer {text}"
