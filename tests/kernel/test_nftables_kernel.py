"""nftables in the real kernel: what is applied is what is observed, drift is repaired, others are left alone."""

import copy
import subprocess

import nft_tables
import pytest

from kernelstate.diff_nftables import diff_tables
from kernelstate.errors import KernelRefusedError
from kernelstate.fake_nftables import FakeNftables
from kernelstate.linux import netns as namespaces
from kernelstate.linux.nftables import NftablesPort
from kernelstate.objects.nftables import (
    Chain,
    Goto,
    Hook,
    Interval,
    MasqueradeFully,
    NamedSet,
    Refuse,
    Rule,
    Table,
    TableChange,
    TableKey,
)
from kernelstate.ports import SyncReport
from kernelstate.reconcile_nftables import NftablesReconciler
from kernelstate.text import nft

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("in_netns")]

NAME = "nodeplane"
IN_SYNC = SyncReport("nftables")


class Counting:
    """A port that lists what is written and how often it is observed."""

    def __init__(self, port):
        self.port, self.written, self.observations = port, [], 0

    def __getattr__(self, name):
        return getattr(self.port, name)

    def apply(self, text):
        self.written.append(text)
        self.port.apply(text)

    def load(self, key, named, elements):
        self.written.append((named.name, len(elements)))
        self.port.load(key, named, elements)

    def fill(self, key, sets, chains):
        self.written.append(tuple(chains))
        self.port.fill(key, sets, chains)

    def observe(self, key, like):
        self.observations += 1
        return self.port.observe(key, like)


@pytest.fixture
def port(in_netns):
    found = NftablesPort()
    yield Counting(found)
    found.close()


@pytest.fixture(params=[4, 6])
def family(request):
    return request.param


def nft_tool(*words):
    return subprocess.run(["nft", *words], capture_output=True, text=True, check=True, timeout=120).stdout


def start(port, tables):
    reconciler = NftablesReconciler(port)
    reconciler.set_desired(tables)
    return reconciler


def test_apply_then_observe_is_equal(port, family):
    """What was applied is what is observed, in every form, and a second process finds nothing to write."""
    desired = nft_tables.table(family)
    assert start(port, {family: desired}).sync().ok
    assert port.observe(TableKey(family, NAME), desired) == desired
    before = len(port.written)
    assert start(port, {family: desired}).sync() == IN_SYNC
    assert len(port.written) == before


def test_the_printed_table_is_the_applied_one(port, family):
    """What ``nft -f`` makes of the whole table as printed is observed as equal."""
    desired = nft_tables.table(family)
    text = nft.print_table(TableKey(family, NAME), desired)
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True, timeout=120)
    assert start(port, {family: desired}).sync() == IN_SYNC


def test_nft_can_list_what_we_made(port, family):
    """The tool that people use lists our table, with every chain and set in it."""
    desired = nft_tables.table(family)
    start(port, {family: desired}).sync()
    listing = nft_tool("list", "table", nft.WORD[family], NAME)
    for name in (*desired.chains, *desired.sets):
        assert f" {name} {{" in listing


def test_bulk_is_the_same_as_text(port, family):
    """A large table, written in several transactions and its elements past libnftables, is observed as equal."""
    desired = nft_tables.table(family, services=3000)
    assert start(port, {family: desired}).sync().ok
    assert ("endpoints", 6000) in port.written
    assert port.observe(TableKey(family, NAME), desired) == desired
    assert start(port, {family: desired}).sync() == IN_SYNC
    small = nft_tables.table(family, services=1)
    assert start(port, {family: small}).sync().ok
    assert port.observe(TableKey(family, NAME), small) == small


def test_a_small_change_is_one_transaction_and_no_listing(port, family):
    """An endpoint that moves, a chain that comes and one that goes are written at once, from memory."""
    desired = nft_tables.table(family)
    del desired.chains["consistent"], desired.chains["endpoint-a"]
    reconciler = start(port, {family: desired})
    reconciler.sync()
    written, looks = len(port.written), port.observations
    frontend = next(iter(desired.elements["services"]))
    desired.elements["endpoints"][*frontend, 0] = (nft_tables.PODS[family] + 99, 9)
    desired.elements["services"][frontend] = Goto("cluster-ip-9")
    desired.chains["cluster-ip-9"] = Chain((Rule((), (Refuse(),)),))
    del desired.chains["node-port-2"], desired.elements["node-ports"]["tcp", 30000]
    change = TableChange(
        frozenset({"cluster-ip-9", "node-port-2"}),
        frozenset(),
        {
            "endpoints": frozenset({(*frontend, 0)}),
            "services": frozenset({frontend}),
            "node-ports": frozenset({("tcp", 30000)}),
        },
    )
    reconciler.set_desired({family: desired}, {family: change})
    assert reconciler.dirty
    assert reconciler.sync().ok
    assert (len(port.written), port.observations) == (written + 1, looks)
    assert port.observe(TableKey(family, NAME), desired) == desired


