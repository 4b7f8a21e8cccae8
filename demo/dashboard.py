"""The tab that shows a folder of runs: what there is, curves as they grow, scores, two runs beside each other."""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from demo.dashboard_compare import Comparer
from demo.dashboard_html import Writer, embed_page
from demo.dashboard_runs import MAX_TOGETHER, Drawn, Look, Shelf, Summary
from demo.dashboard_text import CSS, TEXTS
from demo.words import Words

__all__ = ["CSS", "TEXTS", "build_dashboard"]

TICK_S = 4
WINDOWS = (0, 1, 10, 50, 200)  # steps that are smoothed over; 0 chooses by the run's length
MAX_SEEN_CHARACTERS = 1000
# A tick asks the server only where somebody can see the answer.
LOOK_AGAIN = """() => {
  const shown = document.querySelector("#dashboard_runs");
  if (shown && shown.checkVisibility() && !document.hidden) document.querySelector("#dashboard_refresh").click();
}"""


@dataclass(frozen=True)
class Choice:
    """What somebody has chosen to see, as the browser sent it."""

    picked: list[str]
    window: int
    is_log: bool
    task: str | None
    first: str | None
    second: str | None


class Dashboard:
    """What the tab's events do; all that it keeps is shared by everybody who looks."""

    def __init__(self, runs: Path, words: Words) -> None:
        self.shelf, self.comparer = Shelf(runs), Comparer(runs)
        self.folder, self.words = runs.resolve().name, words

    def refresh(self, choice: Choice, seen: str | None, request: gr.Request | None, is_patient: bool) -> list[Any]:
        """Return updates of: table, picked runs, curves, scores, task, its details, A, B, and what has been seen.

        Args:
            seen: the last of these, as it was sent before; what is the same is not sent again. Empty at first.
            is_patient: wait for pictures that others are drawn before; else they come with a later tick.
        """
        runs, writer = self.shelf.list_runs(), Writer(self.words, request)
        old = read_seen(seen)
        now = settle(choice, runs, is_first=old.get("runs") in (None, mark([])))
        is_english = writer.language == "zh" and not self.shelf.has_chinese_font
        look = Look("en" if is_english else writer.language, now.window or None, now.is_log)
        drawn = self.draw([runs[name] for name in now.picked], look, is_patient)
        notes = [writer.say("no_font")] if is_english else []

        scored = [run for run in runs.values() if run.scores]
        tasks = sorted({task for run in scored for task in run.scores})
        answered = [run for run in scored if now.task in run.scores]
        shown = [run for run in answered if run.name in now.picked] or answered[:MAX_TOGETHER]
        pages = {
            "table": writer.list_runs(list(runs.values()), self.folder, self.shelf.num_hidden),
            "scores": writer.list_scores(scored),
            "details": writer.show_task(now.task, shown) if now.task else "",
        }
        new = {part: mark(page) for part, page in pages.items()}
        new |= {"runs": mark(list(runs)), "scored": mark([run.name for run in scored]), "tasks": mark(tasks)}
        new["curves"] = mark(now.picked, look, notes, [one and (one.number, one.names) for one in drawn])
        is_new = {part: old.get(part) != found for part, found in new.items()}
        if is_new["curves"]:
            pages["curves"] = writer.show_curves(now.picked, drawn, notes)
        table, curves, scores, details = (
            pages[part] if is_new[part] else gr.skip() for part in ("table", "curves", "scores", "details")
        )
        names = [run.name for run in scored]
        return [
            table,
            offer(list(runs), now.picked, choice.picked, is_new["runs"]),
            curves,
            scores,
            offer(tasks, now.task, choice.task, is_new["tasks"]),
            details,
            offer(names, now.first, choice.first, is_new["scored"]),
            offer(names, now.second, choice.second, is_new["scored"]),
            json.dumps(new) if any(is_new.values()) else gr.skip(),
        ]

    def draw(self, picked: Sequence[Summary], look: Look, is_patient: bool) -> list[Drawn | None]:
        """Return the pictures of runs, first those that show several."""
        together = [self.shelf.draw(picked, look, is_patient)] if len(picked) > 1 else []
        return [*together, *(self.shelf.draw([run], look, is_patient) for run in picked)]

    def compare(self, first: str | None, second: str | None, request: gr.Request | None) -> str:
        """Return the comparison of two runs as a frame, or what is wrong."""
        runs, writer = self.shelf.list_runs(), Writer(self.words, request)
        chosen = [runs[name] for name in (first, second) if isinstance(name, str) and name in runs]
        if first == second or len(chosen) < 2 or not all(run.scores for run in chosen):
            return f'<p class="dashboard-problem">{writer.say("compare_two")}</p>'
        try:
            page = self.comparer.compare(chosen[0], chosen[1], writer.language)
        except (ValueError, OSError) as error:
            return f'<p class="dashboard-problem">{writer.say("compare_failed", problem=error)}</p>'
        return embed_page(page, writer.say("compare_page", first=first, second=second))


