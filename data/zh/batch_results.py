"""The results of a batch: lines in any order, of which some failed, expired, or belong to something else."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.zh.answer import is_filtered, read_answer
from data.zh.kinds import QUOTED_CHARACTERS, BadReplyError
from data.zh.ledger import Job, Ledger, Usage
from data.zh.prompt import make_custom_id


def import_results(
    files: list[Path], jobs: list[Job], ledger: Ledger, price_input: float, price_output: float
) -> dict[str, Any]:
    """Take what result and error files hold, each dialogue once, and return counts of their lines.

    The counts are of the files, whatever the ledger held before: importing again changes nothing.

    Raises: FileNotFoundError or ValueError naming file and line, and ValueError where no line is of these jobs.
    """
    by_name = {make_custom_id(job.key): job for job in jobs}
    counts: Counter[str] = Counter()
    unanswered: Counter[str] = Counter()
    good: set[str] = set()
    for file in files:
        for place, line in _read_lines(file):
            counts["lines"] += 1
            job = by_name.get(str(line.get("custom_id")))
            if job is None:
                counts["unknown"] += 1
            elif job.key in good:
                counts["duplicate"] += 1
            elif reason := _explain_missing(line):
                unanswered[reason] += 1
                _note_filtered(line, job, ledger, place)
            elif _take(line, job, ledger, price_input, price_output, place):
                good.add(job.key)
            else:
                counts["bad"] += 1
    if counts["lines"] and counts["unknown"] == counts["lines"]:
        raise ValueError(
            f"no line of {', '.join(map(str, files))} is about these pictures, prompts and model: give --model and "
            "--work as for the export"
        )
    counts["good"] = len(good)
    names = ("lines", "good", "bad", "duplicate", "unknown")
    return {"batch": {name: counts[name] for name in names} | {"no_answer": dict(sorted(unanswered.items()))}}


def _read_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not file.is_file():
        raise FileNotFoundError(f"batch results {file} are missing")
    with file.open("rb") as opened:
        for number, text in enumerate(opened, start=1):
            if text.strip():
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{file}, line {number} is not JSON: {error}; fetch the file again") from error
                if not isinstance(line, dict):
                    raise ValueError(f"{file}, line {number} is no JSON object: is it a file of batch results?")
                yield f"{file.name}:{number}", line


def _explain_missing(line: dict[str, Any]) -> str:
    """Return why a line holds no answer, "" where it holds one."""
    error, response = line.get("error"), line.get("response")
    if error:
        return str(error.get("code") or error.get("message") if isinstance(error, dict) else error)[:QUOTED_CHARACTERS]
    if not isinstance(response, dict):
        return "no response"
    return "" if response.get("status_code") == 200 else f"status {response.get('status_code')}"


def _note_filtered(line: dict[str, Any], job: Job, ledger: Ledger, place: str) -> None:
    """Note a request whose contents were refused: sending it again would not help."""
    message = json.dumps(line.get("error") or line.get("response"), ensure_ascii=False)[: 4 * QUOTED_CHARACTERS]
    response = line.get("response")
    status = response.get("status_code") if isinstance(response, dict) else 400
    if isinstance(status, int) and is_filtered(status, message):
        _fail(job, ledger, BadReplyError("filtered", message), Usage(), _name(line, place))


def _take(line: dict[str, Any], job: Job, ledger: Ledger, price_input: float, price_output: float, place: str) -> bool:
    """Tell whether a line holds a good reply; what the ledger does not have yet goes there, good or bad."""
    body = line["response"].get("body")
    try:
        answer = read_answer(body, price_input, price_output)
    except ValueError as error:
        _fail(job, ledger, BadReplyError("not_json", str(error)), Usage(), _name(line, place))
        return False
    usage = answer.usage or Usage()
    try:
        turns = answer.read_turns(job.kind)
    except BadReplyError as error:
        _fail(job, ledger, error, usage, answer.response or _name(line, place))
        return False
    if job.key not in ledger.written:
        ledger.add_reply(job, turns, usage, answer.model)
    return True


def _fail(job: Job, ledger: Ledger, error: BadReplyError, usage: Usage, name: str) -> None:
    if job.key not in ledger.written and (job.key, name) not in ledger.responses:
        ledger.add_failure(job.key, error.reason, error.detail, usage, name)


def _name(line: dict[str, Any], place: str) -> str:
    """Return what tells a line from another about the same dialogue."""
    return str(line.get("id") or place).encode(errors="replace").decode()
