"""Drop-in for other libraries: one file per library, none of which is imported before it is used."""

from .imports import install

__all__ = ["install"]
