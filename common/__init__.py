"""What coordinator and sites must agree on: configuration, messages, proxy, losses, privacy arithmetic."""

VERSION = "0.1.0"
"""As in `pyproject.toml`; containers are tagged with it."""
