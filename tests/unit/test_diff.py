"""The least that brings a packet filter from one state to another, and its text."""

from __future__ import annotations

import pytest

from kernelstate.diff import Delete, Edit, InsertAnchor, Plan, RemoveAnchor, Replace, Rules, diff_anchors, diff_chains
from kernelstate.objects.address import Prefix
from kernelstate.objects.netfilter import Anchor, ChainKey, Comment, Jump, Rule, Verdict

SERVICES = ChainKey(4, "nat", "KUBE-SERVICES")
A, B = ChainKey(4, "nat", "KUBE-SVC-A"), ChainKey(4, "nat", "KUBE-SVC-B")
DOOR = ChainKey(4, "nat", "PREROUTING")
ACCEPT = Rule(Verdict.ACCEPT)


def long_chain(count: int, start: int = 0) -> Rules:
    return tuple(Rule(Jump("KUBE-SVC-A"), destination=Prefix(4, 0x0A600000 + start + i, 32)) for i in range(count))


LONG = long_chain(200)
NEW = Rule(Jump("KUBE-SVC-B"), (Comment("new"),))


@pytest.mark.parametrize(
    ("have", "want", "expected"),
    [
        pytest.param({A: (ACCEPT,)}, {A: (Rule(Verdict.ACCEPT),)}, [], id="equal by value"),
        pytest.param({}, {A: (ACCEPT,)}, [Replace(A, (ACCEPT,), create=True)], id="missing"),
        pytest.param({A: ()}, {A: (ACCEPT,)}, [Replace(A, (ACCEPT,))], id="short chains are rewritten"),
        pytest.param({A: (ACCEPT,)}, {}, [Delete(A)], id="not desired"),
        pytest.param({}, {}, [], id="neither here nor there"),
        pytest.param(
            {SERVICES: LONG},
            {SERVICES: (*LONG[:100], NEW, *LONG[100:])},
            [Edit(SERVICES, (*LONG[:100], NEW, *LONG[100:]), (), ((101, NEW),))],
            id="one rule inserted",
        ),
        pytest.param(
            {SERVICES: LONG},
            {SERVICES: LONG[:50] + LONG[51:]},
            [Edit(SERVICES, LONG[:50] + LONG[51:], (LONG[50],), ())],
            id="one rule removed",
        ),
        pytest.param(
            {SERVICES: LONG},
            {SERVICES: (NEW, *LONG[1:150], *LONG[151:], ACCEPT)},
            [Edit(SERVICES, (NEW, *LONG[1:150], *LONG[151:], ACCEPT), (LONG[0], LONG[150]), ((1, NEW), (200, ACCEPT)))],
            id="three places at once",
        ),
        pytest.param(
            {SERVICES: LONG},
            {SERVICES: (LONG[199], *LONG[:199])},
            [Edit(SERVICES, (LONG[199], *LONG[:199]), (LONG[199],), ((1, LONG[199]),))],
            id="a rule that moved",
        ),
        pytest.param(
            {SERVICES: LONG}, {SERVICES: long_chain(200, 100)}, [Replace(SERVICES, long_chain(200, 100))], id="half is new"
        ),
        pytest.param(
            {SERVICES: (*LONG, LONG[3])},
            {SERVICES: LONG},
            [Replace(SERVICES, LONG)],
            id="-D would take the first of two equals",
        ),
    ],
)
def test_diff_chains(have: dict[ChainKey, Rules], want: dict[ChainKey, Rules], expected: list[object]) -> None:
    """Each row: the state before, after, and the least to write."""
    assert list(diff_chains(have, want, [SERVICES, A])) == expected


def test_one_chain_changed_means_one_chain_compared() -> None:
    """Only the keys that are named are looked at."""
    assert list(diff_chains({A: (ACCEPT,), B: (ACCEPT,)}, {}, [B])) == [Delete(B)]


