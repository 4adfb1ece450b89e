"""supsupd: a daemon for continual learning without task labels."""

__version__ = "0.1.0"
