"""Events: what is said, how often, and that neither a flood of problems nor a server that is away matters to anybody else."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from patience import eventually

from clusterstate.sources.reflector import ApiError
from nodeplane import event_writer
from nodeplane.attendant import Round
from nodeplane.event_writer import AGAIN, BURST, LONGEST, REFILL, EventWriter

SECONDS = 10.0


class World:
    """A writer, the server it writes to, and a clock."""

    def __init__(self) -> None:
        self.now, self.refuses = 0.0, ""
        self.events: list[dict] = []
        self.refused = 0
        self.writer = EventWriter(self, "n1", lambda: self.now)

    def post(self, path: str, body: bytes) -> bytes:
        assert path == event_writer.PATH
        if self.refuses:
            self.refused += 1
            raise ApiError(403, self.refuses)
        self.events.append(json.loads(body))
        return body

    def round(self, *problems: str, errors: tuple[str, ...] = (), objects: tuple[str, ...] = ()) -> None:
        status = SimpleNamespace(problems=problems, object_errors=objects)
        self.writer.synced(Round(0.0, (), errors, False, status))  # type: ignore[arg-type]

    def said(self) -> list[tuple[str, str]]:
        """Return reason and note of all Events, once they are out."""
        self.writer.stop(SECONDS)
        assert not self.writer._thread.is_alive()
        return [(one["reason"], one["note"]) for one in self.events]


@pytest.fixture
def world() -> World:
    made = World()
    made.writer.start()
    return made


def test_each_line_once(world: World) -> None:
    """Every kind of line is said with its reason when it appears, and again only after an hour."""
    for _ in range(3):
        world.round("p", errors=("e",), objects=("o",))
    world.now += AGAIN
    world.round("p")
    assert world.said() == [
        ("Starting", "nodeplane runs"),
        ("FailedToProgram", "e"),
        ("BadObject", "o"),
        ("Problem", "p"),
        ("Problem", "p"),
    ]
    assert len({one["metadata"]["name"] for one in world.events}) == 5
    assert [one["type"] for one in world.events] == ["Normal", *["Warning"] * 4]


def test_a_flood_is_cut(world: World) -> None:
    """Of a thousand problems as many are said as an operator reads, and then one in five minutes."""
    lines = [f"Service a/s{number}: conflict" for number in range(1000)]
    world.round(*lines)
    world.round(*lines)
    world.now += REFILL
    world.round(*lines)
    assert [note for _, note in world.said()[1:]] == lines[: BURST + 1]


def test_a_long_note_is_cut(world: World) -> None:
    """A note is no longer than the API takes, and ends with a whole character."""
    world.round("\u00fc" * LONGEST)
    (_, (_, note)) = world.said()
    assert note == "\u00fc" * (LONGEST // 2)


def test_a_server_that_refuses(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Refused Events are lost, which the log says once; those that come later are written."""
    eventually(lambda: world.events, SECONDS)
    world.refuses = "forbidden"
    world.round("one", "two")
    eventually(lambda: world.refused == 2, SECONDS)
    world.refuses = ""
    world.round("one", "two", "three")
    assert [note for _, note in world.said()[1:]] == ["three"]
    assert caplog.text.count("Events cannot be written: 403 forbidden") == 1