def test_a_rule_that_asks_by_number_is_the_same_whenever_it_is_added(port, family):
    """Chains that come, or change, when their maps are there already hold what they would in a new table, and no other protocol."""
    desired = nft_tables.table(family)
    numbered = ("cluster-ip-2", "consistent", "node-port-2")
    later = {name: desired.chains.pop(name) for name in numbered}
    elements = {name: desired.elements.pop(name) for name in ("services", "node-ports")}
    jumping = desired.chains.pop("endpoint-a")
    desired.elements.update(services={}, **{"node-ports": {}})
    reconciler = start(port, {family: desired})
    reconciler.sync()
    written = len(port.written)
    desired.chains.update(later, **{"endpoint-a": jumping})
    desired.elements.update(elements)
    reconciler.set_desired({family: desired})
    assert reconciler.sync().ok
    assert port.written[written + 1] == numbered
    assert len(port.written) == written + 3
    assert port.observe(TableKey(family, NAME), desired) == desired
    rules = [rule for name in numbered for rule in desired.chains[name].rules]
    assert len(rules) == 5
    desired.chains["cluster-ip-2"] = Chain(desired.chains["cluster-ip-2"].rules[::-1])
    reconciler.set_desired({family: desired}, {family: TableChange(frozenset({"cluster-ip-2"}))})
    assert reconciler.sync().changed == 1
    assert port.observe(TableKey(family, NAME), desired) == desired


def element(family, name):
    desired = nft_tables.table(family)
    return nft.key_texts(family, desired.sets[name].key, [next(iter(desired.elements[name]))])[0]


DRIFTS = {
    "flush ruleset": lambda _f: "flush ruleset",
    "delete table": lambda f: f"delete table {nft.WORD[f]} {NAME}",
    "flush map": lambda f: f"flush map {nft.WORD[f]} {NAME} services",
    "flush interval set": lambda f: f"flush set {nft.WORD[f]} {NAME} cidrs",
    "delete element": lambda f: f"delete element {nft.WORD[f]} {NAME} endpoints {{ {element(f, 'endpoints')} }}",
    "foreign element": lambda f: f"add element {nft.WORD[f]} {NAME} node-ports {{ tcp . 4 : jump reject-chain }}",
    "foreign key": lambda f: f"add element {nft.WORD[f]} {NAME} node-ports {{ 99 . 4 : continue }}",
    "other verdict": lambda f: (
        f"delete element {nft.WORD[f]} {NAME} services {{ {element(f, 'services')} }}\n"
        f"add element {nft.WORD[f]} {NAME} services {{ {element(f, 'services')} : drop }}"
    ),
    "rule added": lambda f: f"insert rule {nft.WORD[f]} {NAME} prerouting accept",
    "chain flushed": lambda f: f"flush chain {nft.WORD[f]} {NAME} cluster-ip-2",
    "rules in another order": lambda f: (
        f"flush chain {nft.WORD[f]} {NAME} postrouting\n"
        + "\n".join(nft.add_rules(TableKey(f, NAME), "postrouting", nft_tables.chains(f)["postrouting"].rules[::-1]))
    ),
    "other anonymous set": lambda f: (
        f"flush chain {nft.WORD[f]} {NAME} forward\n"
        + "\n".join(nft.add_rules(TableKey(f, NAME), "forward", nft_tables.chains(f)["forward"].rules)).replace(
            "{ sctp, udp }", "{ tcp, udp }"
        )
    ),
    "foreign chain": lambda f: f"add chain {nft.WORD[f]} {NAME} x {{ type filter hook input priority 0; }}",
    "foreign set": lambda f: (
        f"add set {nft.WORD[f]} {NAME} x {{ type inet_proto; }}\nadd element {nft.WORD[f]} {NAME} x {{ 6 }}"
    ),
    "other policy": lambda f: f"add chain {nft.WORD[f]} {NAME} forward {{ policy drop; }}",
}


@pytest.mark.parametrize("drift", DRIFTS)
def test_drift_is_noticed_and_repaired(port, family, drift):
    """Each row: whatever somebody else does to our table is noticed by its event alone and undone."""
    desired = nft_tables.table(family)
    reconciler = start(port, {family: desired})
    reconciler.sync()
    assert not reconciler.drifted()
    nft_tool(DRIFTS[drift](family))
    assert reconciler.drifted()
    assert reconciler.sync().ok
    assert port.observe(TableKey(family, NAME), desired) == desired
    assert not reconciler.drifted()
    assert reconciler.sync() == IN_SYNC


