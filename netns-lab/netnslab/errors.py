"""What can go wrong in a lab: the caller's input, or the work itself."""

from __future__ import annotations


class LabError(Exception):
    """The work failed, or the answer is no: one line for a person, exit code 1."""


class LabInputError(Exception):
    """An input cannot be used: which file or object, which field, which value. Exit code 2, and nothing was changed."""
