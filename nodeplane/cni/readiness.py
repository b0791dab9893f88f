"""STATUS: whether an ADD would go well now. Code 50 says no, and why; pods that exist are never concerned.

    subnet.env           missing: the agent has not said the pod network yet
    agent.lock           held by nobody: new pods would get neither Services nor policies
    status.json          without a first round in sync: likewise, so far
    plugins              CNI_PATH lacks one that ADD needs, or it says itself that it is not ready

The agent's files are beside the socket at which it is asked (policySocket). Where there is no agent.lock at all, somebody
else wrote subnet.env (flanneld), and that is all there is to ask for.
"""

from __future__ import annotations

import json
import os
from typing import Any

from nodeplane.cni import gate, ipam
from nodeplane.cni.config import TYPE, render
from nodeplane.cni.delegate import find_plugin, pass_on
from nodeplane.cni.protocol import NOT_AVAILABLE, TRY_LATER, CniError, Json
from nodeplane.cni.verbs import Environment


def check_ready(conf: Json, environment: Environment) -> None:
    """See whether pods can be attached. Raises CniError with code 50."""
    try:
        rendered = render(conf)
    except CniError as error:
        if error.code == TRY_LATER:
            raise CniError(NOT_AVAILABLE, error.message) from error
        raise
    check_agent(os.path.dirname(rendered.get("policySocket") or gate.SOCKET))
    if rendered["type"] != TYPE:
        try:
            find_plugin(rendered["type"], environment["CNI_PATH"])
            pass_on("STATUS", rendered, environment)
        except CniError as error:
            raise CniError(NOT_AVAILABLE, error.message, error.details) from error
    ipam.check_ready(rendered, environment)


def check_agent(directory: str) -> None:
    """See that the node's agent runs, and has written everything at least once. Raises CniError with code 50."""
    try:
        lock = os.stat(os.path.join(directory, "agent.lock"))
    except FileNotFoundError:
        return
    if not _is_held(lock):
        raise CniError(NOT_AVAILABLE, f"no agent runs on this node: nobody holds {directory}/agent.lock")
    try:
        with open(os.path.join(directory, "status.json"), encoding="utf-8") as file:
            status: Any = json.load(file)
    except (FileNotFoundError, ValueError):
        status = {}
    if not status.get("last_sync"):
        raise CniError(NOT_AVAILABLE, "the agent has only started: it has not written rules and routes yet")


def _is_held(lock: os.stat_result) -> bool:
    """Whether somebody holds flock(2) on a file. Asked of /proc/locks: trying it would make an agent that starts just now fail."""
    mark = f"{os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino}"
    with open("/proc/locks", encoding="ascii") as file:
        return any(words[1] == "FLOCK" and words[5] == mark for words in (line.split() for line in file) if len(words) > 5)
