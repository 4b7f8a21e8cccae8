"""Requests as files for the Batch API, and whatever comes back."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from data.zh.batch import export_requests, main
from data.zh.generate import GenerateSettings, run
from data.zh.kinds import load_kinds
from data.zh.record import REPLIES, read_records, read_replies
from tests.data.zh.openai_server import GOOD, INPUT_TOKENS, OUTPUT_TOKENS, write_content
from tests.data.zh.work_folder import write_work

SETTINGS = GenerateSettings(model="writer-1", price_input=1.0, price_output=2.0)
COST = (INPUT_TOKENS + 2 * OUTPUT_TOKENS) / 1_000_000 / 2  # of a reply in a batch


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten pictures, and neither a key nor the client."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setitem(sys.modules, "openai", None)
    write_work(tmp_path / "work", num_pictures=10)
    (tmp_path / "work" / REPLIES).unlink()
    return tmp_path / "work"


def read_lines(files: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def answer(request: dict[str, Any], fault: str = "", number: int = 0) -> dict[str, Any]:
    """Return the result of a request, as the Batch API writes it."""
    line: dict[str, Any] = {"id": f"batch_req_{number}", "custom_id": request["custom_id"]}
    if fault == "expired":
        return {**line, "response": None, "error": {"code": "batch_expired", "message": "This request expired."}}
    if fault in ("500", "policy"):
        code = "content_policy_violation" if fault == "policy" else "server_error"
        body: dict[str, Any] = {"error": {"message": "no", "code": code}}
        return {**line, "response": {"status_code": 400 if fault == "policy" else 500, "body": body}, "error": None}
    content, finish_reason = write_content(request["body"], fault)
    body = {
        "id": f"chatcmpl-{number}",
        "model": "writer-1-2026-01-01",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": content}}],
        "usage": {"prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS},
    }
    if fault == "no_body":
        body = {"oh": "no"}
    return {**line, "response": {"status_code": 200, "body": body}, "error": None}


def write_lines(file: Path, lines: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(file)


def bring(work: Path, *files: str) -> dict[str, Any]:
    return run(GenerateSettings(model="writer-1", price_input=1.0, price_output=2.0, batch_results=files), work)


def test_there_and_back(work: Path, tmp_path: Path) -> None:
    """Files keep to their limits; results may come in any order, and again; they cost half."""
    files = export_requests(SETTINGS, work, tmp_path / "out", max_lines=7)
    assert [len(file.read_text().splitlines()) for file in files] == [7, 7, 7, 7, 2]
    files = export_requests(SETTINGS, work, tmp_path / "small", max_bytes=20_000)
    requests = read_lines(files)
    assert len({request["custom_id"] for request in requests}) == len(requests) == 30
    assert all(15_000 < file.stat().st_size <= 20_000 for file in files[:-1])
    assert {(request["method"], request["url"]) for request in requests} == {("POST", "/v1/chat/completions")}
    assert requests[0]["body"]["messages"][1]["content"][0]["image_url"]["url"].startswith(
        "data:image/jpeg;base64,/9j/"
    )
    results = [answer(request, number=number) for number, request in enumerate(requests)]
    random.Random(0).shuffle(results)
    results = [*results, results[3], {**results[5], "custom_id": "somebody-else"}]
    report = bring(work, write_lines(tmp_path / "results.jsonl", results))
    assert report["batch"] == {"lines": 32, "good": 30, "bad": 0, "duplicate": 1, "unknown": 1, "no_answer": {}}
    replies = read_replies(work)
    assert len({reply.key for reply in replies}) == len(replies) == 30
    assert all(reply.turns == tuple(GOOD[reply.kind]) for reply in replies)
    assert report["cost"] == pytest.approx(30 * COST)
    content = (work / REPLIES).read_bytes(), (work / "generate.report.json").read_bytes()
    assert bring(work, str(tmp_path / "results.jsonl")) == report
    assert ((work / REPLIES).read_bytes(), (work / "generate.report.json").read_bytes()) == content
    assert export_requests(SETTINGS, work, tmp_path / "again") == []


def test_results_with_gaps(work: Path, tmp_path: Path) -> None:
    """What expired or failed is exported again, bad replies when they are asked for; nothing is counted twice."""
    requests = read_lines(export_requests(SETTINGS, work, tmp_path / "out"))
    faults = ["", "expired", "500", "refusal", "broken", "policy", "english", "no_body", "fenced", "not_applicable"]
    results = [answer(request, faults[number % 10], number) for number, request in enumerate(requests)]
    good = write_lines(tmp_path / "results.jsonl", [line for line in results if line["response"]])
    expired = write_lines(tmp_path / "errors.jsonl", [line for line in results if not line["response"]])
    report = bring(work, good, expired)
    assert report["batch"]["no_answer"] == {"batch_expired": 3, "status 400": 3, "status 500": 3}
    assert report["batch"]["bad"] == 12
    assert report["failed"] == {"filtered": 3, "not_chinese": 3, "not_json": 6, "refusal": 3}
    assert sum(report["written"].values()) == 6
    assert sum(report["not_applicable"].values()) == 3
    assert report["cost"] == pytest.approx(18 * COST)
    assert bring(work, expired, good) == report
    assert len(read_lines(export_requests(SETTINGS, work, tmp_path / "open"))) == 6
    again = GenerateSettings(model="writer-1", price_input=1.0, price_output=2.0, retry_failed=True)
    requests = read_lines(export_requests(again, work, tmp_path / "failed"))
    assert len(requests) == 21
    results = [
        answer(request, "refusal" if number == 0 else "", 100 + number) for number, request in enumerate(requests)
    ]
    report = bring(work, write_lines(tmp_path / "more.jsonl", results))
    assert sum(report["failed"].values()) == 1
    assert sum(report["written"].values()) == 26
    assert report["cost"] == pytest.approx((18 + 21) * COST)
    assert bring(work, good, expired, str(tmp_path / "more.jsonl"))["cost"] == report["cost"]


def test_any_kind_of_a_known_picture(work: Path, tmp_path: Path) -> None:
    """Results may be of kinds that were not drawn: all of them are taken."""
    every = GenerateSettings(model="writer-1", kinds_per_picture=7)
    requests = read_lines(export_requests(every, work, tmp_path / "out"))
    assert len(requests) == 7 * len(read_records(work))
    report = bring(work, write_lines(tmp_path / "results.jsonl", [answer(request) for request in requests]))
    assert report["written"] == dict.fromkeys(sorted(load_kinds()), 10)


def test_max_cost_keeps_requests_back(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = GenerateSettings(model="writer-1", price_input=1.0, price_output=2.0, max_cost=0.1)
    requests = read_lines(export_requests(settings, work, tmp_path / "out"))
    assert len(requests) == 11
    assert "--max-cost 0.1 keeps 19 back" in capsys.readouterr().out


def test_files_that_are_none(work: Path, tmp_path: Path) -> None:
    """Each is named, with the line."""
    with pytest.raises(FileNotFoundError, match=r"batch results .*none\.jsonl are missing"):
        bring(work, str(tmp_path / "none.jsonl"))
    (tmp_path / "torn.jsonl").write_text('{"custom_id": "a"}\n{"custom')
    with pytest.raises(ValueError, match=r"torn\.jsonl, line 2 is not JSON: .*fetch the file again"):
        bring(work, str(tmp_path / "torn.jsonl"))
    (tmp_path / "list.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match=r"list\.jsonl, line 1 is no JSON object"):
        bring(work, str(tmp_path / "list.jsonl"))
    foreign = write_lines(tmp_path / "foreign.jsonl", [{"custom_id": "a", "response": None, "error": None}])
    with pytest.raises(ValueError, match=r"no line of .*foreign\.jsonl is about these pictures, prompts and model"):
        bring(work, foreign)


def test_command(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export goes to a folder of its own; a picture that cannot be read is a failure."""
    (work / read_records(work)[0].image).write_bytes(b"<html>")
    options = ["--work", str(work), "--model", "writer-1"]
    monkeypatch.setattr(sys, "argv", ["batch", "export", "--out", str(tmp_path / "out"), *options])
    main()
    with pytest.raises(SystemExit, match=r"error: .*out holds requests already: import their results"):
        main()
    requests = read_lines([tmp_path / "out" / "requests-0001.jsonl"])
    results = write_lines(tmp_path / "results.jsonl", [answer(request) for request in requests])
    monkeypatch.setattr(sys, "argv", ["batch", "import", results, *options])
    main()
    report = json.loads((work / "generate.report.json").read_text())
    assert sum(report["written"].values()) == 27
    assert report["failed"] == {"picture": 3}
