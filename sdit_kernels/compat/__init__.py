"""Drop-in for other libraries: one file per library, none of which is imported before it is used."""

from .imports import install, uninstall

__all__ = ["install", "uninstall"]
