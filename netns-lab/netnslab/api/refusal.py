"""A request that is refused: the Status object that a Kubernetes API server answers it with.

Source: k8s.io/apimachinery, pkg/api/errors.
"""

from __future__ import annotations

from typing import Any


class Refusal(Exception):  # noqa: N818 (it becomes an answer, not a fault of ours)
    """An answer that is no: HTTP's code, Kubernetes' reason for it, and words for a person."""

    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code, self.reason, self.details = code, reason, details

    def status(self) -> dict[str, Any]:
        """Return the Status object."""
        found = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": str(self)}
        return {**found, "reason": self.reason, "code": self.code, **({"details": self.details} if self.details else {})}


def not_found(plural: str, group: str, name: str) -> Refusal:
    """Return what kubectl prints as ``services "x" not found``."""
    resource = f"{plural}.{group}" if group else plural
    return Refusal(404, "NotFound", f'{resource} "{name}" not found', name=name, kind=plural, group=group)


def bad_request(message: str) -> Refusal:
    """Return that a request makes no sense."""
    return Refusal(400, "BadRequest", message)


def invalid(kind: str, group: str, name: str, field: str, reason: str) -> Refusal:
    """Return that a field holds what cannot stand."""
    cause = {"reason": "FieldValueInvalid", "message": reason, "field": field}
    words = f'{kind}{"." + group if group else ""} "{name}" is invalid: {field + ": " if field else ""}{reason}'
    return Refusal(422, "Invalid", words, name=name, group=group, kind=kind, causes=[cause])


def expired(version: int) -> Refusal:
    """Return that history does not go back that far: the client has to list again."""
    return Refusal(410, "Expired", f"too old resource version: {version}")
