"""A pod waits here until its NetworkPolicies are in force: after it has its addresses, before a packet can reach it or leave it.

    nodeplane-cni                                            agent
      {"namespace", "name", "addresses"} + newline  ------>    policies of that pod, at these addresses --> kernel
      "in force" + newline                          <------

The agent's socket is there where an agent enforces policies, or did until it ended. Without a socket nobody does, and nobody waits.
Where there is one and nobody answers in time, the pod does not start: the runtime tries again, and is told why. Decides nothing about
policies; the other end is ``nodeplane/pod_gate.py``.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence

from nodeplane.cni.protocol import TRY_LATER, Attachment, CniError, Json

SOCKET = "/run/nodeplane/policy.sock"
WAIT = 10
"""Seconds."""
IN_FORCE = b"in force\n"
POLL = 0.05


def wait(conf: Json, attachment: Attachment, addresses: Sequence[str]) -> None:
    """Return once the policies of the pod that has these addresses are in force. Raises CniError 11 (try again later)."""
    path = conf.get("policySocket") or SOCKET
    pod = (attachment.args.get("K8S_POD_NAMESPACE", ""), attachment.args.get("K8S_POD_NAME", ""))
    if not all(pod) or not os.path.exists(path):
        return
    seconds = conf.get("policyWaitSeconds") or WAIT
    until = time.monotonic() + seconds
    question = json.dumps({"namespace": pod[0], "name": pod[1], "addresses": list(addresses)}).encode() + b"\n"
    words = "the agent has not answered"
    while True:
        try:
            if _ask(path, question, until) == IN_FORCE:
                return
        except TimeoutError:
            words = "the agent does not know the pod yet, or could not write its policies"
        except OSError as error:
            words = f"no agent answers at {path}: {error.strerror or error}"
        if time.monotonic() >= until:
            raise CniError(TRY_LATER, f"NetworkPolicies of pod {'/'.join(pod)} are not in force after {seconds} s: {words}")
        time.sleep(POLL)  # an agent that starts anew is there in a moment


def _ask(path: str, question: bytes, until: float) -> bytes:
    """Ask once; return the answer, empty if the agent ended meanwhile. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(max(0.01, until - time.monotonic()))
        client.connect(path)
        client.sendall(question)
        return client.recv(64)
