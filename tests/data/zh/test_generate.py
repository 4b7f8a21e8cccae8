"""Dialogues from an endpoint on this machine, in all its moods."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.zh.endpoint import MAX_RETRIES
from data.zh.generate import NO_PRICES, GenerateSettings, main, run
from data.zh.kinds import load_prompts
from data.zh.ledger import Ledger
from data.zh.record import REPLIES, read_records, read_replies
from tests.data.zh.openai_server import GOOD, INPUT_TOKENS, KEY, OUTPUT_TOKENS, OpenAIServer, read_text
from tests.data.zh.work_folder import write_work

COST = (INPUT_TOKENS + 2 * OUTPUT_TOKENS) / 1_000_000  # of a reply, at the prices below


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten pictures, a key, and a client that does not wait long before it tries again."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)
    write_work(tmp_path, num_pictures=10)
    for name in (REPLIES, "dialogues.jsonl"):
        (tmp_path / name).unlink()
    return tmp_path


def make_settings(server: OpenAIServer | None = None, **values: Any) -> GenerateSettings:
    prices = {"price_input": 1.0, "price_output": 2.0}
    return GenerateSettings(model="writer-1", base_url=server.base_url if server else "", **{**prices, **values})


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_run_and_run_again(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three dialogues a picture are written, with what they cost; the second run asks for nothing."""
    with OpenAIServer() as server:
        report = run(make_settings(server), work)
        replies = read_replies(work)
        assert len({reply.key for reply in replies}) == len(replies) == server.num_paid == 30
        assert all(reply.turns == tuple(GOOD[reply.kind]) for reply in replies)
        assert {reply.model_snapshot for reply in replies} == {"writer-1-2026-01-01"}
        assert sum(report["written"].values()) == report["wanted"] == 30
        assert report["input_tokens"] == 30 * INPUT_TOKENS
        assert report["cost"] == pytest.approx(30 * COST)
        assert report["left"] == 0
        assert server.most_active <= 8
        assert server.keys == {f"Bearer {KEY}"}
        body = server.bodies[0]
        assert body["response_format"]["json_schema"]["strict"] is True
        assert body["max_completion_tokens"] == 2000
        assert body["messages"][1]["content"][0]["image_url"]["detail"] == "low"
        content = (work / REPLIES).read_bytes(), (work / "generate.report.json").read_bytes()
        assert run(make_settings(server), work) == report
        assert ((work / REPLIES).read_bytes(), (work / "generate.report.json").read_bytes()) == content
        assert server.num_paid == 30
        assert "30 of 30 done, 0 failed, 30,600 tokens, cost 0.0342 so far" in capsys.readouterr().err
        run(make_settings(server, kinds_per_picture=4), work)
        assert server.num_paid == 40
        run(replace(make_settings(server, max_pictures=3), model="writer-2"), work)
        assert server.num_paid == 49


