"""The short lane's reconciler over a port in memory: links come and go, programs are taken off, and whatever fails is tried again."""

from __future__ import annotations

import pytest

from kernelstate.errors import KernelRefusedError
from kernelstate.objects.lane import LaneLink, LinkKind
from kernelstate.reconcile_lane import LaneReconciler

POD, OTHER, UPLINK = LaneLink("a", 5, LinkKind.POD), LaneLink("b", 6, LinkKind.POD), LaneLink("eth0", 2, LinkKind.EXIT)


class Port:
    """Links as they are, and programs as they were left."""

    def __init__(self, *links):
        self.links, self.programs, self.generation, self.installed, self.refusing = list(links), [], 0, 0, ""
        self.judged = []

    def wanted(self):
        self.check("wanted")
        return sorted(self.links)

    def observe(self):
        self.check("observe")
        return sorted(self.programs)

    def install(self, links):
        self.check("install")
        self.installed += 1
        self.programs = list(links)

    def judge(self, addresses):
        self.check("judge")
        self.judged.append((sorted(addresses), list(self.programs)))
        return len(addresses)

    def renew(self):
        self.check("renew")
        self.generation += 1

    def remove(self):
        there, self.programs = bool(self.programs), []
        return there

    def counters(self):
        return {}

    def check(self, operation):
        if operation == self.refusing:
            raise KernelRefusedError(operation, "lane", "Operation not permitted")


@pytest.fixture
def port():
    return Port(POD, UPLINK)


def test_programs_are_where_the_links_are(port):
    """The first look installs, the next does nothing; a link that comes or goes is noticed."""
    lane = LaneReconciler(port)
    assert (lane.sync().changed, lane.drifted(), lane.sync().changed, port.installed, lane.links) == (2, False, 0, 1, 2)
    port.links = [OTHER, UPLINK]
    assert lane.drifted()
    assert (lane.sync().changed, port.programs) == (2, [OTHER, UPLINK])


def test_whom_rules_judge_is_written_before_any_program_is_on(port):
    """Whom policies are about is known to the programs before they see a packet, and written again when it has changed."""
    lane = LaneReconciler(port)
    lane.set_judged([(4, 1), (4, 2)])
    assert (lane.sync().changed, port.judged) == (4, [([(4, 1), (4, 2)], [])])
    lane.set_judged([(4, 2), (4, 1)])
    assert lane.sync().changed == 0
    lane.set_judged([(6, 3)])
    assert (lane.sync().changed, port.judged[1:]) == (1, [([(6, 3)], [POD, UPLINK])])
    lane.forget()
    lane.sync()
    assert port.judged[2:] == [([(6, 3)], [POD, UPLINK])]


def test_programs_that_cannot_be_told_whom_rules_judge_go(port):
    """Who does not know of a policy might let through what it forbids; once that can be written the programs are back."""
    lane = LaneReconciler(port)
    lane.sync()
    lane.set_judged([(4, 1)])
    port.refusing = "judge"
    report = lane.sync()
    assert (report.errors, port.programs) == (("judge lane: Operation not permitted",), [])
    port.refusing = ""
    assert (lane.sync().ok, port.programs) == (True, [POD, UPLINK])


def test_what_somebody_takes_off_comes_back(port):
    """A program that is gone from its link is noticed, and put back."""
    lane = LaneReconciler(port)
    lane.sync()
    port.programs = [UPLINK]
    assert lane.drifted()
    assert (lane.sync().changed, port.programs) == (1, [POD, UPLINK])


def test_an_agent_that_starts_finds_what_is_there(port):
    """Programs of an earlier agent that are right are left alone."""
    port.programs = [POD, UPLINK]
    assert (LaneReconciler(port).sync().changed, port.installed) == (0, 0)


@pytest.mark.parametrize("operation", ["wanted", "observe", "install"])
def test_what_is_refused_is_tried_again(port, operation):
    """A refusal is told, nothing is believed, and the next look does it; without the lane nothing is dirty."""
    lane = LaneReconciler(port)
    port.refusing = operation
    assert (lane.sync().ok, lane.dirty, lane.drifted()) == (False, False, True)
    port.refusing = ""
    assert lane.sync().changed == 2


def test_a_generation_that_cannot_begin_ends_the_lane(port):
    """Where what was remembered cannot be ended, programs go at once: nothing must go by what was."""
    lane = LaneReconciler(port)
    assert (lane.renew(), port.generation) == ("", 1), "programs may be there though nobody has looked yet"
    lane.sync()
    assert (lane.renew(), port.generation) == ("", 2)
    port.refusing = "renew"
    assert "Operation not permitted" in lane.renew()
    assert port.programs == []
    port.refusing = ""
    assert lane.drifted()
    assert lane.sync().changed == 2
