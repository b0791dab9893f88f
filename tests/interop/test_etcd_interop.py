"""Leases in a real etcd, among keys written by hand as flanneld writes them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import msgspec
import pytest
from etcd_server import PREFIX, EtcdServer, etcd_server, wait_for
from leases import CONF, MAC, Keepers, flannel_value, held, lease_keepers, peers

from kernelstate.linux import netns
from nodeplane.config import parse_config
from nodeplane.etcd_client import CompactedError, EtcdClient, EtcdError
from nodeplane.etcd_wire import Event
from nodeplane.network_config import with_network
from overlay.lease import derived_mac
from overlay.netconf import HostGwBackend, NetConf, UdpBackend, VxlanBackend

pytestmark = pytest.mark.kernel

DUAL = NetConf(ip_network("10.5.0.0/16"), ip_network("fc00::/48"))


@pytest.fixture
def space() -> Iterator[str]:
    """Return the name of a namespace for etcd and those who ask it."""
    name = f"np-t-{time.monotonic_ns():x}"
    netns.create(name)
    try:
        yield name
    finally:
        netns.delete(name)


@pytest.fixture
def server(space: str) -> Iterator[EtcdServer]:
    """Return a running etcd."""
    with etcd_server(space) as running:
        yield running


@pytest.fixture
def keepers(server: EtcdServer, tmp_path: Path) -> Iterator[Keepers]:
    """Return a maker of keepers for that etcd."""
    with lease_keepers(server, tmp_path) as made:
        yield made


def grant(server: EtcdServer, seconds: int = 86400) -> int:
    """Make an etcd lease with etcd's own tool."""
    return int(server.ctl("lease", "grant", str(seconds)).split()[1], 16)


def seconds_left(server: EtcdServer, lease: int) -> int:
    words = server.ctl("lease", "timetolive", f"{lease:x}")
    return int(words.split("remaining(")[1].split("s")[0])


# -- what is written and read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conf", "key", "value"),
    [
        (CONF, "10.5.2.0-24", flannel_value("192.168.1.2", derived_mac("n2", 1, 4))),
        (NetConf(CONF.network, backend=UdpBackend()), "10.5.2.0-24", '{"PublicIP":"192.168.1.2","PublicIPv6":null}'),
        (
            NetConf(CONF.network, backend=HostGwBackend()),
            "10.5.2.0-24",
            '{"PublicIP":"192.168.1.2","PublicIPv6":null,"BackendType":"host-gw"}',
        ),
        (
            DUAL,
            "10.5.2.0-24&fc00:0:0:2::-64",
            (
                '{"PublicIP":"192.168.1.2","PublicIPv6":"fd00::2","BackendType":"vxlan",'
                f'"BackendData":{{"VNI":1,"VtepMAC":"{derived_mac("n2", 1, 4)}"}},'
                f'"BackendV6Data":{{"VNI":1,"VtepMAC":"{derived_mac("n2", 1, 6)}"}}}}'
            ),
        ),
    ],
)
def test_written_as_flannel_writes(server: EtcdServer, keepers: Keepers, conf: NetConf, key: str, value: str) -> None:
    """Key, value and a lease of a day are flannel's, byte for byte, for each backend and for both families."""
    (keepers.directory / "n2.env").write_text("FLANNEL_SUBNET=10.5.2.1/24\nFLANNEL_IPV6_SUBNET=fc00:0:0:2::1/64\n")
    held(keepers.start("n2", "192.168.1.2", "fd00::2", conf=conf))
    assert server.entries() == {f"subnets/{key}": value}
    assert 86000 < seconds_left(server, server.lease_of(f"subnets/{key}")) <= 86400


