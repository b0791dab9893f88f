"""What every section of a configuration file is read with: strict records, durations, CIDRs, and errors that name path and value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_network
from typing import TypeVar

import msgspec

from kernelstate.objects.address import Prefix


class ConfigError(Exception):
    """A configuration that cannot be used: which file, which path, which value."""


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Fields in camel case; one that is not there is an error."""


def prefix_at(text: str, at: str) -> Prefix:
    """Parse a CIDR; host bits are dropped."""
    try:
        return Prefix.of(ip_network(text, strict=False))
    except ValueError as error:
        raise ConfigError(f"{at}: must be a CIDR, is {text!r}") from error


_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def seconds_at(text: str | None, default: float, at: str) -> float:
    """Parse a Go duration such as ``1m30s``; absent and ``0s`` take kube-proxy's default, as its own defaulting does."""
    if text is None:
        return default
    parts = _DURATION.findall(text)
    if text != "0" and "".join(n + u for n, u in parts) != text:
        raise ConfigError(f"{at}: must be a duration such as 30s or 1m, is {text!r}")
    return sum(float(n) * _UNITS[u] for n, u in parts) or default


_T = TypeVar("_T", bound=msgspec.Struct)


def decode_section(raw: object, shape: type[_T], at: str) -> _T:
    """Check a section against its fields; msgspec's path becomes ours, and the value is named."""
    try:
        return msgspec.convert(raw, shape)
    except msgspec.ValidationError as error:
        text = str(error)
        reason, _, path = text.partition(" - at `$")
        path = path.rstrip("`").lstrip(".")
        unknown = re.search(r"unknown field `(.+?)`", reason)
        if unknown:
            path = f"{path}.{unknown[1]}" if path else unknown[1]
            reason = "unknown field"
        where = ".".join(part for part in (at, path) if part)
        raise ConfigError(f"{where}: {reason[:1].lower()}{reason[1:]}{_value(raw, path, bool(unknown))}") from error


def _value(raw: object, path: str, skip: bool) -> str:
    if skip:
        return ""
    for key in re.findall(r"[^.\[\]]+", path):
        if isinstance(raw, Mapping):
            raw = raw.get(key)
        elif isinstance(raw, list | tuple) and key.isdigit():
            raw = raw[int(key)]
    return f" (is {raw!r})"
