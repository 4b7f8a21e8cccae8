"""What Gradio remembers of its visitors, kept small: strangers could fill memory with it, and the page needs little.

These are Gradio 6's own tables, reached by their private names; the test of 200 sessions says whether they still hold.
"""

import time
from types import SimpleNamespace
from typing import Any

import gradio as gr
import gradio.state_holder

MAX_SESSIONS = 1000  # the latest; of another one, a list to choose from has forgotten its choices
MAX_UNREAD, MAX_UNREAD_OF_ONE = 256, 16  # events whose results nobody has read yet
UNREAD_S = 45.0  # Gradio sends something every 15 s to who reads
GONE_S = 5.0  # after the end of a stream: the page opens the next one at once


class Session(gradio.state_holder.SessionState):
    """A session without what Gradio keeps for links to it: a copy of all components, and all that they have shown.

    This also saves 50 ms of its only thread at everybody's first event.
    """

    def __init__(self, blocks: gr.Blocks) -> None:
        super().__init__(SimpleNamespace(default_config=blocks.default_config, blocks=()))  # type: ignore[arg-type]

    def _update_value_in_config(self, key: int, value: Any) -> None:
        pass


def remember_little() -> None:
    """Have Gradio make such sessions from now on."""
    gradio.state_holder.SessionState = Session  # type: ignore[misc]


class BusyError(RuntimeError):
    """Too many events wait for somebody to read them."""


class Sessions:
    """Who still reads: what the others asked for is stopped, and what they left unread is dropped."""

    def __init__(self) -> None:
        self.ends: dict[str, float] = {}  # when a session has ended, unless it reads before

    def note_reading(self, session: str) -> None:
        self.ends[session] = time.monotonic() + UNREAD_S

    def note_end(self, session: str) -> None:
        self.ends[session] = time.monotonic() + GONE_S

    async def make_room(self, blocks: gr.Blocks, session: str) -> None:
        """Drop what nobody reads before another event comes. Raises: BusyError."""
        queue, now = blocks._queue, time.monotonic()
        unread = queue.pending_event_ids_session
        for name in [name for name in unread if self.ends.setdefault(name, now + UNREAD_S) < now]:
            await queue.clean_events(session_hash=name)
            unread.pop(name, None)
            queue.pending_messages_per_session.pop(name, None)
        self.ends = {name: end for name, end in self.ends.items() if name in unread}
        if len(unread.get(session, ())) >= MAX_UNREAD_OF_ONE or sum(map(len, unread.values())) >= MAX_UNREAD:
            raise BusyError("many requests are open already: try again in a moment")
        self.ends[session] = max(self.ends.get(session, 0.0), now + UNREAD_S)
