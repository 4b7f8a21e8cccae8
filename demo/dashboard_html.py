"""The dashboard's tables and pictures as HTML; whatever comes from files is escaped."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from data.names import translate
from data.run_words import RUN_WORDS, show_count, show_interval, show_score, show_time
from demo.dashboard_runs import Drawn, Summary
from demo.words import Words

# The page in the frame becomes light or dark as this one is, which is not always what the system prefers.
ON_LOAD = (
    "if (!this.dataset.matched) { this.dataset.matched = 1; this.srcdoc = this.srcdoc.replace("
    "'prefers-color-scheme: dark', document.body.classList.contains('dark') ? 'min-width: 0' : 'max-width: 0'); "
    "this.scrollIntoView({behavior: 'smooth'}) }"
)
PARTS = ("vision", "language", "projector", "lora", "full")  # what a stage may train
MAX_NAMES = 60  # of a breakdown; more are in scores.json
TRAIN_COMMAND = "torchrun --nproc_per_node=2 train/main.py"
SCORE_COMMAND = "python eval/main.py --task easy_vqa --model-path runs/tiny/final"
# The picture is in the page once; a link to it would hold it a second time.
SAVE = (
    "const a = document.createElement('a'); a.href = this.closest('figure').querySelector('img').src; "
    "a.download = this.dataset.name; a.click()"
)


def escape(value: object) -> str:
    """Return HTML that shows a text literally, in attributes too."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(value))
    return _keep(html.escape(text))


def _keep(escaped: str) -> str:
    """Keep Gradio's templates, which know ${...} and {{...}}, from reading escaped text as theirs."""
    return escaped.replace("$", "&#36;").replace("{", "&#123;")


