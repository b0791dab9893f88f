"""``nodeplane-cni``: one call of a container runtime, from its environment and stdin to stdout and an exit status.

    ADD  DEL      verbs.py        a pod comes, a pod goes
    CHECK         check.py        is it as it was
    GC            collect.py      away with what nobody knows any more
    STATUS        readiness.py    would ADD go well now
    VERSION       here

Exit 0 and the result, or 1 and the error as JSON; both on stdout. Decides only which module answers, and what is made of exceptions.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from kernelstate.errors import KernelRefusedError
from nodeplane.cni.config import check_config
from nodeplane.cni.protocol import (
    INTERNAL,
    IO_FAILURE,
    UNDECODABLE,
    VERSIONS,
    CniError,
    Json,
    attachment_of,
    check_verb,
    verb_of,
    version_of,
)
from nodeplane.cni.result import print_result
from nodeplane.cni.verbs import add, delete, kernel_words

ABOUT = f"""nodeplane-cni: attaches pods to a node of nodeplane; executed by container runtimes, which set CNI_COMMAND.
CNI versions: {", ".join(VERSIONS)}"""


def main() -> int:
    """Answer one call; return the exit status."""
    if not os.environ.get("CNI_COMMAND"):
        print(ABOUT, file=sys.stderr)
        return 0
    status, answer = respond(os.environ, sys.stdin.buffer.read())
    if answer is not None:
        sys.stdout.write(json.dumps(answer, indent=4) + "\n")
    return status


def respond(environment: Mapping[str, str], data: bytes) -> tuple[int, Json | None]:
    """Return the exit status and the object for stdout, None for nothing."""
    version = VERSIONS[-1]
    try:
        verb = verb_of(environment)
        if verb == "VERSION":
            return 0, {"cniVersion": version, "supportedVersions": list(VERSIONS)}
        conf = _decode(data)
        version = version_of(conf)
        check_verb(verb, version)
        return 0, _do(verb, conf, environment)
    except CniError as error:
        return 1, error.to_json(version)
    except KernelRefusedError as error:
        return 1, kernel_words(error).to_json(version)
    except OSError as error:
        return 1, CniError(IO_FAILURE, f"{error.filename or 'system call'}: {error.strerror}").to_json(version)
    except Exception as error:  # a bug of ours; the runtime must have its JSON all the same
        import traceback  # noqa: PLC0415  never needed, one hopes

        words = f"{type(error).__name__}: {error}"
        return 1, CniError(INTERNAL, words, traceback.format_exc()).to_json(version)


def _decode(data: bytes) -> Json:
    try:
        conf: Any = json.loads(data)
    except ValueError as error:
        raise CniError(UNDECODABLE, f"stdin: must be a network configuration in JSON: {error}") from error
    if not isinstance(conf, dict):
        raise CniError(UNDECODABLE, f"stdin: must be a JSON object, is {conf!r:.80}")
    return conf


def _do(verb: str, conf: Json, environment: Mapping[str, str]) -> Json | None:
    attachment = attachment_of(verb, environment)
    check_config(conf)
    match verb:
        case "ADD":
            return print_result(add(conf, attachment, environment), version_of(conf))
        case "DEL":
            delete(conf, attachment, environment)
        case "CHECK":
            from nodeplane.cni.check import check  # noqa: PLC0415  the verbs that a new pod does not wait for

            check(conf, attachment, environment)
        case "GC":
            from nodeplane.cni.collect import collect  # noqa: PLC0415

            collect(conf, environment)
        case "STATUS":
            from nodeplane.cni.readiness import check_ready  # noqa: PLC0415

            check_ready(conf, environment)
    return None