def test_plan_text_declares_first_and_deletes_last() -> None:
    """Chains are declared before rules that jump to them, anchors go before and come after, deletions are last."""
    plan = Plan(
        (
            InsertAnchor(DOOR, Rule(Jump("KUBE-SERVICES")), 1),
            RemoveAnchor(DOOR, Rule(Jump("KUBE-OLD"))),
            InsertAnchor(ChainKey(4, "filter", "FORWARD"), ACCEPT, 0),
            Delete(A),
            Edit(SERVICES, LONG, (LONG[0],), ((3, NEW),)),
            Replace(B, (ACCEPT,), create=True),
        )
    )
    assert plan.text() == (
        "*filter\n"
        "-A FORWARD -j ACCEPT\n"
        "COMMIT\n"
        "*nat\n"
        ":KUBE-SVC-A - [0:0]\n"
        ":KUBE-SVC-B - [0:0]\n"
        "-D PREROUTING -j KUBE-OLD\n"
        "-A KUBE-SVC-B -j ACCEPT\n"
        "-D KUBE-SERVICES -d 10.96.0.0 -j KUBE-SVC-A\n"
        "-I KUBE-SERVICES 3 -m comment --comment new -j KUBE-SVC-B\n"
        "-I PREROUTING 1 -j KUBE-SERVICES\n"
        "-X KUBE-SVC-A\n"
        "COMMIT\n"
    )
    insert, _, append, delete, edit, _ = plan.changes
    assert [plan.change_at(line) for line in (1, 2, 5, 9, 10, 11, 12, 13)] == [
        None,
        append,
        delete,
        edit,
        edit,
        insert,
        delete,
        None,
    ]
    assert not Plan()
    assert Plan().text() == ""


FIRST, SECOND, THIRD = (Rule(Jump(f"KUBE-{n}")) for n in (1, 2, 3))
OLD = Rule(Jump("KUBE-OLD"))
FOREIGN, OTHER = Rule(Jump("DOCKER")), Rule(Verdict.DROP)


def is_ours(rule: Rule) -> bool:
    return isinstance(rule.target, Jump) and rule.target.chain.startswith("KUBE-")


@pytest.mark.parametrize(
    ("now", "last", "expected"),
    [
        pytest.param([], False, [FIRST, SECOND, THIRD], id="an empty chain gets them in order"),
        pytest.param([FOREIGN, OTHER], False, [FIRST, SECOND, THIRD, FOREIGN, OTHER], id="before everything else"),
        pytest.param([FOREIGN, OTHER], True, [FIRST, SECOND, FOREIGN, OTHER, THIRD], id="the last one goes to the end"),
        pytest.param([FOREIGN, FIRST, OTHER, SECOND, THIRD], False, None, id="what is there stays where it is"),
        pytest.param([FOREIGN, FIRST, OTHER, THIRD], False, [FOREIGN, FIRST, SECOND, OTHER, THIRD], id="a missing one"),
        pytest.param([FIRST, FOREIGN, FIRST, SECOND, THIRD], False, [FOREIGN, FIRST, SECOND, THIRD], id="a duplicate"),
        pytest.param([OLD, FIRST, OLD, SECOND, THIRD, OTHER], False, [FIRST, SECOND, THIRD, OTHER], id="stale ones go"),
        pytest.param([THIRD, FOREIGN], True, [FIRST, SECOND, THIRD, FOREIGN], id="the last one stays when it is there"),
    ],
)
def test_diff_anchors(now: list[Rule], last: bool, expected: list[Rule] | None) -> None:
    """Doing what the diff says leaves each anchor once, in order when it was missing, and nothing else of ours."""
    anchors = [Anchor(DOOR, FIRST), Anchor(DOOR, SECOND), Anchor(DOOR, THIRD, first=not last)]
    changes = list(diff_anchors(DOOR, now, anchors, is_ours))
    state = list(now)
    for change in sorted(changes, key=lambda change: isinstance(change, InsertAnchor)):  # as the text has them
        match change:
            case RemoveAnchor(_, rule):
                state.remove(rule)
            case InsertAnchor(_, rule, position):
                state.insert(position - 1 if position else len(state), rule)
    assert state == (now if expected is None else expected)
    if expected is None:
        assert changes == []
