"""The process is killed again and again; what comes out, and what it cost, is as if it never was."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.journal import read_journal
from data.zh.generate import GenerateSettings, bind_body
from data.zh.kinds import load_prompts
from data.zh.ledger import make_jobs
from data.zh.prompt import encode_picture, make_messages
from data.zh.record import REPLIES, read_records, read_replies
from tests.conftest import ROOT
from tests.data.zh.openai_server import KEY, OpenAIServer, name_request
from tests.data.zh.work_folder import write_work

NUM_KILLS = 20
CONCURRENCY = 4
# Importing the client takes seconds, so that is done once: this process makes a copy of itself for each line it reads.
NURSERY = """
import os, sys, openai
import data.zh.generate, data.zh.writer
openai.AsyncOpenAI(api_key="x").chat.completions  # imports the rest
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        sys.argv = line.split()
        data.zh.generate.main()
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Processes that run the command."""

    def __init__(self, options: list[str], errors: Path) -> None:
        self.line = " ".join(["generate", *options]) + "\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            cwd=ROOT,
            env={"PATH": "", "OPENAI_API_KEY": KEY, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors.open("w"),
            text=True,
        )
        assert self.read() == "ready"

    def read(self) -> str:
        """Return the next line that is no table of the command's."""
        assert self.process.stdout is not None
        return next(line.strip() for line in self.process.stdout if not line.startswith(("generate:", "  ")))

    def start(self) -> int:
        """Start the command; return its process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(self.line)
        self.process.stdin.flush()
        return int(self.read())

    def wait(self) -> int:
        """Return how the command ended."""
        return int(self.read())


def stumble(number: int, attempt: int) -> str:
    """Some replies are bad, always the same; some are late to come."""
    if attempt == 0 and number % 23 == 0:
        return "429"
    return {0: "refusal", 1: "broken", 2: "not_applicable"}.get(number % 5, "")


@pytest.fixture
def nursery(work: Path, server: OpenAIServer, tmp_path: Path) -> Iterator[Nursery]:
    options = ["--work", str(work), "--model", "writer-1", "--base-url", server.base_url]
    nursery = Nursery([*options, "--concurrency", str(CONCURRENCY)], tmp_path / "errors.txt")
    yield nursery
    assert nursery.process.stdin is not None
    nursery.process.stdin.close()
    nursery.process.wait()


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(stumble, delay_s=0.02) as server:
        yield server


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_work(tmp_path / "work", num_pictures=100)
    (tmp_path / "work" / REPLIES).unlink()
    return tmp_path / "work"


def list_settled(work: Path) -> Counter[str]:
    rows = list(read_journal(work / "failed.jsonl"))
    assert all(row["key"] for row in rows)
    keys = [
        ":".join(row[name] for name in ("sha256", "kind", "prompt_version", "model"))
        for row in read_journal(work / REPLIES)
    ]
    return Counter(keys + [row["key"] for row in rows])


def name_first_requests(work: Path, settings: GenerateSettings) -> dict[str, str]:
    """Return the keys of the dialogues by their first requests."""
    prompts, make = load_prompts(), bind_body(settings)
    names = {}
    for job in make_jobs(read_records(work), prompts, settings.model, settings.kinds_per_picture):
        image = encode_picture(work / job.record.image)
        body = make(make_messages(job.record, prompts.kinds[job.kind], prompts, image, settings.detail))
        names[name_request(body)] = job.key
    return names


def test_killed_twenty_times(work: Path, server: OpenAIServer, nursery: Nursery, tmp_path: Path) -> None:
    """Twenty times at random moments: the same replies and failures as of a run that nobody disturbed; what was
    settled is never asked for again, and each kill loses the replies that were on their way, at most."""
    chance = random.Random(6)
    keys = name_first_requests(work, GenerateSettings(model="writer-1"))
    num_running = 0
    for _ in range(NUM_KILLS):
        settled, num_before = list_settled(work), len(server.bodies)
        child = nursery.start()
        deadline = time.monotonic() + 20
        while len(server.bodies) == num_before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.12))
        subprocess.run(["/bin/kill", "-9", str(child)], check=False)
        num_running += nursery.wait() == -signal.SIGKILL
        asked = {keys.get(name_request(body)) for body in server.bodies[num_before:]}
        assert not asked & set(settled)
    assert num_running >= NUM_KILLS - 1
    time.sleep(0.1)
    nursery.start()
    assert nursery.wait() == 0, (tmp_path / "errors.txt").read_text()
    num_paid, settled = server.num_paid, list_settled(work)
    assert set(settled) == set(keys.values())
    assert max(settled.values()) == 1
    disturbed = {reply.key: reply for reply in read_replies(work)}
    failed = sorted(row["key"] for row in read_journal(work / "failed.jsonl"))

    report = json.loads((work / "generate.report.json").read_text())
    for name in (REPLIES, "failed.jsonl", "generate.report.json"):
        (work / name).unlink()
    server.paid.clear()
    nursery.start()
    assert nursery.wait() == 0
    assert {reply.key: reply for reply in read_replies(work)} == disturbed
    assert sorted(row["key"] for row in read_journal(work / "failed.jsonl")) == failed
    assert json.loads((work / "generate.report.json").read_text()) == report
    assert len(failed) > 3
    # A dialogue on its way is one request, or two where the first reply was bad.
    assert server.num_paid < num_paid <= server.num_paid + 2 * CONCURRENCY * NUM_KILLS