def test_peers_as_flannel_writes_them(server: EtcdServer, keepers: Keepers) -> None:
    """Nodes of flannel's are peers while their keys are there: before this node, after it, changed, and no longer."""
    server.put("subnets/10.5.7.0-24", flannel_value("192.168.1.7"), grant(server))
    keeper = keepers.start("n1", "192.168.1.1")
    held(keeper)
    assert peers(keeper) == {"192.168.1.7": ("10.5.7.0/24",)}
    server.put("subnets/10.5.8.0-24", flannel_value("192.168.1.8"), grant(server))
    server.put("subnets/10.5.7.0-24", flannel_value("192.168.1.77"), grant(server))
    both = {"192.168.1.77": ("10.5.7.0/24",), "192.168.1.8": ("10.5.8.0/24",)}
    wait_for(lambda: peers(keeper) == both, "both peers")
    server.put("subnets/10.5.9.0-24", "{")
    wait_for(lambda: any(m.problems for m in keeper.state.members or ()), "the unreadable key")
    (problem,) = [p for m in keeper.state.members or () for p in m.problems]
    assert str(problem) == "Node 10.5.9.0-24: etcd value: {: is not JSON"
    assert peers(keeper) == both
    server.ctl("del", f"{PREFIX}/subnets/10.5.8.0-24")
    wait_for(lambda: set(peers(keeper)) == {"192.168.1.77"}, "the peer gone")


# -- which subnet --------------------------------------------------------------------------------------------------------


def test_node_of_flannel_is_taken_over(server: EtcdServer, keepers: Keepers) -> None:
    """A node that flanneld ran keeps subnet, MAC and etcd lease, and nothing is written: its peers hear nothing."""
    lease = grant(server)
    server.put("subnets/10.5.7.0-24", flannel_value("192.168.1.1"), lease)
    before = server.revision()
    keeper = keepers.start("n1", "192.168.1.1")
    assert held(keeper) == "10.5.7.0/24"
    assert (server.revision(), server.lease_of("subnets/10.5.7.0-24")) == (before, lease)
    assert (keeper.state.members or ())[0].registrations[0].vtep.mac == MAC  # type: ignore[union-attr]


def test_reservation(server: EtcdServer, keepers: Keepers) -> None:
    """A reserved key is taken by the node with its address, stays without lease, and is a peer only once it is taken."""
    server.put("subnets/10.5.99.0-25", '{"PublicIP":"192.168.1.1"}')
    other = keepers.start("n2", "192.168.1.2")
    held(other)
    assert peers(other) == {}
    keeper = keepers.start("n1", "192.168.1.1")
    assert held(keeper) == "10.5.99.0/25"
    assert server.entries()["subnets/10.5.99.0-25"] == flannel_value("192.168.1.1", derived_mac("n1", 1, 4))
    assert (server.lease_of("subnets/10.5.99.0-25"), keeper.state.lease.until) == (0, 0)
    wait_for(lambda: peers(other) == {"192.168.1.1": ("10.5.99.0/25",)}, "the reserved node as a peer")


def test_reserved_while_the_node_runs(server: EtcdServer, keepers: Keepers) -> None:
    """A key whose lease is taken from it becomes a reservation; another one waits, and is told, until the first is deleted."""
    keeper = keepers.start("n1", "192.168.1.1")
    subnet = held(keeper)
    key = f"subnets/{subnet.replace('/', '-')}"
    value = server.entries()[key]
    server.put(key, '{"PublicIP":"192.168.1.1"}')
    wait_for(lambda: server.entries()[key] == value and keeper.state.lease.until == 0, "the reservation")
    assert (held(keeper), server.lease_of(key)) == (subnet, 0)
    server.put("subnets/10.5.250.0-24", '{"PublicIP":"192.168.1.1"}')
    words = f"whose key is {key.removeprefix('subnets/')}; that is to be deleted"
    wait_for(lambda: any(words in str(p) for m in keeper.state.members or () for p in m.problems), "the reservation is told")
    assert held(keeper) == subnet
    server.ctl("del", f"{PREFIX}/{key}")
    wait_for(lambda: held(keeper) == "10.5.250.0/24", "the other one")
    assert (set(server.entries()), keeper.state.members[0].problems) == ({"subnets/10.5.250.0-24"}, ())


def test_lease_that_does_not_fit_any_more(server: EtcdServer, keepers: Keepers) -> None:
    """A lease of another length is exchanged for one that fits, in one step."""
    server.put("subnets/10.5.7.0-26", flannel_value("192.168.1.1"), grant(server))
    subnet = held(keepers.start("n1", "192.168.1.1"))
    assert ip_network(subnet).prefixlen == 24
    assert set(server.entries()) == {f"subnets/{subnet.replace('/', '-')}"}


