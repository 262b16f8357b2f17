"""albor: an engine and a server for local code completion."""

__version__ = "0.1.0"
