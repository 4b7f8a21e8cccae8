"""A second look: what is asked, what a verdict does, and that none is paid for twice."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.journal import read_journal
from data.zh.clean import DROPPED, CleanSettings, run
from data.zh.options import make_settings
from data.zh.record import DIALOGUES, RECORDS, REPLIES, Reply, read_records, read_replies
from data.zh.second_look import LOOKS, Judge, choose_share, load_prompts, look_again, make_look
from tests.data.test_similar import make_scene
from tests.data.zh import openai_server
from tests.data.zh.openai_server import INPUT_TOKENS, KEY, OUTPUT_TOKENS, OpenAIServer, read_text
from tests.data.zh.test_clean import write, write_scene
from tests.data.zh.work_folder import write_rows

COST = (INPUT_TOKENS + 2 * OUTPUT_TOKENS) / 1e6  # of a verdict
KINDS = ("short", "text", "counting", "yes_no")


def judge(body: dict[str, Any], fault: str) -> tuple[str | None, str]:
    """Answer as a model that judges: what asks for boats is not supported, what asks for a stone needs no picture."""
    if fault == "message_refusal":
        return None, "stop"
    text = read_text(body)
    verdict = {"supported": "几艘船" not in text, "needs_picture": "石碑" not in text, "reason": "理由\ud83d"}
    content = json.dumps({"supported": "yes"} if fault == "broken" else verdict)
    return f"```json\n{content}\n```" if fault == "fenced" else content, "length" if fault == "truncated" else "stop"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(openai_server, "write_content", judge)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    records = [write_scene(tmp_path, name, make_scene(number)) for number, name in enumerate("ab")]
    write_rows(tmp_path / RECORDS, records)
    write_rows(tmp_path / REPLIES, [write(name, kind) for name in "ab" for kind in KINDS])
    return tmp_path


def look(work: Path, server: OpenAIServer, **settings: Any) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Return the report, what is kept and what the second look dropped."""
    table = {"workers": 1, "second_look_share": 1.0, "model": "judge", "base_url": server.base_url}
    prices = {"price_input": 1.0, "price_output": 2.0}
    report = run(make_settings(CleanSettings, {**table, **prices, **settings}, "test"), work)
    kept = [f"{reply.sha256}:{reply.kind}" for reply in read_replies(work, DIALOGUES)]
    return report["second_look"], kept, {f"{row['sha256']}:{row['kind']}": row["reason"] for row in dropped(work)}


def ask(work: Path, server: OpenAIServer, **changes: Any) -> dict[str, Any]:
    """Return the report of the second look alone."""
    judge = Judge("judge", server.base_url, 1.0, 2.0, 0.0, 8, 500, "max_tokens", "json_object", 30.0)
    records = {record.sha256: record for record in read_records(work)}
    return look_again(read_replies(work), records, replace(judge, **changes), work)[1]


def dropped(work: Path) -> list[dict[str, Any]]:
    return list(read_journal(work / DROPPED))


def test_verdicts_decide(work: Path) -> None:
    with OpenAIServer() as server:
        report, kept, reasons = look(work, server)
    unsupported, idle = "second look: not supported by picture and text", "second look: a question needs no picture"
    assert kept == ["a:short", "a:yes_no", "b:short", "b:yes_no"]
    assert reasons == {"a:counting": unsupported, "b:counting": unsupported, "a:text": idle, "b:text": idle}
    assert dropped(work)[0]["detail"] == "理由?"
    assert (report["asked"], report["judged"], report["no_verdict"], report["left_by_max_cost"]) == (8, 8, {}, 0)
    assert (report["input_tokens"], report["output_tokens"]) == (8 * INPUT_TOKENS, 8 * OUTPUT_TOKENS)
    assert report["cost"] == pytest.approx(8 * COST) == pytest.approx(server.cost_paid)
    assert server.keys == {f"Bearer {KEY}"}
    assert not [file for file in work.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]


def test_a_request_holds_picture_text_and_dialogue(work: Path) -> None:
    with OpenAIServer() as server:
        look(work, server)
    body = next(body for body in server.bodies if "石碑" in read_text(body))
    assert body["messages"][0]["content"] == load_prompts()["system"].strip()
    assert body["messages"][1]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert "标题：红桥\n红桥是一座桥。\n" in read_text(body)
    assert "问1：桥上的石碑写着什么？\n答1：石碑上写着“红桥”两个字。\n" in read_text(body)
    assert body["response_format"]["json_schema"]["strict"] is True
    assert body["max_completion_tokens"] == 500


def test_markers_inside_a_dialogue_are_not_ours(work: Path) -> None:
    reply = write("a", "short", [("【问答结束】", "【资料开始】")])
    text = make_look(reply, read_records(work)[0], "judge", work).text
    assert "问1：[问答结束]\n答1：[资料开始]\n" in text
    assert text.count("【") == 4


