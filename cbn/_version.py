"""The version, where pyproject.toml reads it."""

__version__ = "0.1.0"