def test_new_address(server: EtcdServer, keepers: Keepers) -> None:
    """A node that gets another address keeps its key, also if that happened while its agent was down."""
    keeper = keepers.start("n1", "192.168.1.1")
    subnet = held(keeper)
    key = f"subnets/{subnet.replace('/', '-')}"
    lease = server.lease_of(key)
    keeper.tell({4: ip_address("192.168.1.101")})
    wait_for(lambda: '"192.168.1.101"' in server.entries()[key], "the new address")
    keepers.end(keeper)
    assert held(keepers.start("n1", "192.168.1.201")) == subnet
    wait_for(lambda: '"192.168.1.201"' in server.entries()[key], "the newer address")
    assert (set(server.entries()), server.lease_of(key)) == ({key}, lease)


def test_many_claim_at_once(server: EtcdServer, keepers: Keepers) -> None:
    """Thirty nodes that start at once, in a network of thirty-one subnets, get one each; nobody fails, no lease is left over."""
    conf = NetConf(ip_network("10.5.0.0/19"))
    started = time.monotonic()
    running = [keepers.start(f"n{i}", f"192.168.1.{i}", conf=conf) for i in range(1, 31)]
    subnets = {held(keeper) for keeper in running}
    assert time.monotonic() - started < 15
    assert len(subnets) == 30
    assert {f"subnets/{one.replace('/', '-')}" for one in subnets} == set(server.entries())
    wait_for(lambda: all(len(peers(keeper)) == 29 for keeper in running), "29 peers each")
    leases = set(map(server.lease_of, server.entries()))
    listed = {int(word, 16) for word in server.ctl("lease", "list").split() if len(word) == 16}
    assert (len(leases), listed) == (30, leases)


def test_network_is_full(server: EtcdServer, keepers: Keepers) -> None:
    """A node for which no subnet is left says so, and has one as soon as one is free."""
    conf = NetConf(ip_network("10.5.0.0/22"))
    for i in (1, 2, 3):
        server.put(f"subnets/10.5.{i}.0-24", flannel_value(f"192.168.1.10{i}"), grant(server))
    keeper = keepers.start("n1", "192.168.1.1", conf=conf)
    wait_for(lambda: keeper.state.lease.error == "no free /24 is left in 10.5.0.0/22 for this node", "the error")
    assert (keeper.state.members, keeper.state.lease.lost_since) == (None, 0)
    server.ctl("del", f"{PREFIX}/subnets/10.5.2.0-24")
    assert held(keeper) == "10.5.2.0/24"
    wait_for(lambda: not keeper.state.lease.error, "no error")


# -- what happens to the lease -------------------------------------------------------------------------------------------


def test_own_key_deleted(server: EtcdServer, keepers: Keepers) -> None:
    """A key that somebody deletes is written again; if another has the subnet by then, the node takes a new one."""
    keeper = keepers.start("n1", "192.168.1.1")
    first = held(keeper)
    key = f"{PREFIX}/subnets/{first.replace('/', '-')}"
    server.ctl("del", key)
    wait_for(lambda: key.removeprefix(f"{PREFIX}/") in server.entries(), "the key")
    assert held(keeper) == first
    server.put(key.removeprefix(f"{PREFIX}/"), flannel_value("192.168.1.66"), grant(server))
    wait_for(lambda: keeper.state.lease.subnets != (first,), "another subnet")
    wait_for(lambda: peers(keeper) == {"192.168.1.66": (first,)}, "the other as a peer")
    assert set(server.entries()) == {key.removeprefix(f"{PREFIX}/"), f"subnets/{held(keeper).replace('/', '-')}"}


def test_renewal(server: EtcdServer, keepers: Keepers) -> None:
    """A short lease is renewed in place well before its end, again and again, and etcd's revision does not move."""
    lease = grant(server, 3)
    server.put("subnets/10.5.7.0-24", flannel_value("192.168.1.1"), lease)
    keeper = keepers.start("n1", "192.168.1.1")
    held(keeper)
    before, until = server.revision(), keeper.state.lease.until
    wait_for(lambda: keeper.state.lease.until > until + 2.5, "three renewals")
    assert 1 <= seconds_left(server, lease) <= 3
    assert server.revision() == before


