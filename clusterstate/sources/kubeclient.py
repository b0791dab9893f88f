"""How an API server is reached: a kubeconfig or a pod's service account, through the official client's configuration and urllib3.

Decides nothing about objects. Credentials are read again when the server refuses them, and every ``CREDENTIALS`` seconds, so that
tokens and client certificates that are renewed on disk, or by a plugin, are taken up; requests that are under way keep theirs.

Source: kubernetes.client.Configuration, kubernetes.config.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import msgspec

from clusterstate.sources.reflector import NO_PARAMETERS, ApiError

CONNECT, READ, SILENCE = 10.0, 60.0, 150.0
"""Seconds to connect, for the next piece of an answer, and in which a watch says nothing: servers send a bookmark each minute."""
CREDENTIALS = 300.0
IN_CLUSTER = None
SUCCESS = frozenset({HTTPStatus.OK, HTTPStatus.CREATED})
CONTENT_TYPES = {"PATCH": "application/strategic-merge-patch+json", "POST": "application/json"}
LONGEST_LINE = 32 << 20
"""Bytes of one event; etcd takes objects of 1.5 MB."""


class _Status(msgspec.Struct, gc=False):
    message: str = ""


class KubeClient:
    """One API server; implements ``reflector.Api``. Safe for several threads."""

    def __init__(self, kubeconfig: Path | None, *, server: str = "", agent: str = "nodeplane") -> None:
        """``kubeconfig`` None: the service account of the pod this runs in; ``server``: the address instead of theirs.

        Raises ApiError where nothing says how.
        """
        self._kubeconfig, self._server, self._agent = kubeconfig, server, agent
        self._lock = threading.Lock()
        self._pool: Any = None
        self._configuration: Any = None
        self._until = 0.0
        self._connect()

    @property
    def server(self) -> str:
        """The server's address."""
        return str(self._configuration.host)

    def get(self, path: str, parameters: Mapping[str, str] = NO_PARAMETERS) -> bytes:
        """Return the whole answer. Raises ApiError."""
        return self._whole("GET", path, parameters)

    def patch(self, path: str, body: bytes) -> bytes:
        """Apply a strategic merge patch in JSON; return the object as it is then. Raises ApiError."""
        return self._whole("PATCH", path, body=body)

    def post(self, path: str, body: bytes) -> bytes:
        """Create an object in JSON; return it as it is then. Raises ApiError."""
        return self._whole("POST", path, body=body)

    def _whole(self, method: str, path: str, parameters: Mapping[str, str] = NO_PARAMETERS, body: bytes | None = None) -> bytes:
        import urllib3  # noqa: PLC0415

        answer = self._ask(path, parameters, READ, method, body)
        try:
            return bytes(answer.read())
        except urllib3.exceptions.HTTPError as error:
            raise ApiError(0, f"the answer broke off: {error}") from error
        finally:
            answer.release_conn()

    def lines(self, path: str, parameters: Mapping[str, str]) -> Iterator[bytes]:
        """Yield the lines of an answer as they come; the rest of one that breaks off is dropped. Raises ApiError."""
        import urllib3  # noqa: PLC0415

        answer = self._ask(path, parameters, SILENCE)
        rest = b""
        try:
            for piece in answer.stream(None, decode_content=False):
                *whole, rest = (rest + piece).split(b"\n")
                yield from filter(None, whole)
                if len(rest) > LONGEST_LINE:
                    raise ApiError(0, f"a line of more than {LONGEST_LINE} bytes")
        except urllib3.exceptions.HTTPError as error:
            raise ApiError(0, f"the watch broke off: {error}") from error
        finally:
            answer.close()

    def _ask(
        self, path: str, parameters: Mapping[str, str], silence: float, method: str = "GET", body: bytes | None = None
    ) -> Any:
        """Send a request; return the answer once its head is there. Raises ApiError for anything but success."""
        answer = self._send(path, parameters, silence, method, body)
        if answer.status == HTTPStatus.UNAUTHORIZED:
            answer.close()
            self._until = 0.0
            answer = self._send(path, parameters, silence, method, body)
        if answer.status in SUCCESS:
            return answer
        try:
            words = _words(answer.read(1 << 16), answer.reason)
        finally:
            answer.close()
        raise ApiError(answer.status, words)

    def _send(self, path: str, parameters: Mapping[str, str], silence: float, method: str, body: bytes | None) -> Any:
        import urllib3  # noqa: PLC0415

        pool, configuration = self._connect()
        headers = {"Accept": "application/json", "User-Agent": self._agent}
        if body is not None:
            headers["Content-Type"] = CONTENT_TYPES[method]
        for setting in configuration.auth_settings().values():
            if setting["value"]:
                headers[setting["key"]] = setting["value"]
        if configuration.username:
            headers["authorization"] = configuration.get_basic_auth_token()
        url = f"{configuration.host}{path}" + (f"?{urlencode(parameters)}" if parameters else "")
        timeout = urllib3.Timeout(connect=CONNECT, read=silence)
        try:
            return pool.request(method, url, body=body, headers=headers, preload_content=False, retries=False, timeout=timeout)
        except urllib3.exceptions.HTTPError as error:
            raise ApiError(0, f"{configuration.host}: {error}") from error

    def _connect(self) -> tuple[Any, Any]:
        """Return what requests are sent through, made anew when credentials have to be read again. Raises ApiError."""
        with self._lock:
            if time.monotonic() >= self._until:
                try:
                    self._configuration = _configuration(self._kubeconfig, self._server)
                    self._pool = _pool(self._configuration)
                except ApiError:
                    if self._pool is None:
                        raise  # later the old ones may still do
                self._until = time.monotonic() + CREDENTIALS
            return self._pool, self._configuration


def _configuration(kubeconfig: Path | None, server: str) -> Any:
    """Read addresses and credentials. Raises ApiError."""
    import yaml  # noqa: PLC0415
    from kubernetes import config  # noqa: PLC0415  half a second, and only where there is an API server
    from kubernetes.client import Configuration  # noqa: PLC0415

    found = Configuration()
    try:
        if kubeconfig is IN_CLUSTER and server and not os.environ.get("KUBERNETES_SERVICE_HOST"):
            pass  # nobody says who we are, so we are nobody
        elif kubeconfig is IN_CLUSTER:
            config.load_incluster_config(client_configuration=found)  # type: ignore[no-untyped-call]
        else:
            config.load_kube_config(str(kubeconfig), client_configuration=found, persist_config=False)  # type: ignore[no-untyped-call]
    except (config.ConfigException, OSError, yaml.YAMLError, TypeError, AttributeError) as error:
        raise ApiError(0, f"{kubeconfig or 'in-cluster configuration'}: {' '.join(str(error).split())}") from error
    found.host = server.rstrip("/") or found.host
    return found


def _pool(configuration: Any) -> Any:
    from kubernetes.client.rest import RESTClientObject  # noqa: PLC0415

    configuration.connection_pool_maxsize = 16  # every watch holds a connection
    try:
        return RESTClientObject(configuration).pool_manager
    except (OSError, ValueError) as error:  # a certificate that is none
        raise ApiError(0, f"{configuration.host}: {error}") from error


def _words(body: bytes, reason: str) -> str:
    """Return what a server says is wrong."""
    try:
        return msgspec.json.decode(body, type=_Status).message or reason
    except msgspec.DecodeError:
        return reason
