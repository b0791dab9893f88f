"""An API server with a made-up cluster: the lab's own, over HTTP, without anybody behind it who would make pods of objects.

python -m bench.api_server SERVICES NODES --> stdout: the port, once it can be asked
stdin   endpoint I        Service I's slice gets one more endpoint, or loses it again
node              one more Node joins, with a subnet and a VTEP of its own, or leaves again
storm N MS        N Services in turn, one such change each, spread over MS milliseconds
stdout  TIME N            the monotonic clock when the last of N changes had been handed to those who watch
"""

from __future__ import annotations

import asyncio
import random
import sys
import time

from aiohttp import web

from bench import cluster
from netnslab.api.front import Front
from netnslab.api.kinds import BY_NAME, NODE, SLICE
from netnslab.api.registry import Registry
from netnslab.api.server import new_store, stamp
from netnslab.memory import Memory
from netnslab.topology import Topology

TOKEN = "bench"  # noqa: S105
"""What a client says who it is by; whoever reaches the server's loopback may know it."""


class Server:
    """The objects, and the changes to them that can be ordered."""

    def __init__(self, services: int, nodes: int) -> None:
        self.store = new_store()
        self.front = Front(Registry(self.store, Topology(), Memory(), stamp, random.Random()), {TOKEN: "admin"})
        self._grown: set[int] = set()
        self._nodes = nodes
        for one in cluster.everything(services, nodes):
            metadata = one["metadata"]
            self.store.load(BY_NAME[one["kind"]], (metadata.get("namespace", ""), metadata["name"]), one)

    def endpoint(self, index: int) -> None:
        """Add an endpoint to a Service's slice or take it away."""
        self._grown ^= {index}
        one = cluster.endpoint_slice(index, cluster.ENDPOINTS + (index in self._grown))
        self.store.replace(SLICE, (one["metadata"]["namespace"], one["metadata"]["name"]), one)
        self.front.bookmark(self.store.version)

    def node(self) -> None:
        """Add a Node or take it away."""
        one = cluster.node(self._nodes + 1)
        key = ("", one["metadata"]["name"])
        if self.store.find(NODE, key) is None:
            self.store.create(NODE, key, one)
        else:
            self.store.remove(NODE, key)
        self.front.bookmark(self.store.version)

    async def obey(self, words: list[str]) -> None:
        """Do what a line of standard input asks for."""
        done = 1
        match words:
            case ["endpoint", index]:
                self.endpoint(int(index))
            case ["node"]:
                self.node()
            case ["storm", count, milliseconds]:
                done, start = int(count), time.monotonic()
                for i in range(done):
                    await asyncio.sleep(max(0.0, start + i * int(milliseconds) / 1000 / done - time.monotonic()))
                    self.endpoint(i)
            case _:
                raise ValueError(f"no such order: {words}")
        await asyncio.sleep(0)  # those who write to sockets have their turn
        print(time.monotonic(), done, flush=True)


async def _run(services: int, nodes: int) -> None:
    server = Server(services, nodes)
    runner = web.AppRunner(server.front.application(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await orders.readline():
        await server.obey(line.decode().split())


if __name__ == "__main__":
    asyncio.run(_run(int(sys.argv[1]), int(sys.argv[2])))
