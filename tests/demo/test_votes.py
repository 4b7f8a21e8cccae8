"""Votes: each counts once, lines are whole whoever votes at the same time, and neither memory nor disk fills."""

import hashlib
import json
import random
import re
import threading
from datetime import datetime
from pathlib import Path

import pytest
from PIL import Image

from demo import votes as votes_module
from demo.votes import VoteError, VoteFile, VoteFolderFullError

PICTURE = Image.new("RGB", (40, 30), "red")
COMPARISON = {"models": ["red", "blue"], "question": "什么形状？", "answers": ["圆形", "a\n<b>"]}


def read_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "votes.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_vote_is_a_line_beside_its_picture(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "log"
    votes = VoteFile(folder)
    votes.vote(votes.offer(COMPARISON, PICTURE), "right")
    votes.vote(votes.offer(COMPARISON | {"question": "again"}, PICTURE), "both_bad")
    first, second = read_lines(folder)
    assert first.items() >= COMPARISON.items()
    assert (first["vote"], second["vote"]) == ("right", "both_bad")
    assert datetime.fromisoformat(first["time"]).utcoffset() is not None
    assert "什么形状" in (folder / "votes.jsonl").read_text(encoding="utf-8")
    (file,) = folder.glob("pictures/*")  # once for both
    assert first["picture"] == second["picture"] == f"pictures/{file.name}"
    assert first["picture_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert re.fullmatch(rf"{first['picture_sha256'][:16]}\.jpg", file.name)
    with Image.open(file) as picture:
        assert picture.size == PICTURE.size
        assert not picture.getexif()


def test_a_vote_counts_once_and_only_on_what_was_said(tmp_path: Path) -> None:
    votes = VoteFile(tmp_path)
    ballot = votes.offer(COMPARISON, PICTURE)
    votes.vote(ballot, "left")
    for name in (ballot, "", "0", "../votes"):
        with pytest.raises(VoteError, match="no longer kept, or were voted on already"):
            votes.vote(name, "left")
    assert len(read_lines(tmp_path)) == 1


def test_many_vote_at_once(tmp_path: Path) -> None:
    """And some of them twice at the same time."""
    votes = VoteFile(tmp_path)
    ballots = [votes.offer({"question": f"{number} " + "长" * 3000}, PICTURE) for number in range(40)]
    refused = []

    def vote(names: list[str]) -> None:
        for name in names:
            try:
                votes.vote(name, "left")
            except VoteError:
                refused.append(name)

    orders = [random.Random(seed).sample(ballots, len(ballots)) for seed in range(8)]
    threads = [threading.Thread(target=vote, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(line["question"].split()[0]) for line in read_lines(tmp_path)) == list(range(40))
    assert len(refused) == 7 * 40
    assert votes.open_bytes == 0


def test_votes_go_on_after_a_restart(tmp_path: Path) -> None:
    for choice in ("left", "right"):
        votes = VoteFile(tmp_path)
        votes.vote(votes.offer(COMPARISON, PICTURE), choice)
    assert [line["vote"] for line in read_lines(tmp_path)] == ["left", "right"]
    assert VoteFile(tmp_path).num_bytes == votes.num_bytes


def test_a_full_folder_takes_no_more(tmp_path: Path) -> None:
    """And says so; with more room, the same vote can be given again."""
    votes = VoteFile(tmp_path, max_bytes=3000)
    ballots = [votes.offer(COMPARISON, Image.new("RGB", (16, 16), (20 * number, 0, 0))) for number in range(12)]
    for ballot in ballots:
        if votes.num_bytes < votes.max_bytes:
            votes.vote(ballot, "left")
    with pytest.raises(VoteFolderFullError, match="limit of 3000 bytes"):
        votes.vote(ballots[-1], "left")
    lines = read_lines(tmp_path)
    assert 2 <= len(lines) < 10
    assert len(list(tmp_path.glob("pictures/*"))) == len(lines)
    again = VoteFile(tmp_path, max_bytes=3000)  # as a new process finds it
    ballot = again.offer(COMPARISON, PICTURE)
    with pytest.raises(VoteFolderFullError):
        again.vote(ballot, "left")
    votes.max_bytes = 10_000
    votes.vote(ballots[-1], "left")
    assert len(read_lines(tmp_path)) == len(lines) + 1


def test_only_the_latest_comparisons_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    votes = VoteFile(tmp_path)
    noise = Image.effect_noise((200, 200), 90).convert("RGB")
    oldest = votes.offer(COMPARISON, noise)
    monkeypatch.setattr(votes_module, "MAX_OPEN_BYTES", 4 * votes.open_bytes)
    ballots = [votes.offer(COMPARISON, noise) for _ in range(10)]
    assert list(votes.open) == ballots[-4:]
    assert votes.open_bytes <= votes_module.MAX_OPEN_BYTES
    monkeypatch.setattr(votes_module, "MAX_OPEN", 2)
    votes.offer(COMPARISON, PICTURE)
    assert len(votes.open) == 2
    with pytest.raises(VoteError):
        votes.vote(oldest, "left")


def test_half_a_character_is_written_as_it_came(tmp_path: Path) -> None:
    votes = VoteFile(tmp_path)
    votes.vote(votes.offer({"question": "好\ud83d"}, PICTURE), "left")
    assert read_lines(tmp_path)[0]["question"] == "好\ud83d"


def test_a_folder_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file", encoding="utf-8")
    with pytest.raises(OSError, match="log"):
        VoteFile(tmp_path / "log")