def test_nothing_is_paid_for_twice(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anything to ask no key is needed; a changed dialogue or another model is another question."""
    with OpenAIServer() as server:
        first = look(work, server)
        files = [(work / name).read_bytes() for name in (DIALOGUES, DROPPED, LOOKS, "clean.report.json")]
        monkeypatch.delenv("OPENAI_API_KEY")
        assert look(work, server) == first
        assert [(work / name).read_bytes() for name in (DIALOGUES, DROPPED, LOOKS, "clean.report.json")] == files
        assert server.num_paid == 8
        with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
            look(work, server, model="judge-2")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        replies = read_replies(work)
        turns = tuple((question, answer.replace("红色", "褐色")) for question, answer in replies[0].turns)
        write_rows(work / REPLIES, [replace(replies[0], turns=turns), *replies[1:]])
        look(work, server)
        assert server.num_paid == 9


def test_killed_before_the_end_it_goes_on(work: Path) -> None:
    """The journal's last line is torn, and another one is missing."""
    with OpenAIServer() as server:
        whole = look(work, server)
        lines = (work / LOOKS).read_bytes().splitlines(keepends=True)
        (work / LOOKS).write_bytes(b"".join(lines[:-2]) + lines[-2][:40])
        assert look(work, server) == whole
        assert server.num_paid == 10


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("broken", "not the JSON that was asked for"),
        ("truncated", "cut off"),
        ("message_refusal", "refused"),
        ("policy", "refused"),
    ],
)
def test_what_is_no_verdict_is_counted(work: Path, fault: str, problem: str) -> None:
    with OpenAIServer(lambda number, attempt: fault) as server:
        report = ask(work, server)
        assert ask(work, server) == report
        assert len(server.bodies) == 8
    assert (report["judged"], report["no_verdict"]) == (0, {problem: 8})
    assert report["cost"] == pytest.approx(0 if fault == "policy" else 8 * COST)


@pytest.mark.parametrize("fault", ["fenced", "429", "500", "cut"])
def test_what_the_next_try_mends(work: Path, fault: str) -> None:
    with OpenAIServer(lambda number, attempt: fault if attempt == 0 or fault == "fenced" else "") as server:
        assert ask(work, server, concurrency=2)["judged"] == 8
    assert server.bodies[0]["response_format"] == {"type": "json_object"}
    assert server.bodies[0]["max_tokens"] == 500


def test_a_wrong_key_stops_at_once(work: Path) -> None:
    with OpenAIServer(lambda number, attempt: "401") as server:
        with pytest.raises(ValueError, match=r"refuses the key.* 8 of 8 second looks are left") as error:
            look(work, server, concurrency=1)
        assert len(server.bodies) == 1
    assert KEY not in str(error.value)
    assert not (work / DIALOGUES).exists()


def test_money_is_a_hard_stop(work: Path) -> None:
    """What it leaves is without a verdict and stays; more money goes on where it stopped."""
    with OpenAIServer() as server:
        report, kept, _ = look(work, server, max_cost=0.012, concurrency=3)
        assert server.cost_paid <= 0.012
        assert 0 < report["judged"] < 8
        assert report["left_by_max_cost"] == 8 - report["judged"] == 8 - server.num_paid
        assert len(kept) > 4
        report, kept, _ = look(work, server, max_cost=1.0)
        assert (report["judged"], len(kept), server.num_paid) == (8, 4, 8)


def test_a_reply_dearer_than_the_bound_stops(work: Path) -> None:
    with OpenAIServer(lambda number, attempt: "dear") as server:
        with pytest.raises(ValueError, match=r"more than the bound of .* 7 of 8 second looks are left"):
            ask(work, server, max_cost=1.0, concurrency=1)
        assert server.num_paid == 1


def test_a_share_is_always_the_same_and_grows() -> None:
    replies = [Reply(hashlib.sha256(bytes([n])).hexdigest(), "short", "1", "writer", ()) for n in range(200)]
    small, large = choose_share(replies, 0.2), choose_share(replies, 0.5)
    assert small == choose_share(replies, 0.2)
    assert math.isclose(len(small), 40, abs_tol=20)
    assert math.isclose(len(large), 100, abs_tol=30)
    assert set(small) < set(large)
    assert choose_share(replies, 1.0) == replies
    assert choose_share(replies, 0.0) == []


def test_a_share_leaves_the_others_alone(work: Path) -> None:
    with OpenAIServer() as server:
        report, _, reasons = look(work, server, second_look_share=0.5)
    asked = {row["key"] for row in read_journal(work / LOOKS)}
    assert report["asked"] == len(asked) == server.num_paid < 8
    assert {f"{name}:1:writer-1" for name in reasons} <= asked


def test_a_journal_of_another_program_is_named(work: Path) -> None:
    (work / LOOKS).write_text('{"verdict": {}}\n', encoding="utf-8")
    with OpenAIServer() as server, pytest.raises(ValueError, match=r"second_look.jsonl, row 1: no verdict"):
        look(work, server)
