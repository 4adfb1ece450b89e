"""A running daemon, from Python: one method for each thing that it can be asked. Needs no torch."""

from supsupd.client.calls import DaemonError, DaemonUnavailable
from supsupd.client.http import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "DaemonError", "DaemonUnavailable"]