def test_a_repair_writes_only_what_differs(port):
    """A flushed map comes back alone: chains and other sets are not written, and what clients are remembered for stays."""
    desired = nft_tables.table(4)
    reconciler = start(port, {4: desired})
    reconciler.sync()
    nft_tool(f"add element ip {NAME} affinity-a {{ 10.0.0.9 }}\nflush map ip {NAME} node-ports")
    written = len(port.written)
    assert reconciler.drifted()
    assert reconciler.sync().changed == 2
    assert [line.split()[:5] for line in port.written[written].splitlines()] == [["add", "element", "ip", NAME, "node-ports"]]
    assert "10.0.0.9" in nft_tool("list", "set", "ip", NAME, "affinity-a")


def test_commits_of_others_cause_no_listing(port):
    """Tables of others, of either family and even with chains named as ours, come and go without a look at our table."""
    desired = {4: nft_tables.table(4), 6: nft_tables.table(6)}
    reconciler = start(port, desired)
    reconciler.sync()
    looks = port.observations
    nft_tool(f'add table ip other\nadd chain ip other {NAME}\nadd rule ip other {NAME} accept comment "{NAME}"')
    nft_tool(f"add table inet {NAME}\nadd set inet {NAME} services {{ type ipv4_addr; }}")
    assert not reconciler.drifted()
    assert reconciler.sync() == IN_SYNC
    assert port.observations == looks
    assert reconciler.cleanup().ok
    left = nft_tool("list", "tables").split("\n")
    assert left == ["table ip other", f"table inet {NAME}", ""]


def test_families_do_not_disturb_each_other(port):
    """Drift of one family is repaired without a look at the other, and a family that is not desired any more goes."""
    desired = {4: nft_tables.table(4), 6: nft_tables.table(6)}
    reconciler = start(port, desired)
    assert reconciler.sync().ok
    assert not reconciler.drifted()
    looks = port.observations
    nft_tool(f"delete table ip6 {NAME}")
    assert reconciler.drifted()
    assert reconciler.sync().ok
    assert port.observations == looks + 1
    reconciler.set_desired({4: desired[4]}, {})
    assert reconciler.sync().changed == 1
    assert nft_tool("list", "tables") == f"table ip {NAME}\n"
    reconciler.set_desired({})
    assert reconciler.sync().changed == 1
    assert nft_tool("list", "tables") == ""
    assert not reconciler.dirty


def test_what_the_kernel_refuses_is_contained(port):
    """Impossible rules, and elements that overlap or lead to them or nowhere, stay out with the kernel's words; all else is in."""
    desired = nft_tables.table(4)
    good = copy.deepcopy(desired)
    desired.chains["bad"] = Chain((Rule((), (MasqueradeFully(),)),))
    desired.chains["input"] = Chain((Rule((), (MasqueradeFully(),)),), Hook("filter", "input", 0))
    desired.elements["services"][1, "tcp", 1] = Goto("bad")
    desired.elements["services"][1, "tcp", 2] = Goto("nowhere")
    desired.elements["source-ranges"][1, "tcp", 1, Interval(10, 20)] = None
    desired.elements["source-ranges"][1, "tcp", 1, Interval(15, 25)] = None
    reconciler = start(port, {4: desired})
    report = reconciler.sync()
    assert reconciler.dirty
    seen = port.observe(TableKey(4, NAME), good)
    assert seen is not None
    for name, chain in good.chains.items():
        assert seen.chains[name] == chain
    for name in good.elements:
        assert good.elements[name].items() <= seen.elements[name].items()
    assert not report.ok
    refused = [line.split(": ")[0] for line in report.errors]
    assert "write ip nodeplane element services { 0.0.0.1 . tcp . 2 }" in refused
    assert len([line for line in refused if "source-ranges { 0.0.0.1 . tcp . 1 . 0.0.0." in line]) == 1
    assert len([line for line in refused if "write ip nodeplane chain " in line]) == 1
    for name in ("bad", "input"):
        desired.chains.pop(name)
    for port_number in (1, 2):
        desired.elements["services"].pop((1, "tcp", port_number))
    desired.elements["source-ranges"].pop((1, "tcp", 1, Interval(10, 20)))
    reconciler.set_desired({4: desired})
    assert reconciler.sync().ok
    assert port.observe(TableKey(4, NAME), desired) == desired


def test_a_set_declared_otherwise_replaces_the_table(port):
    """Where an older version declared a set in another way the table is replaced as a whole, in one transaction."""
    desired = nft_tables.table(4)
    older = Table(desired.chains, {**desired.sets, "cidrs": NamedSet("cidrs", (nft_tables.DADDR,))}, {})
    start(port, {4: older}).sync()
    written = len(port.written)
    assert start(port, {4: desired}).sync().ok
    assert len(port.written) == written + 1
    assert port.observe(TableKey(4, NAME), desired) == desired


