"""Write the report on some runs: `python eval/report.py runs/tiny runs/tiny-zh --out report/`.

Runs are given in the order of the story: the base first, the tuned one last. What was trained on what, curves, scores,
answers that changed, the machine, how to reproduce it, and a few lines for a CV; all of it read from the runs' files,
and what is not recorded there is left out. Writes `report.md` (pictures beside it), `report.html` (one file, pictures
inside), `report.pdf` where Chromium is installed, and `cv.md`.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from data.names import translate  # noqa: E402
from data.run_words import show_count, show_interval, show_score  # noqa: E402
from data.runs import CONFIG  # noqa: E402
from eval.answers import Result  # noqa: E402
from eval.compare import describe_comparison, open_pictures, show_changes  # noqa: E402
from eval.comparison import Comparison, compare_results  # noqa: E402
from eval.page import escape, make_table, print_pdf, to_html  # noqa: E402
from eval.report_charts import draw_charts  # noqa: E402
from eval.report_cv import write_cv  # noqa: E402
from eval.report_facts import TRAINING, describe_change, describe_training, name_metric  # noqa: E402
from eval.report_runs import AnsweredRun, find_base, open_runs  # noqa: E402
from eval.report_text import LANGUAGES, WORDS, fill, join_names  # noqa: E402

Words = Mapping[str, str]
MAX_NAMES = 20  # of a breakdown; more are in scores.json
NUM_EXAMPLES = 6  # of changed answers, each way
ENVIRONMENT = ("started", "device", "world_size", "threads", "torch", "python", "commit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, the base first and the tuned one last")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="of the report; the CV is in both")
    parser.add_argument("--data", type=Path, help="where the benchmarks' files are, to show their pictures, if moved")
    arguments = parser.parse_args()
    try:
        is_printed = write_report(arguments.runs, arguments.out, arguments.language, arguments.data)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {', '.join(str(arguments.out / name) for name in ('report.md', 'report.html', 'cv.md'))}")
    if is_printed:
        print(f"wrote {arguments.out / 'report.pdf'}")
    else:
        print("no report.pdf: it takes Chromium or Chrome to print one (apt install chromium fonts-noto-cjk)")


def write_report(folders: Sequence[Path], out: Path, language: str = "en", data: Path | None = None) -> bool:
    """Write the report into a folder; tell whether there was a browser to print it.

    Raises: FileNotFoundError or ValueError for runs that are not whole, or that cannot be compared; OSError.
    """
    if language not in WORDS:
        raise ValueError(f"language {language!r}, expected one of {', '.join(WORDS)}")
    runs, words = open_runs(folders), WORDS[language]
    comparisons = compare_runs(runs)
    out.mkdir(parents=True, exist_ok=True)
    title = words["title"].format(names=join_names([run.name for run in runs], words))
    cv = write_cv(runs)
    sections = {
        "training": show_training(runs, words),
        "curves": show_curves(runs, out, words),
        "evaluation": show_evaluation(runs, words),
        "compared": show_comparisons(comparisons, runs, language),
        "examples": show_examples(comparisons, out, data, language),
        "environment": show_environment(runs, words),
        "reproduce": show_commands(runs, words),
        "configuration": show_configuration(runs, words),
        "cv": f"{cv}\n{words['cv note']}",
    }
    blocks = [f"# {escape(title)}", summarize(runs, words)]
    blocks += [f"## {words[name]}\n\n{section}" for name, section in sections.items() if section]
    markdown = "\n\n".join(blocks) + "\n"
    (out / "cv.md").write_text(cv, encoding="utf-8")
    (out / "report.md").write_text(markdown, encoding="utf-8")
    (out / "report.html").write_text(to_html(markdown, out, title, language), encoding="utf-8")
    return print_pdf(out / "report.html", out / "report.pdf")


def compare_runs(runs: Sequence[AnsweredRun]) -> dict[str, Comparison]:
    """Put the last run beside the first in every task that both answered and that can be scored here."""
    first, last = runs[0].results, runs[-1].results
    shared = [name for name in last if name in first and len(runs) > 1]
    return {
        name: compare_results(first[name], last[name])
        for name in shared
        if first[name].scores.get("score") is not None and last[name].scores.get("score") is not None
    }


def summarize(runs: Sequence[AnsweredRun], words: Words) -> str:
    """Return a paragraph: what the last run is, and its scores."""
    last = runs[-1]
    sentences = [fill(words["summary trained"], describe_training(last, words))] if last.config else []
    changes = [change for name in last.results if (change := describe_change(name, runs, words)) is not None]
    sentences += [fill(words["summary change"], change) or fill(words["summary score"], change) for change in changes]
    return words["space"].join(filter(None, sentences))


def show_training(runs: Sequence[AnsweredRun], words: Words) -> str:
    """Return the table of what was trained on what; rows that no run knows are left out."""
    trained = [run for run in runs if run.config]
    blocks = []
    if trained:
        facts = [describe_training(run, words) for run in trained]
        rows = [[words[key], *(one[key] or "" for one in facts)] for key in TRAINING if any(one[key] for one in facts)]
        blocks.append(make_table([words["run"], *(escape(run.name) for run in trained)], rows))
    if others := [escape(run.name) for run in runs if not run.config]:
        blocks.append(words["not trained here"].format(names=join_names(others, words)))
    return "\n".join(blocks)


def show_curves(runs: Sequence[AnsweredRun], out: Path, words: Words) -> str:
    charts = draw_charts([run for run in runs if run.rows], out, words)
    return "\n\n".join(f"### {words[f'{kind} chart']}\n\n{chart}" for kind, chart in charts.items())


def show_evaluation(runs: Sequence[AnsweredRun], words: Words) -> str:
    """Return every task's scores, and under them all that decided them."""
    tasks = list(dict.fromkeys(name for run in runs for name in run.results))
    blocks = [show_task(task, {run.name: run.results[task] for run in runs if task in run.results}, words)
              for task in tasks]  # fmt: skip
    return "\n\n".join([*blocks, words["intervals"]]) if blocks else words["no results"]


