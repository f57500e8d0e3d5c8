"""Notes wait until a step has carried them, and a step carries no more than fits."""

from __future__ import annotations

import json
import struct

import pytest

from moe_native import notes as module
from moe_native.notes import COUNTED, Notes
from moe_native.runs import UNKNOWN
from moe_native.tier import Tier

ALL = Tier(("ids",))


def unpacked(notes):
    """(kind, key, line) of framed notes, as csrc/RING.md says."""
    data, at, found = b"".join(notes), 0, []
    while at < len(data):
        kind, key, size = struct.unpack_from("<III", data, at)
        at += 12
        found.append((kind, key, json.loads(data[at : at + size]) if size else None))
        at += size
    return found


def test_a_request_is_noted_once_and_again_when_more_is_known():
    notes = Notes(1 << 20, ALL)
    assert notes.request("a", {"prompt_len": 5}) == 0
    assert notes.request("b", {}) == 1
    assert notes.request("a", {}) == 0
    first = unpacked(notes.next())
    assert first == [
        (1, 0, {"type": "request", "index": 0, "id": "a", "prompt_len": 5}),
        (1, 1, {"type": "request", "index": 1, "id": "b"}),
    ]
    notes.delivered(2)
    assert notes.request("a", {"prompt_len": 5}) == 0 and not notes.next()
    assert notes.request("a", {"internal": "a-1"}) == 0
    assert unpacked(notes.next()) == [
        (1, 0, {"type": "request", "index": 0, "id": "a", "prompt_len": 5, "internal": "a-1"}),
    ]


def test_what_describes_a_request_does_not_replace_its_name():
    notes = Notes(1 << 20, ALL)
    notes.request("a", {"type": "chat", "index": 7, "id": "b"})
    assert unpacked(notes.next()) == [(1, 0, {"type": "request", "index": 0, "id": "a"})]


def test_undelivered_notes_wait():
    notes = Notes(1 << 20, ALL)
    notes.request("a", {})
    first = notes.next()
    assert notes.next() == first
    notes.request("b", {})
    notes.delivered(len(first))
    assert [line["id"] for _, _, line in unpacked(notes.next())] == ["b"]


def test_a_step_carries_what_fits():
    notes = Notes(200, ALL)
    for i in range(10):
        notes.request(f"request-{i}", {})
    seen = []
    while batch := notes.next():
        assert sum(map(len, batch)) <= 200
        seen += [line["id"] for _, _, line in unpacked(batch)]
        notes.delivered(len(batch))
    assert seen == [f"request-{i}" for i in range(10)]


def test_what_no_step_can_carry_is_cut():
    """A note that does not fit would keep every later step out of the ring."""
    notes = Notes(1000, ALL)
    notes.request("a", {"prompt": "x" * 1000})
    notes.request("y" * 1000, {})
    assert unpacked(notes.next()) == [
        (1, 0, {"type": "request", "index": 0, "id": "a"}),
        (1, 1, {"type": "request", "index": 1, "id": "y" * 125}),
    ]


def test_an_ended_request_gets_a_new_index():
    notes = Notes(1 << 20, ALL)
    notes.request("a", {})
    notes.delivered(len(notes.next()))
    notes.finish("a")
    notes.finish("never heard of")
    assert notes.request("a", {}) == 1
    assert [(kind, key) for kind, key, _ in unpacked(notes.next())] == [(2, 0), (1, 1)]


def test_requests_that_come_and_go_while_nothing_is_recorded_leave_nothing():
    notes = Notes(1 << 20, ALL)
    for i in range(1000):
        notes.request(f"{i}", {})
        notes.finish(f"{i}")
    assert not notes.next() and len(notes) == 0


def test_a_definition_that_still_waits_when_steps_go_on_is_kept():
    notes = Notes(80, ALL)
    notes.request("a", {})
    notes.request("b", {})
    notes.delivered(len(notes.next()))  # "b" did not fit
    notes.finish("b")
    assert [(kind, key) for kind, key, _ in unpacked(notes.next())] == [(1, 1), (2, 1)]


def test_the_oldest_is_forgotten_when_nobody_finishes_any(monkeypatch):
    monkeypatch.setattr(module, "MOST_REQUESTS", 3)
    notes = Notes(1 << 20, ALL)
    for name in "abcd":
        notes.request(name, {})
    assert len(notes) == 3
    assert notes.request("d", {}) == 3 and notes.request("a", {}) == 4


def test_amendments():
    notes = Notes(1 << 20, ALL)
    assert not notes.amendments_wait
    notes.amend(7, 2, 3, ["rejected"])
    assert notes.amendments_wait
    with pytest.raises(ValueError, match="unknown flag 'wrong'"):
        notes.amend(7, 2, 3, ["wrong"])
    assert unpacked(notes.next()) == [
        (3, 0, {"type": "amend", "step": 7, "row": 2, "count": 3, "set": ["rejected"]}),
    ]


@pytest.mark.parametrize("name", ["", "täst", 'quote"\n', "x" * 10_000])
def test_any_name_survives(name):
    notes = Notes(1 << 20, ALL)
    notes.request(name, {})
    assert unpacked(notes.next())[0][2]["id"] == name


def test_a_request_that_is_not_kept_leaves_no_note():
    notes = Notes(1 << 20, Tier(("counts",)))
    hidden = notes.request("secret", {"prompt_len": 5})
    assert hidden == COUNTED and notes.request("other", {}) == COUNTED + 1
    assert notes.request("secret", {"internal": "x"}) == hidden and notes.info("secret")["internal"] == "x"
    notes.tier = ALL
    assert notes.request("shown", {}) == 0 and notes.request("secret", {"more": 1}) == hidden  # decided once
    notes.amend(3, 0, 1, ["rejected"], at=(hidden, 7))
    notes.amend(3, 1, 1, ["rejected"], at=(0, 8))
    notes.finish("secret")
    found = unpacked(notes.next())
    assert [line["type"] for _, _, line in found] == ["request", "amend"]
    assert (found[1][2]["request"], found[1][2]["position"]) == (0, 8)
    notes.delivered(2)
    assert notes.request("secret", {}) == 1  # it ended; this is another, and it is kept


def test_indices_wrap_around_and_never_meet():
    notes = Notes(1 << 20, ALL)
    notes._next = {True: COUNTED - 1, False: UNKNOWN - 1}
    assert [notes.request(name, {}) for name in "ab"] == [COUNTED - 1, 0]
    notes.tier = Tier(("counts",))
    assert [notes.request(name, {}) for name in "cd"] == [UNKNOWN - 1, COUNTED]