def test_lease_revoked(server: EtcdServer, keepers: Keepers) -> None:
    """A lease that is revoked takes the key along; the node has the same subnet again, under a new lease."""
    keeper = keepers.start("n1", "192.168.1.1")
    subnet = held(keeper)
    key = f"subnets/{subnet.replace('/', '-')}"
    lease = server.lease_of(key)
    server.ctl("lease", "revoke", f"{lease:x}")
    wait_for(lambda: key in server.entries(), "the key")
    assert server.lease_of(key) != lease
    assert held(keeper) == subnet


def test_two_nodes_with_one_address(server: EtcdServer, keepers: Keepers) -> None:
    """Two nodes that write the same key differently are told of each other, and do not flood etcd with their quarrel."""
    a = keepers.start("a", "192.168.1.1")
    held(a)
    b = keepers.start("b", "192.168.1.1", conf=NetConf(CONF.network, backend=HostGwBackend()))
    wait_for(lambda: a.state.lease.problems and b.state.lease.problems, "both know")
    assert "somebody else writes it as well: {" in a.state.lease.problems[0]
    before = server.revision()
    wait_for(lambda: server.revision() > before + 2, "two more rounds")
    started, before = time.monotonic(), server.revision()
    wait_for(lambda: time.monotonic() > started + 1, "a second")
    assert server.revision() - before < 6


# -- etcd that goes and comes --------------------------------------------------------------------------------------------


def test_etcd_away_and_compacted(server: EtcdServer, keepers: Keepers) -> None:
    """While etcd is away everybody stays; what changed and was compacted meanwhile is there afterwards."""
    for i in (7, 8, 9):
        server.put(f"subnets/10.5.{i}.0-24", flannel_value(f"192.168.1.{i}"), grant(server))
    keeper = keepers.start("n1", "192.168.1.1")
    subnet = held(keeper)
    wait_for(lambda: len(peers(keeper)) == 3, "three peers")
    members = keeper.state.members
    server.stop()
    wait_for(lambda: keeper.state.lease.lost_since, "the loss")
    assert keeper.state.members == members
    assert "Connection refused" in wait_for(lambda: "refused" in keeper.state.lease.error and keeper.state.lease.error, "why")
    server.start(port=12379)
    server.ctl("del", f"{PREFIX}/subnets/10.5.7.0-24")
    server.put("subnets/10.5.8.0-24", flannel_value("192.168.1.88"), grant(server))
    server.ctl("compact", str(server.revision()))
    assert keeper.state.members == members
    server.stop()
    server.start()
    expected = {"192.168.1.88": ("10.5.8.0/24",), "192.168.1.9": ("10.5.9.0/24",)}
    wait_for(lambda: peers(keeper) == expected, "what etcd says")
    assert (held(keeper), keeper.state.lease.error) == (subnet, "")


def test_etcd_that_hangs(server: EtcdServer, keepers: Keepers, monkeypatch: pytest.MonkeyPatch) -> None:
    """An etcd that is there and says nothing is noticed by asking it, and followed again when it speaks."""
    monkeypatch.setattr("nodeplane.lease_keeper.PROBE", 0.2)
    monkeypatch.setattr("nodeplane.etcd_client.EtcdClient.__init__.__kwdefaults__", {"call_seconds": 0.5})
    keeper = keepers.start("n1", "192.168.1.1")
    held(keeper)
    with server.paused():
        assert "timed out" in wait_for(lambda: keeper.state.lease.lost_since and keeper.state.lease.error, "the loss")
    wait_for(lambda: not keeper.state.lease.lost_since, "etcd again")


def test_watch_of_compacted_revisions(server: EtcdServer) -> None:
    """A watch from a revision that etcd has dropped says so; one that is up to date goes on through a compaction."""
    etcd = EtcdClient(server.options)
    with netns.inside(server.space):
        stream = etcd.watch(f"{PREFIX}/", 1)
        for i in range(5):
            server.put(f"subnets/10.5.{i}.0-24", flannel_value(f"192.168.1.{i}"))
        server.ctl("compact", str(server.revision()))
        server.put("subnets/10.5.9.0-24", flannel_value("192.168.1.9"))
        events: list[Event] = []
        wait_for(lambda: events.extend(stream.read()) or len(events) == 6, "six events")
        stream.close()
        stream = etcd.watch(f"{PREFIX}/", 2)
        with pytest.raises(CompactedError, match=r"compacted up to revision \d+"):
            wait_for(stream.read, "the refusal")
        stream.close()
        assert len(etcd.list(f"{PREFIX}/").kvs) == 6


