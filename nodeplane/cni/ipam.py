r"""A pod's addresses: asked of the plugin that ``ipam.type`` names, given back, and swept up where that plugin does not.

    /var/lib/cni/networks/<name>/10.244.1.5     host-local's: "CONTAINERID\r\nIFNAME", under flock(2) of <name>/lock

host-local learned GC only after plugins 1.1: so reservations that belong to no attachment are deleted here, under its own lock and
in its own format. Which pods there are is for the caller. Source: containernetworking/plugins, plugins/ipam/host-local.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Collection, Mapping
from ipaddress import ip_address

from nodeplane.cni.delegate import call_plugin, find_plugin, pass_on
from nodeplane.cni.protocol import INVALID_CONFIG, IO_FAILURE, NOT_AVAILABLE, CniError, Json

HOST_LOCAL = "host-local"
NETWORKS = "/var/lib/cni/networks"
ANY_RANGE = [[{"subnet": "192.0.2.0/24"}]]
"""host-local wants a range even to give back, where it does not look at it (TEST-NET-1, RFC 5737)."""


def ask(verb: str, conf: Json, environment: Mapping[str, str]) -> Json:
    """Have the address management of a rendered configuration do a verb of one attachment. Raises CniError."""
    if not conf["ipam"].get("type"):
        raise CniError(INVALID_CONFIG, "ipam.type: must be a plugin's name, is missing")
    return call_plugin(verb, {**conf, "type": conf["ipam"]["type"]}, environment)


def addresses(conf: Json, environment: Mapping[str, str]) -> Json:
    """Get a pod's addresses: a result with at least one. Raises CniError."""
    result = ask("ADD", conf, environment)
    if not result["ips"]:
        raise CniError(INVALID_CONFIG, f"plugin {conf['ipam']['type']}: gave no address")
    return result


def collect(conf: Json, valid: Collection[tuple[str, str]], environment: Mapping[str, str]) -> None:
    """Give back every address that belongs to none of the attachments in ``valid``. Raises CniError."""
    if conf["ipam"].get("type") == HOST_LOCAL:
        collect_host_local(os.path.join(conf["ipam"].get("dataDir") or NETWORKS, conf["name"]), valid)
    listed = [{"containerID": container, "ifname": ifname} for container, ifname in sorted(valid)]
    pass_on("GC", {**conf, "type": conf["ipam"]["type"], "cni.dev/valid-attachments": listed}, environment)


def collect_host_local(directory: str, valid: Collection[tuple[str, str]]) -> list[str]:
    """Delete reservations of others than ``valid``; return the addresses that are free again, sorted. Raises CniError."""
    if not os.path.isdir(directory):
        return []
    freed = []
    try:
        lock = os.open(os.path.join(directory, "lock"), os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name in sorted(os.listdir(directory)):
                if _is_address(name) and not _is_valid(os.path.join(directory, name), valid):
                    os.unlink(os.path.join(directory, name))
                    freed.append(name)
        finally:
            os.close(lock)
    except OSError as error:
        raise CniError(IO_FAILURE, f"{error.filename or directory}: {error.strerror}") from error
    return freed


def _is_address(name: str) -> bool:
    with contextlib.suppress(ValueError):
        ip_address(name.replace("_", ":"))  # some versions write IPv6 so
        return True
    return False


def _is_valid(path: str, valid: Collection[tuple[str, str]]) -> bool:
    """Whether a reservation is of an attachment in ``valid``; old versions wrote the container only."""
    with open(path, encoding="utf-8", errors="replace", newline="") as file:  # it is a carriage return that parts the two
        container, _, ifname = file.read().strip().partition("\r\n")
    return any(container == c and ifname.strip() in {"", i} for c, i in valid)


def check_ready(conf: Json, environment: Mapping[str, str]) -> None:
    """See that addresses could be had. Raises CniError with code 50."""
    kind = conf["ipam"].get("type", "")
    try:
        find_plugin(kind, environment["CNI_PATH"])
        pass_on("STATUS", {**conf, "type": kind}, environment)
    except CniError as error:
        raise CniError(NOT_AVAILABLE, error.message, error.details) from error
