"""Signals and the daemon's loop: none is lost, whenever it comes."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest

from nodeplane import daemon
from nodeplane.config import parse_config

NODE = {"apiVersion": "nodeplane.dev/v1alpha1", "kind": "NodeConfiguration", "nodeName": "n1", "services": False}


class Loop:
    """An agent that only turns: what it is told of refusals, and whether it was told to end."""

    def __init__(self):
        self.attendants, self.watched, self.refusals, self.denied = [], [], [], None

    def start(self, _first):
        pass

    def run(self, stop, _wake):
        end = time.monotonic() + 5
        while not stop():
            assert time.monotonic() < end, "nothing ends the turn: the signal is lost"
            time.sleep(0.001)  # a turn of the loop

    def refuse(self, why):
        self.refusals.append(why)


@pytest.fixture
def followed(monkeypatch):
    """Yield what runs the daemon's loop over a file that changes once; ``meanwhile`` happens while the change is taken up."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    loop = Loop()
    file = SimpleNamespace(is_due=True, seen=lambda: setattr(file, "is_due", False))
    monkeypatch.setattr(daemon, "build_agent", lambda *_: loop)
    monkeypatch.setattr(daemon, "expected_chains", lambda _: 0)

    def run(meanwhile):
        def take_up(_args, config, *_):
            meanwhile()
            return config

        monkeypatch.setattr(daemon, "_take_up", take_up)
        watchers = SimpleNamespace(watch=lambda _: None, file=file)
        daemon._follow(None, parse_config(NODE), SimpleNamespace(), None, watchers)
        return loop

    yield run
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_that_comes_while_a_file_is_taken_up_ends_the_agent(followed):
    """SIGTERM during the taking up of a changed file is obeyed afterwards."""
    followed(lambda: os.kill(os.getpid(), signal.SIGTERM))


def test_a_hangup_that_comes_while_a_file_is_taken_up_starts_it_anew(followed, monkeypatch):
    """So is SIGHUP: the process is replaced, or says why not."""
    monkeypatch.setattr(daemon, "_start_anew", lambda _args, why: (os.kill(os.getpid(), signal.SIGTERM), why)[1])
    assert followed(lambda: os.kill(os.getpid(), signal.SIGHUP)).refusals == ["SIGHUP"]