def test_a_port_works_where_it_was_made(port, make_netns):
    """A port reads, writes and listens in the namespace in which it was made, wherever its caller is."""
    desired = nft_tables.table(4)
    reconciler = start(port, {4: desired})
    with namespaces.inside(make_netns()):
        assert reconciler.sync().ok
        assert nft_tool("list", "tables") == ""
        nft_tool(f"add table ip {NAME}")
        assert not reconciler.drifted()
        assert reconciler.verify() == IN_SYNC
    assert nft_tool("list", "tables") == f"table ip {NAME}\n"


def test_a_commit_while_we_write_is_noticed(port, monkeypatch):
    """Somebody who commits while we do, when we do not listen, is noticed by the count; what they did is repaired."""
    desired = nft_tables.table(4)
    reconciler = start(port, {4: desired})
    reconciler.sync()
    library = port.port._library

    class Slow:
        def run(self, text):
            nft_tool(f"flush map ip {NAME} services")
            library.run(text)

    monkeypatch.setattr(port.port, "_library", Slow())
    desired.elements["cluster-ips"][99,] = None
    reconciler.set_desired({4: desired}, {4: TableChange(elements={"cluster-ips": frozenset({(99,)})})})
    assert reconciler.sync().changed == 1
    monkeypatch.undo()
    assert reconciler.drifted()
    assert reconciler.sync().ok
    assert port.observe(TableKey(4, NAME), desired) == desired
    assert not reconciler.drifted()


ROWS = [
    pytest.param("add chain T a\nadd chain T b\nadd rule T a jump b", True, id="a jump"),
    pytest.param("add chain T a\nadd rule T a jump b", False, id="jump to nowhere"),
    pytest.param("add chain T a\nadd chain T b\nadd rule T a jump b\ndelete chain T b", False, id="delete what is jumped to"),
    pytest.param("add chain T a\nadd rule T a drop\nflush chain T a\ndelete chain T a", True, id="flush and delete"),
    pytest.param("add chain T a\nadd chain T b\nadd rule T a jump b\nflush chain T a\ndelete chain T b", True, id="no longer"),
    pytest.param("add element T m { 10.0.0.1 : drop }\nadd element T m { 10.0.0.1 : drop }", True, id="add twice"),
    pytest.param("add element T m { 10.0.0.1 : drop }\nadd element T m { 10.0.0.1 : accept }", False, id="add otherwise"),
    pytest.param(
        "add element T m { 10.0.0.1 : drop }\ndelete element T m { 10.0.0.1 }\nadd element T m { 10.0.0.1 : accept }",
        True,
        id="change",
    ),
    pytest.param("delete element T m { 10.0.0.1 }", False, id="delete what is not there"),
    pytest.param("add element T m { 10.0.0.1 : goto b }", False, id="element to nowhere"),
    pytest.param(
        "add chain T a\nadd element T m { 10.0.0.1 : goto a }\ndelete chain T a", False, id="chain an element leads to"
    ),
    pytest.param(
        "add chain T a\nadd element T m { 10.0.0.1 : goto a }\ndelete element T m { 10.0.0.1 }\ndelete chain T a",
        True,
        id="chain no element leads to any more",
    ),
    pytest.param("add chain T a\nadd rule T a ip daddr vmap @m\ndelete map T m", False, id="delete a map in use"),
    pytest.param(
        "add chain T a\nadd element T m { 10.0.0.1 : goto a }\ndelete map T m\ndelete chain T a", True, id="map first"
    ),
    pytest.param("delete table T\nadd table T", True, id="replace"),
    pytest.param("delete table T\ndelete table T", False, id="delete twice"),
]


@pytest.mark.parametrize(("text", "taken"), ROWS)
def test_the_fake_takes_what_the_kernel_takes(port, text, taken):
    """Each row: a transaction that the fake and the kernel both take and then hold the same, or both refuse and keep."""
    fake = FakeNftables()
    named = NamedSet("m", (nft_tables.DADDR,), "verdict")
    key = TableKey(4, "t")
    begin = diff_tables(key, None, Table({}, {"m": named}, {}), None).text()
    results = []
    for one in (port, fake):
        one.apply(begin)
        try:
            one.apply(text.replace(" T", " ip t"))
        except KernelRefusedError:
            results.append(False)
        else:
            results.append(True)
    assert results == [taken, taken]
    like = Table({}, {"m": named}, {})
    real, faked = port.observe(key, like), fake.observe(key, like)
    assert real is not None
    assert faked is not None
    assert (real.chains.keys(), real.elements) == (faked.chains.keys(), faked.elements)
