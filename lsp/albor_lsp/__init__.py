"""albor's language server: turns editor events into suggestions from a completion server."""

__version__ = "0.1.0"