def settle(choice: Choice, runs: dict[str, Summary], is_first: bool) -> Choice:
    """Return a choice among what there is.

    Args:
        is_first: nothing has been shown yet: what is most likely wanted is chosen, a run that trains now or the newest,
            and the newest scores beside the ones before.
    """
    scored = [name for name, run in runs.items() if run.scores]
    tasks = sorted({task for run in runs.values() for task in run.scores})
    known = [name for name in choice.picked if isinstance(name, str) and name in runs]
    picked = list(dict.fromkeys(known))[:MAX_TOGETHER]
    first, second = (name if name in scored else None for name in (choice.first, choice.second))
    if is_first and not picked:
        trained = [run for run in runs.values() if run.step is not None]
        picked = [run.name for run in sorted(trained, key=lambda run: run.state != "training")[:1]]
    if is_first and first is None and second is None:
        second, first = (*scored, None, None)[:2]
    return Choice(
        picked=picked,
        window=choice.window if choice.window in WINDOWS else 0,
        is_log=bool(choice.is_log),
        task=choice.task if choice.task in tasks else next(iter(tasks), None),
        first=first,
        second=second,
    )


def offer(choices: Sequence[str], value: Any, chosen: Any, is_new: bool) -> Any:
    """Return an update of a list to choose from; what somebody chose is left alone unless it is no longer there."""
    if value != chosen:
        return gr.update(choices=choices, value=value, visible=bool(choices))
    return gr.update(choices=choices, visible=bool(choices)) if is_new else gr.skip()


def read_seen(seen: str | None) -> dict[str, Any]:
    """Return what a browser says that it has seen; nothing where it says nonsense."""
    try:
        found = json.loads(seen) if isinstance(seen, str) and 0 < len(seen) <= MAX_SEEN_CHARACTERS else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def mark(*values: object) -> str:
    """Return a short name for values, another one for others."""
    return hashlib.sha256(repr(values).encode("utf-8", "backslashreplace")).hexdigest()[:12]


def build_dashboard(runs: Path, words: Words, tab: gr.Tab) -> None:
    """Build what is in the tab.

    Args:
        runs: the folder of runs; it may be empty or missing yet.
        tab: the tab that this is called in; its select event shows at once what is new.
    """
    board = Dashboard(runs, words)
    table = gr.HTML(elem_id="dashboard_runs")
    # Names are checked when they are used. Gradio would check them against what it remembers of each visitor.
    choose = functools.partial(gr.Dropdown, [], value=None, allow_custom_value=True)
    picked = choose(multiselect=True, max_choices=MAX_TOGETHER, label=words.label("dashboard_pick"))
    with gr.Tabs():
        with gr.Tab(words.label("dashboard_curves")):
            with gr.Row():
                choices = [(words.label("dashboard_window_auto"), 0), *((str(steps), steps) for steps in WINDOWS[1:])]
                window = gr.Radio(choices, value=0, label=words.label("dashboard_window"))
                axes = [(words.label("dashboard_log"), True), (words.label("dashboard_linear"), False)]
                is_log = gr.Radio(axes, value=True, label=words.label("dashboard_axis"))
            curves = gr.HTML()
        with gr.Tab(words.label("dashboard_evaluation")):
            scores = gr.HTML()
            task = choose(label=words.label("dashboard_task"), visible=False)
            details = gr.HTML()
        with gr.Tab(words.label("dashboard_compare")):
            gr.Markdown(words.label("dashboard_compare_note"))
            with gr.Row():
                first = choose(label=words.label("dashboard_first"))
                second = choose(label=words.label("dashboard_second"))
            go = gr.Button(words.label("dashboard_go"), variant="primary")
            page = gr.HTML()
    seen = gr.Textbox("", visible=False)
    again = gr.Button("", elem_id="dashboard_refresh")

    inputs = [picked, window, is_log, task, first, second, seen]
    outputs = [table, picked, curves, scores, task, details, first, second, seen]

    def read_choice(values: Sequence[Any]) -> Choice:
        picked, *others = values
        return Choice(picked if isinstance(picked, list) else [], *others)

    def look(request: gr.Request, *values: Any) -> list[Any]:
        return board.refresh(read_choice(values[:-1]), values[-1], request, is_patient=True)

    def look_again(request: gr.Request, *values: Any) -> list[Any]:
        return board.refresh(read_choice(values[:-1]), values[-1], request, is_patient=False)

    def compare(request: gr.Request, *names: str | None) -> str:
        return board.compare(names[0], names[1], request)

    # Who chooses something waits in a line for the pictures. A tick waits for nothing, so that it needs no line, and
    # a hundred open pages take no place in that of the questions.
    gr.on(
        [tab.select, picked.input, window.input, is_log.input, task.input], look, inputs, outputs,
        show_progress="hidden", trigger_mode="always_last", concurrency_limit=1, api_visibility="private",
    )  # fmt: skip
    again.click(
        look_again, inputs, outputs, show_progress="hidden", trigger_mode="once", queue=False, api_visibility="private"
    )
    gr.Timer(TICK_S).tick(None, js=LOOK_AGAIN, api_visibility="private")
    go.click(compare, [first, second], page, concurrency_limit=1, api_visibility="private")
