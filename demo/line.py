"""One job at a time on a device, the others wait in line: first come, first served, and the line has an end."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator
from queue import Empty, Queue
from typing import Generic, TypeVar

T = TypeVar("T")
POLL_S = 0.2  # how soon one who waits hears of another place


Job = Callable[[], Generator[T, None, None]]


class LineFullError(RuntimeError):
    """So many wait that nobody else is let in."""


class Line:
    """A thread that does the jobs one after the other; whoever waits for one does it in another thread."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self.tickets: deque[Ticket] = deque()  # the first one's job is being done
        self.has_changed = threading.Condition()
        threading.Thread(target=self._work, name="line", daemon=True).start()

    def join(self, job: Job[T]) -> "Ticket[T]":
        """Stand in line with a job. Raises: LineFullError."""
        with self.has_changed:
            if len(self.tickets) > self.max_waiting:
                raise LineFullError(f"{self.max_waiting} requests are waiting already, which is the limit: try again")
            ticket = Ticket(self, job)
            self.tickets.append(ticket)
            self.has_changed.notify()
        return ticket

    def count_before(self, ticket: "Ticket") -> int:
        """Return how many jobs are to be done before this one, the running one included."""
        with self.has_changed:
            return self.tickets.index(ticket) if ticket in self.tickets else 0

    def forget(self, ticket: "Ticket") -> None:
        """Take one who waits out of the line."""
        with self.has_changed:
            if ticket in self.tickets and ticket is not self.tickets[0]:
                self.tickets.remove(ticket)

    def _work(self) -> None:
        while True:
            with self.has_changed:
                while not self.tickets:
                    self.has_changed.wait()
                ticket = self.tickets[0]
            if not ticket.has_left:
                ticket.work()
            with self.has_changed:
                self.tickets.popleft()
            del ticket  # and what its job holds


class Ticket(Generic[T]):
    """A place in line, and what comes of the job."""

    def __init__(self, line: Line, job: Job[T]) -> None:
        self.line, self.job = line, job
        self.results: Queue[T] = Queue(maxsize=1)
        self.outcome: Exception | None = None
        self.is_done, self.has_left = threading.Event(), False

    def follow(self) -> Generator[int | T, None, None]:
        """Yield what the job yields, and while there is nothing new, every POLL_S, how many jobs are before this one.

        Gradio closes the generator of a page that is gone where it yields, and closes no other one until then.

        A job yields what is known so far: of several results that came in between, only the last one is passed on.
        Whoever stops reading leaves the line. Raises: whatever the job raised.
        """
        try:
            while not (self.has_left or (self.is_done.is_set() and self.results.empty())):
                try:
                    yield self.results.get(timeout=POLL_S)
                except Empty:
                    yield self.line.count_before(self)
            outcome, self.outcome = self.outcome, None  # or it would hold what its frames hold, and they it
            if outcome is not None and not self.has_left:
                try:
                    raise outcome
                finally:
                    del outcome
        finally:
            self.leave()

    def leave(self) -> None:
        """Give the place up: nothing more is passed on, and a job that runs ends after its present step."""
        self.has_left = True
        self.line.forget(self)

    def work(self) -> None:
        """Do the job, in the line's thread, which is the only one that puts results."""
        try:
            with contextlib.closing(self.job()) as steps:
                for result in steps:
                    with contextlib.suppress(Empty):
                        self.results.get_nowait()
                    self.results.put(result)
                    if self.has_left:
                        break
        except Exception as error:  # of any kind: it is raised where somebody waits for the result
            self.outcome = error
        finally:
            self.is_done.set()
