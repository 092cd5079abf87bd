"""Which Python packages are installed."""

from __future__ import annotations

from importlib import metadata


def installed_version(package: str) -> str | None:
    """As its metadata says it; None if it is not installed. Nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
