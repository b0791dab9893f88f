"""What a container runtime does with CNI plugins: a list of them is executed for each pod, in order, and in reverse when it goes.

    conflist  {"name", "cniVersion", "plugins": [A, B]}

    ADD       A --result--> B --result--> kept in the cache        (prevResult)
    CHECK     A, B           each with the cached result
    DEL       B, A           likewise; then the cache forgets
    GC        A, B           with the attachments that are in the cache
    STATUS    A, B

Each plugin gets its own object of the list with name and version of the network, and of what the runtime knows (``runtimeConfig``) only
what it says it can use (``capabilities``). As libcni does it. Works in the namespaces of the calling thread, where the node's plugins
run; which pods there are is the caller's business. Source: the CNI specification 1.1.0, section 3; containernetworking/cni, libcni.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PLUGIN_SECONDS = 60.0
Json = dict[str, Any]


class CniFailed(Exception):  # noqa: N818  what happened, as subprocess calls it
    """A plugin said no: its name, the verb, and its error object."""

    def __init__(self, plugin: str, verb: str, error: Json) -> None:
        self.plugin, self.verb, self.error = plugin, verb, error
        super().__init__(f"{verb} by {plugin}: {error.get('msg') or 'no word'} {error.get('details') or ''}".rstrip())

    @property
    def code(self) -> int:
        """The error's code; 0 where the plugin gave none."""
        return int(self.error.get("code") or 0)


class Pod(NamedTuple):
    """One attachment: container ID, the file of its network namespace, the interface, CNI_ARGS, and what the runtime knows."""

    container: str
    netns: str
    ifname: str = "eth0"
    args: str = ""
    runtime_config: Mapping[str, Any] = {}


class CniRuntime:
    """One network of a node: a conflist, where plugins are, and where results are kept."""

    def __init__(self, conflist: Json, cni_path: str, cache: Path) -> None:
        self.conflist, self.cni_path, self.cache = conflist, cni_path, cache

    # -- verbs -------------------------------------------------------------------------------------------------------

    def add(self, pod: Pod) -> Json:
        """Attach a pod and return the last plugin's result. Raises CniFailed; then a DEL is due, as after every ADD."""
        result: Json | None = None
        for plugin in self._plugins:
            result = self.execute("ADD", plugin, pod, result)
        assert result is not None
        self.cache.mkdir(parents=True, exist_ok=True)
        self._file(pod).write_text(json.dumps({"containerID": pod.container, "ifname": pod.ifname, "result": result}))
        return result

    def check(self, pod: Pod) -> None:
        """Have every plugin check a pod. Raises CniFailed."""
        for plugin in self._plugins:
            self.execute("CHECK", plugin, pod, self.result(pod))

    def delete(self, pod: Pod) -> None:
        """Take a pod away. Raises CniFailed at the first plugin that fails."""
        for plugin in reversed(self._plugins):
            self.execute("DEL", plugin, pod, self.result(pod))
        self._file(pod).unlink(missing_ok=True)

    def collect(self, valid: Sequence[tuple[str, str]] | None = None) -> None:
        """Run GC with the attachments in ``valid``; None: those in the cache. Raises CniFailed."""
        known = self.attachments() if valid is None else valid
        listed = [{"containerID": container, "ifname": ifname} for container, ifname in known]
        for plugin in self._plugins:
            self.execute("GC", {**plugin, "cni.dev/valid-attachments": listed}, None, None)

    def status(self) -> None:
        """Ask every plugin whether it is ready. Raises CniFailed."""
        for plugin in self._plugins:
            self.execute("STATUS", plugin, None, None)

    # -- what is known -----------------------------------------------------------------------------------------------

    def attachments(self) -> list[tuple[str, str]]:
        """Return container and interface of every pod in the cache, sorted."""
        found = [json.loads(file.read_text()) for file in self.cache.glob("*.json")] if self.cache.is_dir() else []
        return sorted((one["containerID"], one["ifname"]) for one in found)

    def result(self, pod: Pod) -> Json | None:
        """Return the result that is kept for a pod."""
        try:
            return dict(json.loads(self._file(pod).read_text())["result"])
        except FileNotFoundError:
            return None

    def _file(self, pod: Pod) -> Path:
        return self.cache / f"{self.conflist['name']}-{pod.container}-{pod.ifname}.json"

    # -- plugins -----------------------------------------------------------------------------------------------------

    @property
    def _plugins(self) -> list[Json]:
        return list(self.conflist["plugins"])

    def execute(self, verb: str, plugin: Json, pod: Pod | None, previous: Json | None) -> Json | None:
        """Execute one plugin; return what it printed, None for nothing. Raises CniFailed."""
        conf = {key: value for key, value in plugin.items() if key != "capabilities"}
        conf |= {"name": self.conflist["name"], "cniVersion": self.conflist["cniVersion"]}
        if previous is not None:
            conf["prevResult"] = previous
        environment = {"PATH": os.environ.get("PATH", os.defpath), "CNI_COMMAND": verb, "CNI_PATH": self.cni_path}
        if pod is not None:
            can = plugin.get("capabilities") or {}
            known = {key: value for key, value in pod.runtime_config.items() if can.get(key)}
            conf |= {"runtimeConfig": known} if known else {}
            environment |= {
                "CNI_CONTAINERID": pod.container,
                "CNI_NETNS": pod.netns,
                "CNI_IFNAME": pod.ifname,
                "CNI_ARGS": pod.args,
            }
        return self._run(verb, str(plugin["type"]), conf, environment)

    def _run(self, verb: str, name: str, conf: Json, environment: Mapping[str, str]) -> Json | None:
        found = next((p for d in self.cni_path.split(os.pathsep) if (p := Path(d) / name).is_file()), None)
        if found is None:
            raise CniFailed(name, verb, {"msg": f"is not in {self.cni_path}"})
        data = json.dumps(conf).encode()
        done = subprocess.run([found], input=data, env=environment, capture_output=True, timeout=PLUGIN_SECONDS, check=False)
        try:
            answer = json.loads(done.stdout) if done.stdout.strip() else None
        except ValueError:
            answer = {"msg": f"answered no JSON: {done.stdout[:200]!r}"}
            raise CniFailed(name, verb, answer) from None
        if done.returncode:
            words = done.stderr.decode(errors="replace").strip()
            raise CniFailed(name, verb, answer or {"msg": f"ended with {done.returncode}", "details": words[-300:]})
        return answer
