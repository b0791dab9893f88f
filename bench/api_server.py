"""An API server with a made-up cluster, as fast as may be: every answer is encoded before anybody asks.

    python -m bench.api_server SERVICES NODES --> stdout: the port, once it can be asked
      stdin   endpoint I        Service I's slice gets one more endpoint, or loses it again
              storm N MS        N Services in turn, one such change each, spread over MS milliseconds
      stdout  TIME N            the monotonic clock when the last of N changes had been handed to the sockets

It answers what a node's source asks: the version, lists in pages, watches that begin with everything (KEP-3157), and fields of names.
It decides nothing, checks nothing and keeps no history: a watch follows what happens while it lasts.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from urllib.parse import SplitResult, parse_qs, urlsplit

import msgspec

from bench import cluster
from bench.cluster import Raw

SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
PATHS = {"Node": "/api/v1/nodes", "Service": "/api/v1/services", "EndpointSlice": SLICES}
VERSION = b'{"major":"1","minor":"34"}'
BATCH = 500
"""Events of a beginning that are written at a time."""
NOT_FOUND = b'{"kind":"Status","status":"Failure","reason":"NotFound","code":404,"message":"not served here"}'


class Server:
    """What is held, and who watches it."""

    def __init__(self, services: int, nodes: int) -> None:
        self.version = 1_000_000
        self.held: dict[str, dict[str, bytes]] = {path: {} for path in PATHS.values()}
        self.watching: dict[str, list[asyncio.StreamWriter]] = {path: [] for path in PATHS.values()}
        self.extra: set[int] = set()
        for one in _everything(services, nodes):
            self.held[PATHS[one["kind"]]][one["metadata"]["name"]] = msgspec.json.encode(one)

    # -- changes -------------------------------------------------------------------------------------------------------

    async def toggle(self, index: int) -> None:
        """Add an endpoint to a Service's slice or take it away, and tell whoever watches."""
        self.extra ^= {index}
        self.version += 1
        one = cluster.endpoint_slice(index, cluster.ENDPOINTS + (index in self.extra))
        one["metadata"]["resourceVersion"] = str(self.version)
        encoded = msgspec.json.encode(one)
        self.held[SLICES][one["metadata"]["name"]] = encoded
        line = b'{"type":"MODIFIED","object":' + encoded + b"}\n"
        for writer in self.watching[SLICES]:
            writer.write(_chunk(line))
            await writer.drain()

    async def obey(self, words: list[str]) -> None:
        """Do what a line of standard input asks for."""
        match words:
            case ["endpoint", index]:
                await self.toggle(int(index))
                done = 1
            case ["storm", count, milliseconds]:
                done, start = int(count), time.monotonic()
                for i in range(done):
                    await asyncio.sleep(max(0.0, start + i * int(milliseconds) / 1000 / done - time.monotonic()))
                    await self.toggle(i)
            case _:
                raise ValueError(f"no such order: {words}")
        print(time.monotonic(), done, flush=True)

    # -- answers -------------------------------------------------------------------------------------------------------

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection until it ends."""
        try:
            while line := await reader.readline():
                length = 0
                while header := (await reader.readline()).strip():
                    name, _, value = header.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                body = await reader.readexactly(length)
                method, url = line.split()[:2]
                if method == b"GET":
                    await self._answer(urlsplit(url.decode()), writer)
                else:
                    await _whole(writer, body)  # what the agent says of itself is taken, and changes nothing
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            for writers in self.watching.values():
                if writer in writers:
                    writers.remove(writer)
            writer.close()

    async def _answer(self, url: SplitResult, writer: asyncio.StreamWriter) -> None:
        path, asked = url.path, {key: values[0] for key, values in parse_qs(url.query).items()}
        if path not in self.held:
            known = path == "/version"
            await _whole(writer, VERSION if known else NOT_FOUND, b"200 OK" if known else b"404 Not Found")
        elif "watch" in asked:
            await self._watch(path, asked, writer)
        else:
            await self._list(path, asked, writer)

    def _selected(self, path: str, asked: dict[str, str]) -> list[bytes]:
        field, _, name = asked.get("fieldSelector", "").partition("=")
        held = self.held[path]
        return [held[name]] if field == "metadata.name" and name in held else list(held.values())

    async def _list(self, path: str, asked: dict[str, str], writer: asyncio.StreamWriter) -> None:
        found = self._selected(path, asked)
        start, limit = int(asked.get("continue", 0)), int(asked.get("limit", len(found) or 1))
        more = b',"continue":"%d"' % (start + limit) if start + limit < len(found) else b""
        head = b'{"kind":"List","metadata":{"resourceVersion":"%d"%b},"items":[' % (self.version, more)
        await _whole(writer, head + b",".join(found[start : start + limit]) + b"]}")

    async def _watch(self, path: str, asked: dict[str, str], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        if asked.get("sendInitialEvents") == "true":
            events = [b'{"type":"ADDED","object":' + one + b"}\n" for one in self._selected(path, asked)]
            events.append(
                b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"%d","annotations":'
                b'{"k8s.io/initial-events-end":"true"}}}}\n' % self.version
            )
            for i in range(0, len(events), BATCH):
                writer.write(_chunk(b"".join(events[i : i + BATCH])))
                await writer.drain()
        self.watching[path].append(writer)
        await writer.drain()


def _everything(services: int, nodes: int) -> Iterator[Raw]:
    yield from (cluster.node(number) for number in range(1, nodes + 1))
    for index in range(services):
        yield cluster.service(index)
        yield cluster.endpoint_slice(index)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def _whole(writer: asyncio.StreamWriter, body: bytes, status: bytes = b"200 OK") -> None:
    writer.write(b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body)
    await writer.drain()


async def _run(services: int, nodes: int) -> None:
    server = Server(services, nodes)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    print(listening.sockets[0].getsockname()[1], flush=True)
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await orders.readline():
        await server.obey(line.decode().split())


if __name__ == "__main__":
    asyncio.run(_run(int(sys.argv[1]), int(sys.argv[2])))
