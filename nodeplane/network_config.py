"""The cluster's network where etcd says it: found once before the agent is put together.

    file states Network  -->  that
    else                 -->  etcd's <prefix>/config, asked for a few seconds  -->  the last one seen  -->  not known yet

What is not known yet leaves the overlay as it is; the agent goes on with Services, and starts anew once etcd has said it
(``lease_keeper.py`` keeps asking). Every part of an agent can so rely on one network for as long as it runs.
"""

from __future__ import annotations

import logging
import queue
import threading
from pathlib import Path

import msgspec

from nodeplane.config import NodeConfig
from nodeplane.config_overlay import EtcdOptions, OverlayOptions
from nodeplane.etcd_client import EtcdClient, EtcdError
from nodeplane.lease_store import STATE_FILE, load
from overlay.netconf import NetConf, NetConfError
from overlay.registry.etcd import CONFIG, parse_config

log = logging.getLogger("nodeplane.leases")

PATIENCE = 3.0
"""Seconds that the start waits for etcd."""


def with_network(config: NodeConfig, path: Path = STATE_FILE, patience: float = PATIENCE) -> NodeConfig:
    """Return the configuration with the network filled in that etcd says, if it is there that it has to be looked up."""
    overlay = config.overlay
    if overlay is None or overlay.etcd is None or not overlay.network_in_etcd:
        return config
    found = _ask(overlay.etcd, patience)
    where = f"{overlay.etcd.prefix}/{CONFIG}"
    if found is None:
        found = _saved(overlay.etcd, path)
        where = f"{path}, the last that was seen"
    if found is None:
        log.warning("the network is not known yet: etcd has not said %s", where)
        return config
    log.info("the network is that of %s", where)
    return msgspec.structs.replace(config, overlay=msgspec.structs.replace(overlay, net_conf=found))


def _ask(options: EtcdOptions, patience: float) -> NetConf | None:
    """Ask in a thread that may be left behind: looking up a name has no limit of time."""
    answers: queue.SimpleQueue[NetConf | None] = queue.SimpleQueue()

    def body() -> None:
        found = None
        try:
            kvs = EtcdClient(options, call_seconds=patience / len(options.endpoints)).get(f"{options.prefix}/{CONFIG}").kvs
            found = parse_config(kvs[0].value.decode()) if kvs else None
        except (EtcdError, NetConfError, UnicodeDecodeError) as error:
            log.warning("%s", error)
        finally:
            answers.put(found)

    threading.Thread(target=body, daemon=True, name="network").start()
    try:
        return answers.get(timeout=patience)
    except queue.Empty:
        return None


def _saved(options: EtcdOptions, path: Path) -> NetConf | None:
    text = load(options.prefix, path).config
    try:
        return parse_config(text) if text is not None else None
    except NetConfError:
        return None


_NAMES = {
    "network": "Network",
    "ipv6_network": "IPv6Network",
    "backend": "Backend",
    "subnets": "SubnetLen/Min/Max",
    "ipv6_subnets": "IPv6SubnetLen/Min/Max",
    "nftables": "EnableNFTables",
}


def check_network(options: OverlayOptions, text: str | None) -> tuple[NetConf | None, str]:
    """Return the network that ``<prefix>/config`` says, and what people should know about it; empty: nothing."""
    here = options.net_conf
    where = f"etcd {options.etcd.prefix if options.etcd else ''}/{CONFIG}"
    if text is None:
        return None, "" if here.families else f"{where}: is not there, and the configuration file says no Network"
    try:
        found = parse_config(text)
    except NetConfError as error:
        return None, f"{where}: {error}"
    differing = [name for field, name in _NAMES.items() if getattr(found, field) != getattr(here, field)]
    if not here.families or not differing:
        return found, ""
    networks = f"{', '.join(str(found.network_of(f)) for f in found.families)}"
    advice = "restart the agent to take it" if options.network_in_etcd else "here the configuration file counts"
    return found, f"{where}: {', '.join(differing)} differ from what runs here; Network there is {networks}: {advice}"
