"""Where objects come from: files that are named, or an API server.

    --objects P                     files and directories
    --kubeconfig F                  the server that a kubeconfig names
    --master URL, agent alone       that server, whatever the kubeconfig says, or without one and without credentials
    neither, agent alone            services.clientConnection.kubeconfig, else the service account of the pod the agent runs in

An agent keeps what a server said over a reboot (``kept_source.py``); files are kept by who writes them.

What an agent asks of a server follows from its configuration: no pods where no policy is enforced, no other nodes without an overlay. A
command that prints an answer asks for everything once, for it may be about any of it.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlencode

from clusterstate.snapshot import Update
from clusterstate.sources.files import FileSource
from clusterstate.sources.tree import SourceError
from nodeplane.commands import Failed, Usage
from nodeplane.config import NodeConfig
from nodeplane.kept_objects import Identity
from nodeplane.kept_source import KeptSource

if TYPE_CHECKING:
    from clusterstate.sources.kubeclient import KubeClient

PATIENCE = 10.0
"""Seconds after which an agent that waits for its first snapshot says so, again and again."""
ONE_SHOT = 30.0
"""Seconds that a command which prints an answer waits for a server."""

log = logging.getLogger("nodeplane")


class ClusterSource(Protocol):
    """What follows objects, wherever they are. Use from one thread."""

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when something happened."""

    def load(self) -> Update:
        """Return everything, once. Raises SourceError."""

    def poll(self) -> Update | None:
        """Return what happened since; None where nothing differs."""

    def close(self) -> None:
        """Stop following."""


def open_source(args: argparse.Namespace, config: NodeConfig) -> ClusterSource:
    """Return the source that the command line, or else the configuration, names. Raises Usage and SourceError."""
    if args.objects and args.kubeconfig:
        raise Usage("--objects and --kubeconfig exclude each other: objects come from files or from a server")
    if args.objects:
        return FileSource(args.objects)
    kubeconfig = args.kubeconfig or (Path(config.kubeconfig) if config.kubeconfig else None)
    master = getattr(args, "master", None) or ""
    if kubeconfig is None and not master and not os.environ.get("KUBERNETES_SERVICE_HOST"):
        raise Usage("no objects: give --objects or --kubeconfig, or clientConnection.kubeconfig in the configuration")
    server = _Server(kubeconfig, config, None, master)
    return KeptSource(server, Identity(config.node_name, server.name, server.resources))


def server_of(source: ClusterSource) -> KubeClient | None:
    """Return the API server that a source follows; None for files."""
    server = source.server if isinstance(source, KeptSource) else None
    return server.client if isinstance(server, _Server) else None


def read_once(args: argparse.Namespace, config: NodeConfig) -> Update:
    """Return the objects as they are now. Raises Usage, and Failed for a server that does not answer."""
    if not args.objects and not args.kubeconfig:
        raise Usage("no objects: give --objects or --kubeconfig")
    try:
        source = open_source(args, config) if args.objects else _Server(args.kubeconfig, config, ONE_SHOT)
    except SourceError as error:
        raise Usage(str(error)) from error
    try:
        return source.load()
    except SourceError as error:
        raise (Usage if args.objects else Failed)(str(error)) from error
    finally:
        source.close()


class _Server:
    """An API server as a source."""

    def __init__(self, kubeconfig: Path | None, config: NodeConfig, timeout: float | None, master: str = "") -> None:
        from clusterstate.sources.kubeapi import KubeSource, resources  # noqa: PLC0415  (only where there is a server)
        from clusterstate.sources.kubeclient import KubeClient  # noqa: PLC0415
        from clusterstate.sources.reflector import ApiError  # noqa: PLC0415

        self._error, self._timeout = ApiError, timeout
        overlay = config.overlay
        wanted = resources(
            config.node_name,
            services=config.services is not None,
            all_nodes=timeout is not None or (overlay is not None and overlay.etcd is None),
            policies=timeout is not None or bool(config.policy),
        )
        try:
            self.client = KubeClient(kubeconfig, server=master)
        except ApiError as error:
            raise SourceError(str(error)) from error
        self._source = KubeSource(self.client, wanted)
        self.fileno, self.poll, self.close, self.why = (
            self._source.fileno,
            self._source.poll,
            self._source.close,
            self._source.missing,
        )
        self.name = self.client.server
        self.resources = tuple(r.path + ("?" + urlencode(r.selectors) if r.selectors else "") for r in wanted)
        """What is asked for, as it is asked."""

    def wait(self, seconds: float) -> Update | None:
        """Return the first complete snapshot, None if it is not there in time."""
        found = self._source.first()
        if found is None and seconds:
            with contextlib.suppress(self._error):
                found = self._source.load(seconds)
        return found

    def load(self) -> Update:
        """Wait for the first complete snapshot; as long as it takes, unless there is a time-out. Raises SourceError."""
        while True:
            try:
                return self._source.load(self._timeout or PATIENCE)
            except self._error as error:
                if self._timeout is not None:
                    raise SourceError(f"{self.client.server}: {error}") from error
                log.warning("waiting for %s: %s", self.client.server, error)
