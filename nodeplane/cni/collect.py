"""GC: whatever is left of attachments that the runtime no longer knows is taken away.

    the runtime's list            left behind                                    found by
    cni.dev/valid-attachments --> records of pods whose DEL never came      -->  store.py
                                  links whose record is lost as well             their alias
                                  addresses, likewise                            host-local's files

A container that is listed keeps everything. Goes on after a failure and tells all of them at the end. Never runs beside an ADD or
DEL of the same network: the specification has the runtime see to that.
"""

from __future__ import annotations

from typing import Any

from kernelstate.linux.pod_link import open_links, owner_of
from nodeplane.cni import ipam, store
from nodeplane.cni.config import TYPE
from nodeplane.cni.delegate import pass_on
from nodeplane.cni.protocol import INVALID_CONFIG, IO_FAILURE, Attachment, CniError, Json
from nodeplane.cni.verbs import Environment, collecting, delete, made_with

VALID = "cni.dev/valid-attachments"


def collect(conf: Json, environment: Environment) -> None:
    """Remove all that belongs to none of the valid attachments. Raises CniError."""
    valid = valid_attachments(conf)
    failures: list[str] = []
    for container, ifname in store.kept(conf):
        if (container, ifname) not in valid:
            gone = Attachment(container, ifname, "", {})
            own = {**environment, "CNI_CONTAINERID": container, "CNI_IFNAME": ifname}
            with collecting(failures):
                delete(conf, gone, own)
    with collecting(failures):
        store.sweep(conf)
    with collecting(failures):
        delete_stray_links(conf["name"], valid)
    rendered = made_with(conf, Attachment("", "", "", {}))
    with collecting(failures):
        ipam.collect(rendered, valid, environment)
    if rendered["type"] != TYPE:
        with collecting(failures):
            pass_on("GC", {**rendered, VALID: conf.get(VALID) or []}, environment)
    if failures:
        raise CniError(IO_FAILURE, f"GC of {conf['name']}: {'; '.join(failures)}")


def valid_attachments(conf: Json) -> frozenset[tuple[str, str]]:
    """Read the runtime's list. Raises CniError where there is none: then nobody said that all may go."""
    if VALID not in conf:
        raise CniError(INVALID_CONFIG, f"{VALID}: must be a list of containerID and ifname, is missing")
    listed: Any = conf[VALID] or []
    try:
        return frozenset((str(one["containerID"]), str(one["ifname"])) for one in listed)
    except (KeyError, TypeError):
        raise CniError(INVALID_CONFIG, f"{VALID}: must be a list of containerID and ifname, is {listed!r}") from None


def delete_stray_links(network: str, valid: frozenset[tuple[str, str]]) -> None:
    """Delete links of ours that no valid attachment owns."""
    with open_links() as node:
        for one in node.links():
            owner = owner_of(one.alias, network)
            if owner is not None and owner not in valid:
                node.delete(one.name)