def show_task(task: str, results: Mapping[str, Result], words: Words) -> str:
    """Return one task's tables: the headline of each run and bar, each breakdown, and the small print."""
    scored = {name: result for name, result in results.items() if result.scores.get("score") is not None}
    blocks = [f"### {escape(task)}"]
    blocks += [words["no score"].format(name=escape(name)) for name in results if name not in scored]
    rows: dict[str, Mapping[str, Any]] = {}
    for name, result in scored.items():
        rows |= result.scores.get("bars") or {}
        rows[name] = result.scores
    if scored:
        metric = name_metric(next(iter(scored.values())), words)
        rows = {name: scores for name, scores in rows.items() if name not in scored} | {
            name: scores for name, scores in rows.items() if name in scored
        }
        cells = [
            [escape(translate(name, words["page language"])), *_show_scores(scores, words)]
            for name, scores in rows.items()
        ]
        blocks.append(make_table(["", words["n"], metric, words["interval"]], cells))
        breakdowns = dict.fromkeys(
            breakdown for result in scored.values() for breakdown in result.scores.get("parts", {})
        )
        blocks += [table for breakdown in breakdowns if (table := show_breakdown(breakdown, scored, words))]
    blocks.append(show_settings(results, words))
    return "\n\n".join(blocks)


def _show_scores(scores: Mapping[str, Any], words: Words) -> list[str]:
    best = scores.get("best", 1.0)
    cells = show_count(scores.get("n")), show_score(scores.get("score"), best)
    return [cell or "" for cell in (*cells, show_interval(scores.get("interval"), best, words))]


def show_breakdown(breakdown: str, results: Mapping[str, Result], words: Words) -> str | None:
    """Return a table of a breakdown's names; None for the headline alone, a line for too many names."""
    parts = {name: result.scores.get("parts", {}).get(breakdown, {}) for name, result in results.items()}
    names = list(dict.fromkeys(name for of_run in parts.values() for name in of_run))
    if len(names) == 1:
        return None
    title = escape(translate(breakdown, words["page language"]))
    if len(names) > MAX_NAMES:
        return words["too many"].format(breakdown=title, number=len(names))
    rows = []
    for name in names:
        found = [of_run.get(name) for of_run in parts.values()]
        counts = dict.fromkeys(show_count(part["n"]) for part in found if part)
        cells = [_show_part(part, words) for part in found]
        rows.append([escape(translate(name, words["page language"])), " / ".join(map(str, counts)), *cells])
    return make_table([title, words["n"], *map(escape, results)], rows)


def _show_part(part: Mapping[str, Any] | None, words: Words) -> str:
    if part is None:
        return ""
    best = part.get("best", 1.0)
    interval = show_interval(part.get("interval"), best, words)
    return f"{show_score(part['score'], best)}" + (f" <small>{interval}</small>" if interval else "")


def show_settings(results: Mapping[str, Result], words: Words) -> str:
    """Return the small print: the settings that all runs share, then each run's own."""
    settings = {name: flatten_settings(result) for name, result in results.items()}
    first = next(iter(settings.values()))
    shared = {key: value for key, value in first.items() if all(one.get(key) == value for one in settings.values())}
    lines = [f"{words['settings']}: {_join(shared)}"]
    for name, own in settings.items():
        differing = {key: value for key, value in own.items() if key not in shared}
        if differing:
            lines.append(f"{escape(name)}: {_join(differing)}")
    return "<br>\n".join(f"<small>{line}</small>" for line in lines)


def flatten_settings(result: Result) -> dict[str, str]:
    """Return settings as text; of several sessions' values each one once."""
    values: dict[str, list[Any]] = {key: [value] for key, value in result.settings.items() if key != "sessions"}
    for session in result.settings.get("sessions", []):
        for key in session:
            values.setdefault(key, []).append(session[key])
    values.pop("started", None)
    known = {key: [one for one in some if one is not None] for key, some in values.items()}
    return {key: ", ".join(dict.fromkeys(map(str, some))) for key, some in known.items() if some}