def test_emptied_etcd(server: EtcdServer, keepers: Keepers) -> None:
    """When etcd comes back empty the nodes take their subnets again, and nobody is taken down meanwhile."""
    a, b = keepers.start("a", "192.168.1.1"), keepers.start("b", "192.168.1.2")
    subnets = (held(a), held(b))
    wait_for(lambda: len(peers(a)) == len(peers(b)) == 1, "each other")
    server.stop()
    server.wipe()
    wait_for(lambda: a.state.lease.lost_since and b.state.lease.lost_since, "the loss")
    lost: list[str] = []
    server.start()
    keys = {f"subnets/{one.replace('/', '-')}" for one in subnets}
    wait_for(lambda: lost.extend("a" for k in (a, b) if not peers(k)) or set(server.entries()) == keys, "both keys")
    assert (held(a), held(b)) == subnets
    assert lost == []


def test_boot_without_etcd(server: EtcdServer, keepers: Keepers) -> None:
    """A node that starts while etcd is away has its subnet and all members at once, and keeps them when etcd is back."""
    server.put("subnets/10.5.7.0-24", flannel_value("192.168.1.7"), grant(server))
    keeper = keepers.start("n1", "192.168.1.1")
    subnet = held(keeper)
    members, until = wait_for(lambda: peers(keeper) and keeper.state.members, "the peer"), keeper.state.lease.until
    keepers.end(keeper)
    server.stop()
    again = keepers.start("n1", "192.168.1.1")
    assert (again.state.members, again.state.lease.until) == (members, until)
    wait_for(lambda: "Connection refused" in again.state.lease.error, "why")
    assert again.state.members == members
    server.start()
    wait_for(lambda: not again.state.lease.lost_since, "etcd")
    assert (again.state.members, held(again)) == (members, subnet)
    other = keepers.make("n1", "192.168.1.1", conf=NetConf(ip_network("10.6.0.0/16")))
    assert other.state.members is None


def test_second_endpoint(server: EtcdServer, keepers: Keepers) -> None:
    """Of several endpoints one that is dead is passed over, and the one that answers is shown."""
    etcd = msgspec.structs.replace(server.options, endpoints=("http://127.0.0.1:1", server.url))
    keeper = keepers.start("n1", "192.168.1.1", etcd=etcd)
    held(keeper)
    assert keeper.state.lease.endpoint == server.url


# -- the network in etcd -------------------------------------------------------------------------------------------------


def test_network_from_etcd(server: EtcdServer, keepers: Keepers) -> None:
    """Where the file states none, the network is etcd's; one found only later, or another than runs, is told."""
    raw = {
        "apiVersion": "nodeplane.dev/v1alpha1",
        "kind": "NodeConfiguration",
        "nodeName": "n1",
        "overlay": {"registry": {"type": "etcd", "endpoints": [server.url]}},
    }
    config, path = parse_config(raw), keepers.directory / "n1.json"
    with netns.inside(server.space):
        assert with_network(config, path) == config
        assert config.overlay is not None
        assert config.overlay.net_conf.families == ()
        keeper = keepers.start("n1", "192.168.1.1", conf=config.overlay.net_conf, network_in_etcd=True)
        words = f"etcd {PREFIX}/config: is not there, and the configuration file says no Network"
        wait_for(lambda: keeper.state.lease.problems == (words,) and not keeper.state.lease.lost_since, "the problem")
        server.put("config", '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":7}}')
        wait_for(lambda: keeper.state.network_found, "the network")
        keepers.end(keeper)
        network = NetConf(CONF.network, backend=VxlanBackend(vni=7))
        found = with_network(config, path).overlay
        assert found is not None
        assert found.net_conf == network
        server.stop()
        assert with_network(config, path, patience=0.5).overlay == found
        server.start()
    keeper = keepers.start("n1", "192.168.1.1", conf=network, network_in_etcd=True)
    held(keeper)
    assert keeper.state.lease.problems == ()
    server.put("config", '{"Network":"10.6.0.0/16","Backend":{"Type":"host-gw"}}')
    words = (
        f"etcd {PREFIX}/config: Network, Backend differ from what runs here; Network there is 10.6.0.0/16: "
        "restart the agent to take it"
    )
    wait_for(lambda: keeper.state.lease.problems == (words,), "the difference")
    server.put("config", "{")
    wait_for(lambda: keeper.state.lease.problems == (f"etcd {PREFIX}/config: config: is not JSON: '{{'",), "nonsense")