BAD = ("refusal", "message_refusal", "english", "broken", "truncated", "filtered", "injected", "policy")
REASONS = {
    "refusal": "refusal",
    "message_refusal": "refusal",
    "english": "not_chinese",
    "broken": "not_json",
    "injected": "not_json",
    "truncated": "truncated",
    "filtered": "filtered",
    "policy": "filtered",
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_reply_is_asked_for_once_more(work: Path, fault: str) -> None:
    """The second request says what was wrong; both are paid, the good one is kept."""

    def fail_first(number: int, attempt: int) -> str:
        is_again = load_prompts().again[:8] in read_text(server.bodies[-1])
        return "" if is_again else fault

    with OpenAIServer(fail_first) as server:
        report = run(make_settings(server, max_pictures=1), work)
        assert len(server.bodies) == 6
        assert sum(report["written"].values()) == 3
        assert report["failed"] == {}
        paid = 3 if fault == "policy" else 6
        assert report["cost"] == pytest.approx(paid * COST)
        (reason,) = {text for text in load_prompts().reasons.values() if text in read_text(server.bodies[-1])}
        assert reason == load_prompts().reasons[REASONS[fault]]


@pytest.mark.parametrize("fault", BAD)
def test_bad_reply_twice_is_a_failure(work: Path, fault: str) -> None:
    """It is noted with its reason and cost, and not asked for again unless that is wanted."""
    with OpenAIServer(lambda number, attempt: fault) as server:
        report = run(make_settings(server, max_pictures=1), work)
        rows = read_rows(work / "failed.jsonl")
        assert report["failed"] == {REASONS[fault]: 3}
        assert [row["reason"] for row in rows] == [REASONS[fault]] * 3
        assert all(row["detail"] for row in rows)
        assert report["cost"] == pytest.approx(sum(row["cost"] for row in rows)) == pytest.approx(server.cost_paid)
        assert run(make_settings(server, max_pictures=1), work) == report
        assert len(server.bodies) == 6
        server.faults = lambda number, attempt: ""
        report = run(make_settings(server, max_pictures=1, retry_failed=True), work)
        assert report["failed"] == {}
        assert sum(report["written"].values()) == 3
        assert report["cost"] == pytest.approx(server.cost_paid)


def test_reply_that_does_not_apply_is_final(work: Path) -> None:
    with OpenAIServer(lambda number, attempt: "not_applicable") as server:
        report = run(make_settings(server), work)
        assert sum(report["not_applicable"].values()) == server.num_paid == 30
        assert run(make_settings(server), work) == report
        assert server.num_paid == 30
    assert all(reply.turns == () for reply in read_replies(work))


def test_trouble_that_passes(work: Path) -> None:
    """Busy, broken and cut off: the client asks again. A reply that was cut off counts as dear as one can be."""

    def stumble(number: int, attempt: int) -> str:
        return ("429", "500", "cut", "html", "")[number % 5] if attempt == 0 else ""

    with OpenAIServer(stumble) as server:
        run_until_done(make_settings(server), work)
        rows = read_rows(work / "failed.jsonl")
        assert {(row["key"], row["reason"], row["detail"]) for row in rows} == {("", "lost", "RemoteProtocolError")}
        assert len({reply.key for reply in read_replies(work)}) == len(read_replies(work)) == 30
        cost = json.loads((work / "generate.report.json").read_text())["cost"]
        assert cost > server.cost_paid > 30 * COST


def run_until_done(settings: GenerateSettings, work: Path) -> None:
    """Run as often as something is left."""
    for _ in range(3):
        try:
            run(settings, work)
        except ValueError:  # of requests without an answer
            continue
        return
    raise AssertionError("something is left after three runs")


@pytest.mark.parametrize(
    ("fault", "message", "most"),
    [
        ("401", r"refuses the key in OPENAI_API_KEY .*\[key\]", 8),
        ("404", "no such model or address .*writer-9", 8),
        ("quota", "no quota left .*top it up", 8 * (MAX_RETRIES + 1)),
        ("400", "10 requests in a row got no answer; the last: .*response_format", 17),
        ("500", "10 requests in a row got no answer; the last: ", 17 * (MAX_RETRIES + 1)),
        ("html", "sent no chat completion but .*please log in.* check --base-url", 17),
    ],
)
def test_trouble_that_stays(
    work: Path, fault: str, message: str, most: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stops the run and says why, and nothing is noted as failed; the key is shown nowhere."""
    with OpenAIServer(lambda number, attempt: fault) as server:
        with pytest.raises(ValueError, match=message) as caught:
            run(make_settings(server), work)
        assert "30 of 30 dialogues are left: the same command goes on" in str(caught.value)
        assert len(server.bodies) <= most
        assert json.loads((work / "generate.report.json").read_text())["failed"] == {}
        server.faults = lambda number, attempt: ""
        assert run(make_settings(server), work)["left"] == 0
    said = "".join(capsys.readouterr()) + str(caught.value)
    assert not [file for file in work.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]
    assert KEY not in said


def test_request_that_is_rejected(work: Path) -> None:
    """One among others that get answers is a failure; the run goes on and ends."""

    def reject(number: int, attempt: int) -> str:
        return "400" if "第3座桥" in read_text(server.bodies[-1]) else ""

    with OpenAIServer(reject) as server:
        report = run(make_settings(server), work)
        assert report["failed"] == {"rejected": 3}
        assert report["left"] == 0
        assert run(make_settings(server), work) == report
        assert len(server.bodies) == 30


@pytest.mark.parametrize("url", ["nonsense", "127.0.0.1:1", "ftp://127.0.0.1/v1", "http://"])
def test_address_that_is_none(work: Path, url: str) -> None:
    with pytest.raises(ValueError, match=r"got no answer|is no address"):
        run(replace(make_settings(), base_url=url), work)
    assert not (work / "failed.jsonl").read_bytes()


def test_endpoint_that_is_not_there(work: Path) -> None:
    """Nothing was sent, so nothing is counted as paid."""
    with OpenAIServer() as server:
        pass
    with pytest.raises(ValueError, match="10 requests in a row got no answer; the last: APIConnectionError"):
        run(make_settings(server), work)
    assert (work / "failed.jsonl").read_bytes() == b""


def test_endpoint_that_is_silent(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply that comes too late is asked for again, and counted as lost each time."""
    monkeypatch.setattr("data.zh.endpoint.MAX_RETRIES", 1)
    with OpenAIServer(lambda number, attempt: "slow") as server:
        with pytest.raises(ValueError, match="3 requests got no answer, most often: APITimeoutError"):
            run(make_settings(server, max_pictures=1, timeout_s=0.2), work)
        assert [row["reason"] for row in read_rows(work / "failed.jsonl")] == ["lost"] * 6


@pytest.mark.parametrize("max_cost", [0.02, 0.06, 0.11])
def test_max_cost_is_never_exceeded(work: Path, max_cost: float) -> None:
    """Not by replies on their way, second requests, lost replies, or several runs; and most of it is used."""

    def stumble(number: int, attempt: int) -> str:
        return "cut" if attempt == 0 and number % 9 == 0 else ("refusal", "", "", "")[number % 4]

    with OpenAIServer(stumble, delay_s=0.01) as server:
        for _ in range(2):
            report = run(make_settings(server, max_cost=max_cost, kinds_per_picture=7), work)
            assert report["stopped_by_max_cost"] is True
            assert server.cost_paid <= report["cost"] <= max_cost
        assert report["cost"] > max_cost - 0.018  # what a request can cost
        assert report["left"] > 0
        paid = server.num_paid
        assert run(make_settings(server, max_cost=max_cost, kinds_per_picture=7), work) == report
        assert server.num_paid == paid


def test_reply_dearer_than_the_bound_stops(work: Path) -> None:
    """An endpoint that does not keep to the limit of tokens cannot be budgeted for."""
    with (
        OpenAIServer(lambda number, attempt: "dear") as server,
        pytest.raises(ValueError, match=r"a reply cost 2\.0009"),
    ):
        run(make_settings(server, max_cost=100.0, concurrency=1), work)
    assert len(read_replies(work)) == 1


def test_endpoint_that_does_not_tell_usage(work: Path) -> None:
    """Then a reply counts as much as one can cost."""
    with OpenAIServer(lambda number, attempt: "no_usage") as server:
        report = run(make_settings(server, max_cost=0.1), work)
    assert report["stopped_by_max_cost"] is True
    assert 0.08 < report["cost"] <= 0.1


def test_pilot(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few pictures, what they took, and what all would; the run goes on from there."""
    with OpenAIServer() as server:
        report = run(make_settings(server, pilot=2), work)
        assert report["wanted"] == server.num_paid == 6
        lines = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
        assert lines == [
            ["pilot", "6", "5,400", "720", "0.0068"],
            ["each", "1", "900", "120", "0.0011"],
            ["all", "30", "27,000", "3,600", "0.0342"],
        ]
        run(make_settings(server), work)
        assert server.num_paid == 30


def test_dry_run(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Requests are shown, pictures shortened; no key is needed, and nothing is sent."""
    monkeypatch.delenv("OPENAI_API_KEY")
    assert run(make_settings(dry_run=True, pilot=2), work) == {}
    shown = capsys.readouterr()
    assert shown.out.count("data:image/jpeg;base64,") == shown.out.count('"key"') == 6
    assert "characters)" in shown.out
    assert len(shown.out) < 30_000
    assert shown.err.startswith("6 requests; a request costs 0.0")
    run(make_settings(dry_run=True, pilot=2, price_input=0.0, price_output=0.0), work)
    assert capsys.readouterr().err == f"6 requests; {NO_PRICES}\n"
    assert (work / REPLIES).read_bytes() == b""


def test_pictures_that_cannot_be_read(work: Path) -> None:
    """They are failures with a reason, and cost nothing."""
    records = read_records(work)
    (work / records[0].image).write_bytes(b"<html>")
    (work / records[1].image).unlink()
    with OpenAIServer() as server:
        report = run(make_settings(server), work)
        assert report["failed"] == {"picture": 6}
        assert server.num_paid == 24


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_cost": 1.0, "price_output": 0.0}, "max_cost = 1 needs price_input and price_output"),
        ({"concurrency": 0}, "concurrency = 0, expected more than 0"),
        ({"max_cost": float("nan")}, "max_cost = nan, expected 0 or more"),
        ({"max_cost": -1.0}, "max_cost = -1.0, expected 0 or more"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_settings(**values)
    with pytest.raises(ValueError, match="model is missing"):
        GenerateSettings()


@pytest.mark.parametrize(("key", "message"), [("", "OPENAI_API_KEY is not set"), ("sk-a b", "holds blanks")])
def test_key(work: Path, monkeypatch: pytest.MonkeyPatch, key: str, message: str) -> None:
    """One that cannot be sent is not shown either."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match=message) as caught:
        run(make_settings(), work)
    assert not key or key not in str(caught.value)


def test_command(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with OpenAIServer() as server:
        options = ["--work", str(work), "--model", "writer-1", "--base-url", server.base_url]
        monkeypatch.setattr(sys, "argv", ["generate", *options, "--max-pictures", "2", "--token-limit", "max_tokens"])
        main()
        assert server.bodies[0]["max_tokens"] == 2000
        monkeypatch.setattr(sys, "argv", ["generate", *options, "--max-cost", "1"])
        with pytest.raises(SystemExit, match="error: options: max_cost = 1 needs price_input"):
            main()
    assert "wanted" in capsys.readouterr().out


def test_without_the_client(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to install."""
    monkeypatch.setitem(sys.modules, "openai", None)
    for name in ("data.zh.endpoint", "data.zh.writer"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ValueError, match=r"openai.*: pip install -r data/requirements.txt"):
        run(make_settings(), work)


def test_one_process_at_a_time(work: Path) -> None:
    with Ledger(work), pytest.raises(ValueError, match=r"another process writes .*replies.jsonl"):
        run(make_settings(), work)
