"""The learning engine: network, supermasks, task inference and recognition."""
