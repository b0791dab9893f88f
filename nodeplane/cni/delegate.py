"""Executing other plugins: address management, and whatever ``delegate.type`` names.

    CNI_PATH=/opt/cni/bin:/usr/lib/cni --> first that has TYPE --> its stdin: our configuration for it, its stdout: its answer

Input and output are files in memory, not pipes: neither side ever waits for the other, whatever the size. Decides which version is
spoken: plugins in use are years older than the newest configuration, so they are asked in 1.0.0, and in 0.4.0 when they refuse that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from nodeplane.cni.protocol import INCOMPATIBLE, INVALID_CONFIG, IO_FAILURE, UNDECODABLE, CniError, Json, is_older
from nodeplane.cni.result import parse_result, print_result

SPOKEN = ("1.0.0", "0.4.0")


def find_plugin(kind: str, cni_path: str) -> str:
    """Return the file of a plugin. Raises CniError naming where it was looked for."""
    for directory in cni_path.split(os.pathsep):
        path = os.path.join(directory, kind)
        if directory and os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    raise CniError(INVALID_CONFIG, f"plugin {kind!r} is not in CNI_PATH: {cni_path}")


def call_plugin(verb: str, conf: Json, environment: Mapping[str, str]) -> Json:
    """Have the plugin ``conf["type"]`` do ``verb``; return its answer, a result in the form of 1.1.0. Raises CniError.

    A ``prevResult`` in ``conf`` is of the form of 1.1.0 as well.
    """
    path = find_plugin(conf["type"], environment["CNI_PATH"])
    stated = conf.get("cniVersion") or SPOKEN[0]
    versions = [SPOKEN[0]] if is_older(SPOKEN[0], stated) else [stated]
    versions += [version for version in SPOKEN if is_older(version, versions[0])]
    for version in versions:
        try:
            answer = _execute(path, verb, _in_version(conf, version), environment)
        except CniError as error:
            if error.code != INCOMPATIBLE or version == versions[-1]:
                raise
        else:
            return parse_result(answer) if verb == "ADD" else answer
    raise AssertionError(versions)


def speaks(kind: str, version: str, environment: Mapping[str, str]) -> bool:
    """Whether a plugin says of itself that it knows a version. Raises CniError."""
    answer = _execute(find_plugin(kind, environment["CNI_PATH"]), "VERSION", {"cniVersion": "1.0.0"}, environment)
    return version in (answer.get("supportedVersions") or [])


def pass_on(verb: str, conf: Json, environment: Mapping[str, str]) -> None:
    """Have a plugin do GC or STATUS, if it knows them. Raises CniError."""
    if speaks(conf["type"], "1.1.0", environment):
        _execute(find_plugin(conf["type"], environment["CNI_PATH"]), verb, {**conf, "cniVersion": "1.1.0"}, environment)


def _in_version(conf: Json, version: str) -> Json:
    previous = conf.get("prevResult")
    return {**conf, "cniVersion": version, **({"prevResult": print_result(previous, version)} if previous else {})}


def _execute(path: str, verb: str, conf: Json, environment: Mapping[str, str]) -> Json:
    """Run a plugin to its end. What it writes to stderr goes where our own goes."""
    given, said = os.memfd_create("stdin", os.MFD_CLOEXEC), os.memfd_create("stdout", os.MFD_CLOEXEC)
    try:
        os.write(given, json.dumps(conf).encode())
        os.lseek(given, 0, os.SEEK_SET)
        actions = [(os.POSIX_SPAWN_DUP2, given, 0), (os.POSIX_SPAWN_DUP2, said, 1)]
        try:
            pid = os.posix_spawn(path, [path], {**environment, "CNI_COMMAND": verb}, file_actions=actions)
        except OSError as error:
            raise CniError(IO_FAILURE, f"execute {path}: {error.strerror}") from error
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        size = os.lseek(said, 0, os.SEEK_END)
        return _answer(path, verb, status, os.pread(said, size, 0))
    finally:
        os.close(given)
        os.close(said)


def _answer(path: str, verb: str, status: int, output: bytes) -> Json:
    name = os.path.basename(path)
    try:
        answer: Any = json.loads(output) if output.strip() else {}
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise CniError(UNDECODABLE, f"plugin {name}: {verb} answered no JSON object", output[:500].decode(errors="replace"))
    if status:
        code = answer.get("code")
        words = answer.get("msg") or f"ended with status {status}"
        raise CniError(
            code if isinstance(code, int) and code else IO_FAILURE, f"plugin {name}: {words}", answer.get("details") or ""
        )
    return answer
