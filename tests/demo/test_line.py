"""The line is served in order, whoever leaves costs nobody anything, and what goes wrong concerns one alone."""

import contextlib
import functools
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import pytest

from demo.line import Line, LineFullError, Ticket

WAIT_S = 60.0  # of a busy machine


class Gate:
    """A job that goes on, step after step, until it is allowed to end."""

    def __init__(self) -> None:
        self.has_begun, self.is_open, self.has_ended = threading.Event(), threading.Event(), threading.Event()

    def work(self) -> Generator[str, None, None]:
        self.has_begun.set()
        try:
            while not self.is_open.wait(0.01):
                yield "working"
            yield "done"
        finally:
            self.has_ended.set()


@pytest.fixture
def line() -> Line:
    return Line(max_waiting=4)


@pytest.fixture
def gate(line: Line) -> Gate:
    """The job that is being done."""
    gate = Gate()
    line.join(gate.work)
    assert gate.has_begun.wait(WAIT_S)
    return gate


def wait_until(is_so: Callable[[], object]) -> None:
    limit = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < limit
        time.sleep(0.005)


def say(*words: str) -> Callable[[], Generator[str, None, None]]:
    def job() -> Generator[str, None, None]:
        yield from words

    return job


def hear(ticket: Ticket[str]) -> list[str]:
    """Return what a job yields, without the places."""
    return [step for step in ticket.follow() if not isinstance(step, int)]


def test_first_come_first_served(line: Line, gate: Gate) -> None:
    done: list[int] = []

    def note(number: int) -> Generator[str, None, None]:
        done.append(number)
        yield str(number)

    tickets = [line.join(functools.partial(note, number)) for number in range(4)]
    assert [line.count_before(ticket) for ticket in tickets] == [1, 2, 3, 4]
    gate.is_open.set()
    assert [hear(ticket) for ticket in reversed(tickets)] == [["3"], ["2"], ["1"], ["0"]]
    assert done == [0, 1, 2, 3]


def test_whoever_waits_is_told_the_place(line: Line, gate: Gate) -> None:
    second = Gate()
    line.join(second.work)
    steps = line.join(say("a")).follow()
    assert next(steps) == 2
    gate.is_open.set()
    assert next(steps) == 1
    second.is_open.set()
    assert list(steps) == ["a"]


def test_the_last_result_is_never_lost(line: Line) -> None:
    """However slowly one reads; what came before it may be left out, and stays in order."""
    for _ in range(50):
        ticket = line.join(say(*"abcdefgh"))
        heard = hear(ticket)
        assert heard[-1] == "h"
        assert heard == sorted(heard)
    ticket = line.join(say(*"abc"))
    assert ticket.is_done.wait(WAIT_S)
    assert hear(ticket) == ["c"]
    assert hear(line.join(say())) == []


def test_the_line_has_an_end(line: Line, gate: Gate) -> None:
    tickets = [line.join(say("a")) for _ in range(4)]
    with pytest.raises(LineFullError, match="4 requests are waiting already, which is the limit: try again"):
        line.join(say("b"))
    tickets[1].leave()
    last = line.join(say("c"))
    with pytest.raises(LineFullError):
        line.join(say("d"))
    gate.is_open.set()
    assert hear(last) == ["c"]


def test_nobody_may_wait() -> None:
    line, gate = Line(max_waiting=0), Gate()
    running = line.join(gate.work)
    with pytest.raises(LineFullError):
        line.join(say("a"))
    gate.is_open.set()
    assert hear(running)[-1] == "done"
    wait_until(lambda: not line.tickets)
    assert hear(line.join(say("a"))) == ["a"]


def test_leaving_while_waiting(line: Line, gate: Gate) -> None:
    """Those behind move up, and the job of whoever left is never begun."""
    begun: list[str] = []

    def begin() -> Generator[str, None, None]:
        begun.append("it")
        yield "it"

    leaver, behind = line.join(begin), line.join(say("a"))
    steps = leaver.follow()
    assert next(steps) == 1
    assert line.count_before(behind) == 2
    steps.close()
    assert line.count_before(behind) == 1
    gate.is_open.set()
    assert hear(behind) == ["a"]
    assert begun == []


def test_leaving_while_the_job_runs(line: Line) -> None:
    """It ends after its present step, and lets go of what it holds."""
    gate = Gate()
    steps = line.join(gate.work).follow()
    while next(steps) != "working":
        pass
    behind = line.join(say("a"))
    steps.close()
    assert hear(behind) == ["a"]
    assert gate.has_ended.is_set()
    assert not gate.is_open.is_set()


@pytest.mark.parametrize("error", [ValueError("a reason"), RuntimeError("b"), KeyError("c"), MemoryError()])
def test_errors_reach_the_one_whose_job_it_is(line: Line, error: Exception) -> None:
    def fail() -> Generator[str, None, None]:
        yield "well"
        raise error

    failing, behind = line.join(fail), line.join(say("a"))
    with pytest.raises(type(error)) as caught:
        hear(failing)
    assert caught.value is error
    assert hear(behind) == ["a"]


def test_a_job_that_cannot_begin(line: Line) -> None:
    def fail() -> Generator[str, None, None]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        hear(line.join(fail))
    assert hear(line.join(say("a"))) == ["a"]


def test_what_a_job_held_is_let_go(line: Line) -> None:
    class Picture:
        pass

    def look(picture: Picture) -> Generator[str, None, None]:
        yield type(picture).__name__

    picture = Picture()
    kept = weakref.ref(picture)
    assert hear(line.join(functools.partial(look, picture))) == ["Picture"]
    del picture
    wait_until(lambda: not line.tickets)
    wait_until(lambda: gc.collect() >= 0 and kept() is None)


def test_fifty_threads() -> None:
    """Who come, wait, leave and fail at random: one job at a time, and everybody gets his own answer."""
    line = Line(max_waiting=20)
    busy = threading.Lock()
    collisions: list[int] = []

    def work(number: int, fails: bool) -> Generator[str, None, None]:
        if not busy.acquire(blocking=False):
            collisions.append(number)
        try:
            yield f"{number} begins"
            if fails:
                raise ValueError(number)
            yield f"{number} ends"
        finally:
            busy.release()

    def visit(number: int) -> str:
        dice = random.Random(number)
        fails, leaves = dice.random() < 0.2, dice.random() < 0.3
        while True:
            try:
                ticket = line.join(lambda: work(number, fails))
                break
            except LineFullError:
                time.sleep(dice.random() / 1000)
        if leaves:
            with contextlib.suppress(ValueError):
                next(ticket.follow(), None)
            return "left"
        if fails:
            with pytest.raises(ValueError, match=f"^{number}$"):
                hear(ticket)
            return "failed"
        assert hear(ticket)[-1] == f"{number} ends"
        return "answered"

    with ThreadPoolExecutor(50) as pool:
        outcomes = list(pool.map(visit, range(500), timeout=WAIT_S))
    assert collisions == []
    assert {outcomes.count(kind) > 50 for kind in ("left", "failed", "answered")} == {True}
    wait_until(lambda: not line.tickets)
    assert not busy.locked()
    assert hear(line.join(say("a"))) == ["a"]