def _join(settings: Mapping[str, str]) -> str:
    return " · ".join(f"{escape(key)} {escape(value)}" for key, value in settings.items())


def show_comparisons(comparisons: Mapping[str, Comparison], runs: Sequence[AnsweredRun], language: str) -> str:
    blocks = [
        f"### {escape(name)}\n\n{describe_comparison(comparison, language)}" for name, comparison in comparisons.items()
    ]
    names = WORDS[language]["a and b"].format(first=escape(runs[0].name), second=escape(runs[-1].name))
    return "\n\n".join([names, *blocks]) if blocks else ""


def show_examples(comparisons: Mapping[str, Comparison], out: Path, data: Path | None, language: str) -> str:
    """Return answers that changed, with their pictures where the benchmark's files are here."""
    blocks = []
    for name, comparison in comparisons.items():
        task = open_pictures(name, comparison.first, data)
        blocks.append(f"### {escape(name)}\n\n{show_changes(comparison, task, out, language, NUM_EXAMPLES)}")
    return "\n\n".join(blocks)


def show_environment(runs: Sequence[AnsweredRun], words: Words) -> str:
    """Return what each training and each answering ran on, as far as it was recorded."""
    rows = [
        (words["training of"].format(name=escape(run.name)), session | {"world_size": session.get("ranks")})
        for run in runs
        for session in run.sessions
    ]
    rows += [
        (words["answers of"].format(task=escape(task), name=escape(run.name)), session)
        for run in runs
        for task, result in run.results.items()
        for session in result.settings.get("sessions", [])
    ]
    keys = [key for key in ENVIRONMENT if any(values.get(key) is not None for _, values in rows)]
    table = [[name, *(escape(str(values[key])) if values.get(key) is not None else "" for key in keys)]
             for name, values in rows]  # fmt: skip
    blocks = [make_table(["", *(words[key] for key in keys)], table)] if keys else []
    if silent := [escape(run.name) for run in runs if run.config and not run.sessions]:
        blocks.append(words["not recorded"].format(names=join_names(silent, words)))
    return "\n".join(blocks)


def show_commands(runs: Sequence[AnsweredRun], words: Words) -> str:
    """Return the commands that train and score again."""
    trained = [run for run in runs if run.config]
    lines = [write_training_command(run) for run in trained]
    lines += [write_scoring_command(result) for run in runs for result in run.results.values()]
    blocks = [words["commands"], "```bash\n" + "\n".join(dict.fromkeys(lines)) + "\n```"] if lines else []
    blocks += [
        words["previous stage"].format(name=escape(run.name))
        for run in trained
        if not run.find("command") and find_base(run) is None
    ]
    return "\n\n".join(blocks)


def write_training_command(run: AnsweredRun) -> str:
    """Return the line that was typed where it was recorded, else one that does the same."""
    parts = ["torchrun", f"--nproc_per_node={run.find('ranks') or run.num_ranks or 1}", "train/main.py"]
    if command := run.find("command"):
        return _one_line(shlex.join([*parts, *map(str, command[1:])]))
    base = [] if run.config.get("model") else [f"model={base}" for base in [find_base(run)] if base]
    return _one_line(shlex.join([*parts, str(run.folder / CONFIG), *base]))


def write_scoring_command(result: Result) -> str:
    settings = result.settings
    num_ranks = next((one["world_size"] for one in settings.get("sessions", []) if one.get("world_size", 1) > 1), 1)
    parts = ["python"] if num_ranks == 1 else ["torchrun", f"--nproc_per_node={num_ranks}"]
    parts += ["eval/main.py", "--task", settings["task"]]
    for key, option in (
        ("model", "--model-path"), ("model_base", "--model-base"), ("adapter", "--adapter"),
        ("vision_tower", "--vision-tower"), ("data", "--data"), ("image_folder", "--image-folder"), ("rule", "--rule"),
        ("template", "--conv-mode"), ("max_new_tokens", "--max-new-tokens"), ("dtype", "--dtype"), ("limit", "--limit"),
        ("seed", "--seed"),
    ):  # fmt: skip
        is_needed = key != "seed" or settings.get("limit") is not None
        if settings.get(key) is not None and is_needed:
            parts += [option, str(settings[key])]
    if settings.get("bits", 16) != 16:
        parts.append(f"--load-{settings['bits']}bit")
    return _one_line(shlex.join(parts))


def _one_line(command: str) -> str:
    """Return a command that cannot leave its line, whatever is in it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in command)


def show_configuration(runs: Sequence[AnsweredRun], words: Words) -> str:
    """Return all settings that say something, runs beside each other."""
    trained = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in trained for key in run.config)
    rows = [
        [escape(key), *(escape(_show_value(run.config.get(key))) for run in trained)]
        for key in keys
        if any(run.config.get(key) not in ("", None) for run in trained)
    ]
    return make_table([words["run"], *(escape(run.name) for run in trained)], rows) if trained else ""


def _show_value(value: Any) -> str:
    """Return a setting as it stands in config.toml."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
