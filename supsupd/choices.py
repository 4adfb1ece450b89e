"""Words that a user chooses among, in the configuration and in a query. Nothing else is imported here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

Scenario = Literal["GG", "GNs", "GNu", "NNs"]
Method = Literal["exact", "one-shot", "binary", "recover"]
Objective = Literal["entropy", "g", "energy", "max-logit", "features"]

Role = Literal["predict", "submit", "admin"]
"""What a caller may do; each may do what those before it may."""

BatchState = Literal[
    "staged",
    "training",
    "unsure",
    "scored",
    "committed",
    "duplicate",
    "quarantined",
    "suspended",
    "retried",
    "dropped",
]

PAGE_ROWS = 1000
"""The most rows of a list that are told at once."""
METHODS: tuple[Method, ...] = get_args(Method)
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
ROLES: tuple[Role, ...] = get_args(Role)
BATCH_STATES: tuple[BatchState, ...] = get_args(BatchState)
OBJECTIVE_ALIASES: Mapping[str, Objective] = MappingProxyType({"H": "entropy", "G": "g"})
"""The paper's names."""
