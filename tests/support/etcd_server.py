"""A real etcd in a network namespace: started, killed, emptied and asked with its own tool, with its data in memory."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import patience

from kernelstate.linux import netns
from nodeplane.config_overlay import EtcdOptions

SECONDS = 15.0
PREFIX = "/coreos.com/network"
T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str, seconds: float = SECONDS) -> T:
    """Ask again and again until there is an answer that counts as true, and return it."""
    return patience.eventually(condition, seconds, what)


class EtcdServer:
    """One etcd, on 127.0.0.1:2379 of a namespace; ``tls`` are further words of its command line."""

    def __init__(self, space: str, directory: Path, scheme: str = "http", tls: Sequence[str] = ()) -> None:
        self.space, self.directory, self.scheme, self.tls = space, directory, scheme, list(tls)
        self.url = f"{scheme}://127.0.0.1:2379"
        self.options = EtcdOptions(endpoints=(self.url,), prefix=PREFIX)
        self.ctl_words: list[str] = []
        """How etcdctl says who it is."""
        self._process: subprocess.Popen | None = None

    def start(self, port: int = 2379) -> None:
        """Start it on the data it has, and wait until it answers; on another port only those find it who know that."""
        assert self._process is None
        self.url = f"{self.scheme}://127.0.0.1:{port}"
        data = self.directory / "data"
        data.mkdir(mode=0o700, exist_ok=True)
        peer = "http://127.0.0.1:2380"
        with (self.directory / "log").open("ab") as log:
            self._process = netns.popen(
                self.space,
                [
                    *("etcd", "--name", "e", "--data-dir", str(data), "--logger", "zap", "--log-level", "warn"),
                    *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
                    *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"e={peer}"),
                    *("--heartbeat-interval", "20", "--election-timeout", "100", *self.tls),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for(self._is_ready, f"etcd: {(self.directory / 'log').read_text()[-2000:]}")

    @property
    def here(self) -> EtcdOptions:
        """How to reach it where it is now."""
        return msgspec.structs.replace(self.options, endpoints=(self.url,))

    def stop(self) -> None:
        """Kill it, as a failing machine does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(SECONDS)
            self._process = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let it hang for as long as the body runs."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def wipe(self) -> None:
        """Empty it; to be called while it is stopped."""
        shutil.rmtree(self.directory / "data")

    def ctl(self, *words: str, check: bool = True) -> str:
        """Run etcdctl against it and return what it prints."""
        argv = ["etcdctl", "--endpoints", self.url, "--command-timeout", "5s", *self.ctl_words, *words]
        return netns.run(self.space, argv, check=check)

    def put(self, name: str, value: str, lease: int = 0) -> None:
        """Write a key below the prefix."""
        self.ctl("put", f"{PREFIX}/{name}", value, *(["--lease", f"{lease:x}"] if lease else []))

    def revision(self) -> int:
        """Return its revision."""
        return int(json.loads(self.ctl("get", "x", "-w", "json"))["header"]["revision"])

    def entries(self) -> dict[str, str]:
        """Return everything below the prefix, names without it."""
        lines = self.ctl("get", "--prefix", f"{PREFIX}/").split("\n")[:-1]
        return {key.removeprefix(f"{PREFIX}/"): value for key, value in zip(lines[::2], lines[1::2], strict=True)}

    def lease_of(self, name: str) -> int:
        """Return the number of a key's lease."""
        (found,) = json.loads(self.ctl("get", f"{PREFIX}/{name}", "-w", "json"))["kvs"]
        return found.get("lease", 0)

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.directory / "log").read_text()[-2000:]
        with contextlib.suppress(Exception):
            self.ctl("endpoint", "health")
            return True
        return False


@contextmanager
def etcd_server(
    space: str, scheme: str = "http", tls: Sequence[str] = (), ctl_words: Sequence[str] = ()
) -> Iterator[EtcdServer]:
    """Start one; at the end it is gone with its data."""
    directory = Path(tempfile.mkdtemp(prefix="np-etcd-", dir="/dev/shm"))
    server = EtcdServer(space, directory, scheme, tls)
    server.ctl_words += ctl_words
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)
