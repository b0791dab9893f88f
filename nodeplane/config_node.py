"""Fields of KubeProxyConfiguration that are about the node and the agent itself: servers, connection tracking, logs, the OOM killer.

Decides their defaults and what they may be. Who acts on them: ``node_servers.py``, ``conntrack_settings.py``, ``logs.py``.
Source: k8s.io/kube-proxy/config/v1alpha1, pkg/proxy/apis/config/validation.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Any, Literal, NamedTuple

import msgspec

from nodeplane.config_fields import ConfigError, Strict, decode_section, seconds_at

HEALTHZ_PORT, METRICS_PORT = 10256, 10249
LogFormat = Literal["text", "json"]


class Bind(NamedTuple):
    """Where a server listens; port 0: nowhere."""

    address: str
    port: int

    def __str__(self) -> str:
        """Print as it is configured."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


class ServerOptions(msgspec.Struct, frozen=True):
    """Where the node tells how it is."""

    healthz: Bind = Bind("0.0.0.0", HEALTHZ_PORT)
    metrics: Bind = Bind("127.0.0.1", METRICS_PORT)
    hard_fail: bool = False
    """Whether a port that is taken ends the agent."""


class ConntrackOptions(msgspec.Struct, frozen=True):
    """The kernel's connection tracking. None: not stated."""

    max_per_core: int | None = None
    least: int | None = None
    tcp_established: float | None = None
    """Seconds, as all that follow."""
    tcp_close_wait: float | None = None
    udp: float | None = None
    udp_stream: float | None = None
    tcp_be_liberal: bool = False


class LogOptions(msgspec.Struct, frozen=True):
    """How the agent logs."""

    format: LogFormat = "text"
    verbosity: int = 0
    """From 4 on everything is logged, as with kube-proxy's ``-v``."""


class _LoggingFields(Strict, frozen=True):
    format: LogFormat = "text"
    verbosity: int = 0
    flush_frequency: Any = None
    options: Any = None
    vmodule: Any = None


def read_servers(section: Any, at: str) -> ServerOptions:
    """Return where servers listen; ``bindAddress`` says of which family the defaults are. Raises ConfigError."""
    stated = section.bind_address or "0.0.0.0"
    try:
        family = ip_address(stated).version
    except ValueError as error:
        raise ConfigError(f"{at}bindAddress: must be an address, is {stated!r}") from error
    everywhere, here = ("0.0.0.0", "127.0.0.1") if family == 4 else ("::", "::1")
    return ServerOptions(
        healthz=_bind(section.healthz_bind_address, Bind(everywhere, HEALTHZ_PORT), f"{at}healthzBindAddress"),
        metrics=_bind(section.metrics_bind_address, Bind(here, METRICS_PORT), f"{at}metricsBindAddress"),
        hard_fail=bool(section.bind_address_hard_fail),
    )


def _bind(stated: str | None, default: Bind, at: str) -> Bind:
    """Read an address with or without a port."""
    if not stated:
        return default
    match = re.fullmatch(r"\[(?P<v6>[^\]]+)\](?::(?P<port6>\d+))?|(?P<v4>[^:]*)(?::(?P<port4>\d+))?|(?P<bare>.+)", stated)
    found = match.groupdict() if match else {}
    address = found.get("v6") or found.get("v4") or found.get("bare") or default.address
    text = found.get("port6") or found.get("port4")
    port = default.port if text is None else int(text)
    try:
        ip_address(address)
    except ValueError as error:
        raise ConfigError(f"{at}: must be like {default}, is {stated!r}") from error
    if port > 65535:
        raise ConfigError(f"{at}: the port must be between 0 and 65535, is {port}")
    return Bind(address, port)


def read_conntrack(section: Any, at: str) -> ConntrackOptions:
    """Check the section ``conntrack``. Raises ConfigError."""
    for field, value in (("maxPerCore", section.max_per_core), ("min", section.min)):
        if value is not None and value < 0:
            raise ConfigError(f"{at}conntrack.{field}: must not be negative, is {value}")

    def seconds(text: str | None, field: str) -> float | None:
        return None if text is None else seconds_at(text, 0.0, f"{at}conntrack.{field}")

    return ConntrackOptions(
        max_per_core=section.max_per_core,
        least=section.min,
        tcp_established=seconds(section.tcp_established_timeout, "tcpEstablishedTimeout"),
        tcp_close_wait=seconds(section.tcp_close_wait_timeout, "tcpCloseWaitTimeout"),
        udp=seconds(section.udp_timeout, "udpTimeout"),
        udp_stream=seconds(section.udp_stream_timeout, "udpStreamTimeout"),
        tcp_be_liberal=section.tcp_be_liberal,
    )


def read_logging(raw: object, at: str) -> LogOptions:
    """Check the section ``logging``. Raises ConfigError."""
    stated = decode_section(raw or {}, _LoggingFields, f"{at}logging")
    if stated.verbosity < 0:
        raise ConfigError(f"{at}logging.verbosity: must not be negative, is {stated.verbosity}")
    return LogOptions(stated.format, stated.verbosity)


def read_oom_score(value: int | None, at: str) -> int | None:
    """Check ``oomScoreAdj``; None: it stays as it is. Raises ConfigError."""
    if value is not None and not -1000 <= value <= 1000:
        raise ConfigError(f"{at}oomScoreAdj: must be between -1000 and 1000, is {value}")
    return value