class Writer:
    """What the page says to whoever sent `request`."""

    def __init__(self, words: Words, request: gr.Request | None) -> None:
        self.words, self.request = words, request
        self.language = words.choose(request)

    def say(self, key: str, **values: object) -> str:
        """Return a text in which `values` are escaped."""
        escaped = {name: escape(value) for name, value in values.items()}
        return self.words.say(f"dashboard_{key}", self.request, **escaped)

    def make_command(self, key: str, command: str, **values: object) -> str:
        return f'<p>{_mark_code(self.say(key, **values))}</p><pre class="dashboard-command">{escape(command)}</pre>'

    def list_runs(self, runs: Sequence[Summary], folder: str, num_hidden: int) -> str:
        """Return the table of all runs, or how to make the first one."""
        if not runs:
            return self.make_command("empty", TRAIN_COMMAND, folder=folder)
        keys = ("run", "train", "steps", "loss", "held_out", "speed", "time", "scores")
        header = [self.say(key) for key in keys]
        rows = [self._describe(run) for run in runs]
        intro = f"<p>{_mark_code(self.say('intro', folder=folder))}</p>"
        hidden = f'<p class="dashboard-faint">{self.say("hidden", count=num_hidden)}</p>' if num_hidden else ""
        return intro + make_table(header, rows, text=(1, 7)) + hidden

    def _describe(self, run: Summary) -> list[str]:
        state = f'<span class="dashboard-state {run.state}">{self.say(run.state)}</span>'
        problems = "".join(f'<div class="dashboard-problem">{escape(problem)}</div>' for problem in run.problems)
        steps = show_count(run.step) or ""
        if run.num_steps is not None:
            steps += f" / {run.num_steps:,}"
        time = "" if run.step_s is None or run.step is None else self.show_time(run.step_s * run.step)
        if run.state == "training" and run.step_s and run.num_steps and run.step and run.num_steps > run.step:
            left = self.say("left", time=self.show_time(run.step_s * (run.num_steps - run.step)))
            time += f"<br><small>{left}</small>"
        scores = [f"{escape(task)} {self._show_score(one)}" for task, one in run.scores.items()]
        return [
            f"<b>{escape(run.name)}</b><br>{state}{problems}",
            self._name_train(run),
            steps,
            "" if run.loss is None else f"{run.loss:.4f}",
            "" if run.held_out_loss is None else f"{run.held_out_loss:.4f}",
            show_count(run.tokens_per_s) or "",
            time,
            "<br>".join(scores),
        ]

    def _name_train(self, run: Summary) -> str:
        if run.train not in PARTS:
            return "" if run.train is None else escape(run.train)
        return self.say(run.train, rank=run.lora_rank)

    def show_time(self, seconds: float) -> str:
        return str(show_time(seconds, RUN_WORDS[self.language]))

    def _show_score(self, scores: Mapping[str, Any]) -> str:
        return show_score(scores.get("score"), scores.get("best", 1.0)) or self.say("unscored")

    def show_curves(self, names: Sequence[str], drawn: Sequence[Drawn | None], notes: Sequence[str]) -> str:
        """Return the pictures, those of several runs in one first; what is not drawn yet is None."""
        if not names:
            return f'<p class="dashboard-faint">{self.say("no_pick")}</p>'
        blocks = [f'<p class="dashboard-faint">{note}</p>' for note in notes]
        busy = f'<p class="dashboard-faint">{self.say("busy")}</p>'
        blocks += [self._show_drawn(one) if one else busy for one in drawn]
        return f'<div class="dashboard-curves">{"".join(blocks)}</div>'

    def _show_drawn(self, drawn: Drawn) -> str:
        names = ", ".join(drawn.names)
        if drawn.problem:
            told = self.say("broken", name=names, problem=drawn.problem)
            return f'<p class="dashboard-problem">{told}</p>'
        if len(drawn.names) > 1:
            shown = [
                self._show_picture(picture, self.say("together", names=names), f"loss-{'-'.join(drawn.names)}", "wide")
                for picture in drawn.pictures.values()
            ]
            return "".join(shown)
        if not drawn.pictures:
            return f'<p class="dashboard-faint">{self.say("no_curves", name=names)}</p>'
        figures = [
            self._show_picture(picture, escape(RUN_WORDS[self.language][f"{kind} chart"]), f"{names}-{kind}")
            for kind, picture in drawn.pictures.items()
        ]
        return f'<h3>{escape(names)}</h3><div class="dashboard-grid">{"".join(figures)}</div>'

    def _show_picture(self, picture: str, title: str, name: str, kind: str = "") -> str:
        save = f'<button type="button" data-name="{escape(name)}.png" onclick="{SAVE}">{self.say("save")}</button>'
        return (
            f'<figure class="dashboard-chart {kind}"><div class="picture"><img src="{picture}" alt="{title}"></div>'
            f"<figcaption><span>{title}</span>{save}</figcaption></figure>"
        )

    def list_scores(self, runs: Sequence[Summary]) -> str:
        """Return the table of the headlines of runs with scores, tasks beside each other."""
        if not runs:
            return self.make_command("no_scores", SCORE_COMMAND)
        tasks = sorted({task for run in runs for task in run.scores})
        rows = [[f"<b>{escape(run.name)}</b>", *(self._show_cell(run.scores.get(task)) for task in tasks)]
                for run in runs]  # fmt: skip
        header = [self.say("run"), *map(escape, tasks)]
        return make_table(header, rows) + f'<p class="dashboard-faint">{self.say("interval_note")}</p>'

    def _show_cell(self, scores: Mapping[str, Any] | None) -> str:
        if scores is None:
            return ""
        interval = show_interval(scores.get("interval"), scores.get("best", 1.0), RUN_WORDS[self.language])
        small = " · ".join(filter(None, [interval, f"n {show_count(scores.get('n'))}"]))
        return f"{self._show_score(scores)}<br><small>{small}</small>"

    def show_task(self, task: str, runs: Sequence[Summary]) -> str:
        """Return one task's scores by its breakdowns, runs beside each other, and bars that need no model."""
        results = {run.name: run.scores[task] for run in runs if task in run.scores}
        if not results:
            return ""
        scores = list(results.values())
        rows: list[list[str]] = [[self.say("headline"), *map(self._show_cell, scores)]]
        breakdowns = dict.fromkeys(name for one in scores for name in one.get("parts", {}))
        for breakdown in breakdowns:
            parts = [one.get("parts", {}).get(breakdown, {}) for one in scores]
            rows += self._list_group(self._translate(breakdown), parts)
        rows += self._list_group(self.say("bars"), [one.get("bars") or {} for one in scores])
        return make_table([escape(task), *map(escape, results)], rows)

    def _list_group(self, title: str, parts: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        names = list(dict.fromkeys(name for of_run in parts for name in of_run))
        if not names or names == ["all"]:  # the headline once more
            return []
        rows = [[title]]
        rows += [[self._translate(name), *(self._show_cell(one.get(name)) for one in parts)]
                 for name in names[:MAX_NAMES]]  # fmt: skip
        if len(names) > MAX_NAMES:
            rows.append([self.say("too_many", count=len(names) - MAX_NAMES)])
        return rows

    def _translate(self, name: str) -> str:
        return escape(translate(name, self.language))


def make_table(header: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = ()) -> str:
    """Return a table of cells that are HTML already, which scrolls inside itself; a row of one cell is a heading.

    Args:
        text: numbers of the columns that are text, beside the first.
    """

    def make_row(tag: str, cells: Sequence[str]) -> str:
        marked = (' class="text"' if number in text else "" for number in range(len(cells)))
        return "".join(f"<{tag}{mark}>{cell}</{tag}>" for mark, cell in zip(marked, cells, strict=True))

    lines = [
        f"<tr>{make_row('td', row)}</tr>"
        if len(row) > 1 or len(header) == 1
        else f'<tr class="group"><td colspan="{len(header)}">{row[0]}</td></tr>'
        for row in rows
    ]
    head = f"<thead><tr>{make_row('th', header)}</tr></thead>"
    return f'<div class="dashboard-scroll"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'


def embed_page(page: str, title: str) -> str:
    """Return a whole page as a frame in which no script runs and which can reach nothing."""
    source = _keep(html.escape(page))
    frame = f'<iframe class="dashboard-page" sandbox="" title="{title}" onload="{_keep(ON_LOAD)}"'
    return f'{frame} srcdoc="{source}"></iframe>'


def _mark_code(text: str) -> str:
    """Return escaped text with `this` as code."""
    parts = text.split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))
