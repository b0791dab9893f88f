"""The API server of a lab as a process: its files, its sockets, its controllers.

    python -m netnslab.api.server LAB        run by `nodeplane lab up --api`; run it again should it have ended

    host's loopback      HTTPS, for people -------.
    router's namespace   HTTPS, for nodes --------+-- front --> registry --> store --> whoever watches
    api.sock             `nodeplane lab` ---------'                             |
                                                                        plane: controllers, pods, files

An earlier life's objects are in the lab's files, with their versions; history begins anew, so who watched before lists again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import platform
import random
import signal
import socket
import sys
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
from aiohttp import web

from kernelstate.linux import netns
from netnslab import names
from netnslab import state as states
from netnslab.api import discovery
from netnslab.api.access import PORT, Access
from netnslab.api.front import Front
from netnslab.api.kinds import BY_NAME, NODE
from netnslab.api.plane import Plane
from netnslab.api.registry import Registry
from netnslab.api.selectors import Raw
from netnslab.api.store import Store
from netnslab.state import GENERATION, LabState, write_file


def new_store() -> Store:
    """Return an empty store by this machine's clock."""
    return Store(stamp, lambda: str(uuid.uuid4()))


def stamp() -> str:
    """Return the time as objects have it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def node_info() -> Raw:
    """Return what a kubelet says of its machine: this one."""
    release, system = platform.release(), platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    versions = {"kubeletVersion": discovery.VERSION["gitVersion"], "containerRuntimeVersion": "netns://nodeplane"}
    return {
        **versions,
        "kernelVersion": release,
        "osImage": system,
        "operatingSystem": "linux",
        "architecture": platform.machine(),
    }


def _load(store: Store, state: LabState) -> None:
    """Take in the objects of the lab's files, and go on from the version they had reached."""
    reached = state.objects / GENERATION
    store.resume(int(reached.read_text() or 0) if reached.exists() else 0)
    for path in sorted(state.objects.glob("[!.]*.json")):
        raw = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        kind = BY_NAME[raw["kind"]]
        metadata = raw["metadata"]
        if kind.namespaced:
            metadata.setdefault("namespace", "default")
        is_new = "resourceVersion" not in metadata
        if kind is NODE:
            raw["status"] = {"nodeInfo": node_info(), **(raw.get("status") or {})}
        key = (metadata.get("namespace") or "", metadata["name"])
        store.load(kind, key, raw)
        if is_new:
            write_file(path, store.get(kind, key).encoded + b"\n")
    write_file(reached, f"{store.version}\n".encode())


async def serve(name: str, ready: Callable[[int], None]) -> None:
    """Serve a lab until told to stop; ``ready`` is told the port on the host's loopback."""
    state = states.load(name)
    store, access = new_store(), Access(state.root / "api")
    registry = Registry(store, state.topology, state.memory, stamp, random.Random())
    _load(store, state)
    plane = Plane(state.name, registry, state.objects, stamp)
    front = Front(registry, access.tokens(), state.root / "logs", plane.settled)
    plane.told = front.bookmark
    runner = web.AppRunner(front.application(), access_log=None, handle_signals=False)
    await runner.setup()
    here = _listener("127.0.0.1", state.api_port)
    there = netns.call(state.node_netns(names.ROUTER), _listener, "", PORT)
    for sock in (here, there):
        await web.SockSite(runner, sock, ssl_context=access.context(), shutdown_timeout=0.5).start()
    access.socket.unlink(missing_ok=True)
    await web.UnixSite(runner, str(access.socket), shutdown_timeout=0.5).start()
    ready(here.getsockname()[1])
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    controllers = asyncio.create_task(plane.run())
    await stop.wait()
    front.close()
    controllers.cancel()
    await runner.cleanup()


def _listener(address: str, port: int) -> socket.socket:
    """Return a listening socket of the calling thread's network namespace; without an address one for both families."""
    both = not address and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server((address, port), family=family, dualstack_ipv6=both, reuse_port=False, backlog=256)


def main() -> None:
    """Run one lab's server; says its port on stdout once it listens."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    asyncio.run(serve(sys.argv[1], lambda port: print(json.dumps({"port": port}), flush=True)))


if __name__ == "__main__":
    main()
