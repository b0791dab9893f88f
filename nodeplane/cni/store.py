"""What is kept of each attachment until its DEL: the rendered configuration it was made with, one small file.

    /var/lib/cni/nodeplane/<network>/<containerID>:<ifname>      0600; written before the first thing is made
    /var/lib/cni/flannel/<containerID>                           flannel's own, read where a pod is older than this plugin

Neither a container nor an interface has a colon in its name. Files of different attachments have nothing to do with each other, so
there is no lock. Decides where and how; what is done with them is for ``main.py`` and ``collect.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

from nodeplane.cni.config import data_dir
from nodeplane.cni.protocol import IO_FAILURE, Attachment, CniError, Json

FLANNEL_DIR = "/var/lib/cni/flannel"


def keep(conf: Json, attachment: Attachment) -> None:
    """Write what an attachment is made with, so that it outlives a crash of the machine. Raises CniError."""
    directory = data_dir(conf)
    path = os.path.join(directory, _name(attachment))
    fresh = os.path.join(directory, f".{os.getpid()}")
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, json.dumps(conf, sort_keys=True).encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(fresh, path)
    except OSError as error:
        raise CniError(IO_FAILURE, f"write {path}: {error.strerror}") from error


def find(conf: Json, attachment: Attachment) -> Json | None:
    """Return what an attachment was made with, by us or by flannel's plugin; None where nothing is known. Raises CniError."""
    for path in (os.path.join(data_dir(conf), _name(attachment)), _of_flannel(attachment)):
        found = _read(path)
        if found is not None:
            return found
    return None


def forget(conf: Json, attachment: Attachment) -> None:
    """Delete what is kept of an attachment; gone already is success."""
    for path in (os.path.join(data_dir(conf), _name(attachment)), _of_flannel(attachment)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def kept(conf: Json) -> list[tuple[str, str]]:
    """Return container and interface of every attachment of this network that is known, sorted."""
    try:
        names = os.listdir(data_dir(conf))
    except FileNotFoundError:
        return []
    found = [tuple(name.split(":")) for name in names if ":" in name]
    return sorted((one[0], one[1]) for one in found if len(one) == 2)


def sweep(conf: Json) -> None:
    """Delete files that were left half written by calls that are no more."""
    directory = data_dir(conf)
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(directory):
            pid = name.removeprefix(".")
            if name != pid and pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(directory, name))


def _name(attachment: Attachment) -> str:
    return f"{attachment.container}:{attachment.ifname}"


def _of_flannel(attachment: Attachment) -> str:
    return os.path.join(FLANNEL_DIR, attachment.container)


def _read(path: str) -> Json | None:
    """Read a kept configuration; one that is damaged counts as none: whoever needs it does what can be done without."""
    try:
        with open(path, encoding="utf-8") as file:
            found: Any = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            raise CniError(IO_FAILURE, f"read {path}: {error.strerror}") from error
        return None
    return found if isinstance(found, dict) and isinstance(found.get("ipam"), dict) and found.get("type") else None
