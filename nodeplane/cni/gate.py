"""A pod waits here until its NetworkPolicies are in force: after it has its addresses, before a packet can reach it or leave it.

    nodeplane-cni                                            agent
      {"namespace", "name", "container", "addresses"}  ------>  policies of that pod, at these addresses --> kernel
      what it waits for, as often as that changes      <------
      "in force"                                       <------
    at DEL, or when ADD fails: a container             ------>  what was told of it is withdrawn

Each is one line. The agent's socket is there where an agent enforces policies, or did until it ended. Without a socket nobody does, and nobody waits.
Where there is one and nobody answers in time, the pod does not start: the runtime tries again, and is told why. Decides nothing about
policies; the other end is ``nodeplane/pod_gate.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

from nodeplane.cni.protocol import TRY_LATER, Attachment, CniError, Json

SOCKET = "/run/nodeplane/policy.sock"
WAIT = 10
"""Seconds."""
GOODBYE = 1
"""Seconds in which an agent that is there can be connected to."""
IN_FORCE = "in force"
POLL = 0.05
LONGEST = 4096
"""Bytes of all that an agent says."""


def wait(conf: Json, attachment: Attachment, addresses: Sequence[str]) -> None:
    """Return once the policies of the pod that has these addresses are in force. Raises CniError 11 (try again later)."""
    path = conf.get("policySocket") or SOCKET
    pod = (attachment.args.get("K8S_POD_NAMESPACE", ""), attachment.args.get("K8S_POD_NAME", ""))
    if not all(pod) or not os.path.exists(path):
        return
    seconds = conf.get("policyWaitSeconds") or WAIT
    until = time.monotonic() + seconds
    question = _line(namespace=pod[0], name=pod[1], container=attachment.container, addresses=list(addresses))
    heard: list[str] = []
    while True:
        try:
            _ask(path, question, until, heard)
            if heard and heard[-1] == IN_FORCE:
                return
        except TimeoutError:
            heard = heard or ["the agent has said nothing"]
        except OSError as error:
            heard = [f"no agent answers at {path}: {error.strerror or error}"]
        if time.monotonic() >= until:
            why = heard[-1] if heard else "the agent ended"
            raise CniError(TRY_LATER, f"NetworkPolicies of pod {'/'.join(pod)} are not in force after {seconds} s: {why}")
        time.sleep(POLL)  # an agent that starts anew is there in a moment


def withdraw(conf: Json, attachment: Attachment) -> None:
    """Say that a pod has gone, to whoever listens: an agent that does not hear it forgets the addresses when they are given anew."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(GOODBYE)
        client.connect(conf.get("policySocket") or SOCKET)
        client.sendall(_line(container=attachment.container))


def _line(**known: Any) -> bytes:
    return json.dumps(known).encode() + b"\n"


def _ask(path: str, question: bytes, until: float, heard: list[str]) -> None:
    """Ask once, and note each line of the answer, until that is the one, the agent has ended, or an OSError comes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(max(0.01, until - time.monotonic()))
        client.connect(path)
        heard.clear()
        client.sendall(question)
        data = b""
        while len(data) < LONGEST and (piece := client.recv(LONGEST)):
            data += piece
            heard[:] = [line.decode(errors="replace") for line in data.split(b"\n")[:-1]]
            if heard and heard[-1] == IN_FORCE:
                return
            client.settimeout(max(0.01, until - time.monotonic()))
