"""Every state that credentials can be in, over one small file of tokens."""

import json

from supsupd.choices import ROLES
from supsupd.tokens import Tokens

UNKNOWN = "supsupd_0123456789ab_" + "A" * 43


REFUSED = ("none", "wrong", "wrong secret", "no bearer", "basic", "empty", "expired", "revoked", "two", "two in one")


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
            "empty": ["Bearer"],
            "expired": [self.expired("admin")],
            "revoked": [self.revoked("admin")],
            "two": [right, right],
            "two in one": [f"{right}, {right}"],
        }
        assert tuple(self.refused) == REFUSED

    @property
    def secrets(self):
        """The part of each token that no one else may see."""
        sent = [*self.granted.values(), *(value for values in self.refused.values() for value in values)]
        return {value.split(",")[0].split("_", 2)[-1] for value in sent if "_" in value}

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
