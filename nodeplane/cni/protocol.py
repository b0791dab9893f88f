"""What every CNI plugin says and hears: verbs, versions, error codes, and the attachment that a call is about.

    runtime --- environment: CNI_COMMAND, CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME, CNI_ARGS, CNI_PATH
            --- stdin: one JSON object, the network configuration
            <-- stdout: the result, or {"cniVersion", "code", "msg", "details"} and an exit status that is not 0

Decides what a call must bring. What the configuration means is for ``config.py``. Every module of this package is imported once for
each pod, so none imports more than it must: no dataclasses, no pathlib, no msgspec.

Source: the CNI specification 1.1.0 (SPEC.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

Json: TypeAlias = dict[str, Any]

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Oldest first; all that there are."""
UNSTATED = "0.1.0"
"""What a configuration without ``cniVersion`` means."""
SINCE = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}
"""Verbs that a configuration of an older version cannot ask for."""
VERBS = ("ADD", "DEL", "CHECK", "VERSION", "GC", "STATUS")

INCOMPATIBLE, UNKNOWN_CONTAINER, BAD_ENVIRONMENT, IO_FAILURE, UNDECODABLE, INVALID_CONFIG = 1, 3, 4, 5, 6, 7
INVALID_NETNS = 8
"""Of the reference library, not of the specification."""
TRY_LATER, NOT_AVAILABLE = 11, 50
KERNEL_REFUSED, NOT_AS_IT_WAS, INTERNAL = 100, 101, 999
"""Of our own: the kernel said no; CHECK found a difference; a bug."""

is_name = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*").fullmatch
_NEEDED = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"),
    "GC": ("CNI_PATH",),
    "STATUS": ("CNI_PATH",),
}


class CniError(Exception):
    """What a runtime is told: a code of the specification or of ours, one line, and details for whoever looks closer."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        self.code, self.message, self.details = code, message, details
        super().__init__(message)

    def to_json(self, version: str) -> Json:
        """Return the object that goes to stdout."""
        found: Json = {"cniVersion": version, "code": self.code, "msg": self.message}
        return {**found, "details": self.details} if self.details else found


class Attachment(NamedTuple):
    """One interface of one container, in its network namespace; ``netns`` is empty where the runtime no longer has it."""

    container: str
    ifname: str
    netns: str
    args: Mapping[str, str]
    """CNI_ARGS, as pairs."""

    @property
    def words(self) -> str:
        """Name it in an error."""
        return f"{self.ifname} of container {self.container}"


def verb_of(environment: Mapping[str, str]) -> str:
    """Read what is asked for. Raises CniError."""
    verb = environment["CNI_COMMAND"]
    if verb not in VERBS:
        raise CniError(BAD_ENVIRONMENT, f"CNI_COMMAND: must be one of {', '.join(VERBS)}, is {verb!r}")
    return verb


def check_verb(verb: str, version: str) -> None:
    """See that a configuration's version has the verb at all. Raises CniError."""
    if verb in SINCE and is_older(version, SINCE[verb]):
        raise CniError(INCOMPATIBLE, f"cniVersion: must be at least {SINCE[verb]} for {verb}, is {version!r}")


def attachment_of(verb: str, environment: Mapping[str, str]) -> Attachment:
    """Read which attachment a call is about. Raises CniError naming the variable and its value."""
    missing = [name for name in _NEEDED[verb] if not environment.get(name)]
    if missing:
        raise CniError(BAD_ENVIRONMENT, f"{verb} needs {', '.join(missing)}: not set")
    container, ifname = environment.get("CNI_CONTAINERID", ""), environment.get("CNI_IFNAME", "")
    if "CNI_CONTAINERID" in _NEEDED[verb]:
        if not is_name(container):
            raise CniError(BAD_ENVIRONMENT, f"CNI_CONTAINERID: must be letters, digits, '_', '.' and '-', is {container!r}")
        if len(ifname) > 15 or ifname in {".", ".."} or re.search(r"[/:\s]", ifname):
            raise CniError(BAD_ENVIRONMENT, f"CNI_IFNAME: must be a link's name of at most 15 characters, is {ifname!r}")
    return Attachment(container, ifname, environment.get("CNI_NETNS", ""), _args(environment.get("CNI_ARGS", "")))


def _args(text: str) -> dict[str, str]:
    pairs = [word for word in text.split(";") if word]
    if not all("=" in pair for pair in pairs):
        raise CniError(BAD_ENVIRONMENT, f"CNI_ARGS: must be like K=V;K2=V2, is {text!r}")
    return {key: value for pair in pairs for key, _, value in [pair.partition("=")]}


def version_of(conf: Json) -> str:
    """Return the version a configuration is written in. Raises CniError if it is none, or one that came after us."""
    version = conf.get("cniVersion") or UNSTATED
    if version not in VERSIONS:
        raise CniError(INCOMPATIBLE, f"cniVersion: must be one of {', '.join(VERSIONS)}, is {version!r}")
    return str(version)


def is_older(version: str, than: str) -> bool:
    """Compare two versions of ``VERSIONS``."""
    return VERSIONS.index(version) < VERSIONS.index(than)