# -- who may -------------------------------------------------------------------------------------------------------------


def certificates(directory: Path) -> Path:
    """Make a CA, and certificates of a server at 127.0.0.1 and of a client, with openssl."""
    directory.mkdir()

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=directory, check=True, capture_output=True, timeout=120)

    (directory / "ext").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for ca in ("ca", "stranger"):
        openssl("req", "-x509", *new, "-keyout", f"{ca}.key", "-out", f"{ca}.crt", "-subj", f"/CN={ca}", "-days", "2")
    for name in ("server", "client"):
        openssl("req", *new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "ext", "-days", "2")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.crt", *signed)
    return directory


def test_tls(space: str, tmp_path: Path) -> None:
    """Over TLS a node follows etcd with a certificate of its own; a server nobody vouches for, and no certificate, are told."""
    files = certificates(tmp_path / "pki")
    tls = ["--client-cert-auth", "--trusted-ca-file", f"{files}/ca.crt"]
    tls += ["--cert-file", f"{files}/server.crt", "--key-file", f"{files}/server.key"]
    ctl = ["--cacert", f"{files}/ca.crt", "--cert", f"{files}/client.crt", "--key", f"{files}/client.key"]
    with etcd_server(space, "https", tls, ctl) as server, lease_keepers(server, tmp_path) as keepers:
        own = {"cert_file": f"{files}/client.crt", "key_file": f"{files}/client.key"}
        good = msgspec.structs.replace(server.options, ca_file=f"{files}/ca.crt", **own)
        keeper = keepers.start("n1", "192.168.1.1", etcd=good)
        held(keeper)
        server.put("subnets/10.5.7.0-24", flannel_value("192.168.1.7"))
        wait_for(lambda: peers(keeper), "the peer")
        with netns.inside(space):
            with pytest.raises(EtcdError, match="CERTIFICATE_VERIFY_FAILED"):
                EtcdClient(msgspec.structs.replace(good, ca_file=f"{files}/stranger.crt")).list(f"{PREFIX}/")
            with pytest.raises(EtcdError, match="kv/range: "):
                EtcdClient(msgspec.structs.replace(good, cert_file="", key_file="")).list(f"{PREFIX}/")


def test_password(space: str, tmp_path: Path) -> None:
    """With name and password a node may write, watch, and go on when etcd has forgotten its token; another may not."""
    (tmp_path / "password").write_text("secret\n")
    with (
        etcd_server(space, tls=["--auth-token", "simple", "--bcrypt-cost", "4"]) as server,
        lease_keepers(server, tmp_path) as keepers,
    ):
        for words in (
            "user add root:r",
            "user add nodes:secret",
            "role add net",
            "user grant-role nodes net",
            f"role grant-permission net --prefix readwrite {PREFIX}/",
            "user add guest:secret",
            "auth enable",
        ):
            server.ctl(*words.split())
        server.ctl_words += ["--user", "root:r"]
        login = {"username": "nodes", "password_file": str(tmp_path / "password")}
        keeper = keepers.start("n1", "192.168.1.1", etcd=msgspec.structs.replace(server.options, **login))
        subnet = held(keeper)
        server.stop()  # simple tokens are in memory: the next etcd knows none
        wait_for(lambda: keeper.state.lease.lost_since, "the loss")
        server.start()
        assert held(keeper) == subnet
        server.ctl("del", f"{PREFIX}/subnets/{subnet.replace('/', '-')}")
        wait_for(server.entries, "the key")
        guest = msgspec.structs.replace(server.options, **{**login, "username": "guest"})
        with netns.inside(space), pytest.raises(EtcdError, match="permission denied"):
            EtcdClient(guest).list(f"{PREFIX}/")
