"""Requests for the Batch API, at half the price within a day: `python -m data.zh.batch export`, then `import`.

`export` writes the requests that are still open as files to upload; `import` takes the files of results and of
errors that come back, all or some of them, in any order. What expired, failed or was a bad reply can be exported
again (bad replies with --retry-failed). Import results before the next export: what is under way is not known here.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from data.zh.generate import NO_PRICES, GenerateSettings, bind_body, bound_cost, run, select, sum_costs
from data.zh.kinds import Prompts, load_prompts
from data.zh.ledger import Job, Ledger, Usage, make_jobs
from data.zh.options import add_options, from_arguments
from data.zh.prompt import encode_picture, make_custom_id, make_messages
from data.zh.record import read_records

MAX_LINES = 50_000  # of a file, as the Batch API has it
MAX_BYTES = 200_000_000
URL = "/v1/chat/completions"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.zh.batch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write files of requests to upload")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the files")
    bring = commands.add_parser("import", help="take files of results and of errors")
    bring.add_argument("files", nargs="+", metavar="FILE")
    for command in (export, bring):
        command.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the data set")
        add_options(command, GenerateSettings)
    arguments = parser.parse_args()
    try:
        settings = from_arguments(GenerateSettings, arguments)
        if arguments.command == "export":
            export_requests(settings, arguments.work, arguments.out)
        else:
            run(dataclasses.replace(settings, batch_results=tuple(arguments.files)), arguments.work)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same command starts again")


def export_requests(
    settings: GenerateSettings, work: Path, out: Path, max_lines: int = MAX_LINES, max_bytes: int = MAX_BYTES
) -> list[Path]:
    """Write the open requests as JSON lines; return the files.

    With `max_cost` there are as many as it can bear at the most that a request can cost.

    Raises: ValueError for a folder that holds requests already; ValueError or OSError as `read_records`.
    """
    if any(out.glob("requests-*.jsonl")):
        raise ValueError(f"{out} holds requests already: import their results, then export to another folder")
    records, prompts = read_records(work), load_prompts()
    jobs = select(make_jobs(records, prompts, settings.model, settings.kinds_per_picture), settings.max_pictures)
    bound = bound_cost(settings, prompts) * settings.batch_price_factor
    files: list[Path] = []
    num_requests = 0
    with Ledger(work) as ledger:
        pending = [job for job in select(jobs, settings.pilot) if ledger.is_open(job, settings.retry_failed)]
        num_open = len(pending)
        if settings.max_cost:
            num_affordable = int((settings.max_cost - sum_costs(ledger, settings)) / bound)
            pending = pending[: max(0, num_affordable)]
        out.mkdir(parents=True, exist_ok=True)
        for lines in split_lines(make_lines(pending, settings, prompts, ledger, work), max_lines, max_bytes):
            files.append(out / f"requests-{len(files) + 1:04d}.jsonl")
            files[-1].write_bytes(b"".join(lines))
            num_requests += len(lines)
            print(f"  {files[-1]}: {len(lines)} requests, {files[-1].stat().st_size:,} bytes")
    costs = f"together they cost {num_requests * bound:.4f} at most" if bound else NO_PRICES
    print(f"{num_requests} of {num_open} open requests; {costs}")
    if len(pending) < num_open:
        print(f"--max-cost {settings.max_cost:g} keeps {num_open - len(pending)} back")
    return files


def make_lines(
    jobs: list[Job], settings: GenerateSettings, prompts: Prompts, ledger: Ledger, work: Path
) -> Iterator[bytes]:
    """Yield each request's line; a picture that cannot be read is noted as a failure."""
    make = bind_body(settings)
    for job in jobs:
        try:
            image = encode_picture(work / job.record.image)
        except (ValueError, OSError) as error:
            ledger.add_failure(job.key, "picture", str(error), Usage())
            continue
        body = make(make_messages(job.record, prompts.kinds[job.kind], prompts, image, settings.detail))
        line = {"custom_id": make_custom_id(job.key), "method": "POST", "url": URL, "body": body}
        yield json.dumps(line, ensure_ascii=False).encode() + b"\n"


def split_lines(lines: Iterator[bytes], max_lines: int, max_bytes: int) -> Iterator[list[bytes]]:
    """Yield the lines of one file after another, of no more lines and bytes than a file may have."""
    held: list[bytes] = []
    num_bytes = 0
    for line in lines:
        if held and (len(held) == max_lines or num_bytes + len(line) > max_bytes):
            yield held
            held, num_bytes = [], 0
        held.append(line)
        num_bytes += len(line)
    if held:
        yield held


if __name__ == "__main__":
    main()
