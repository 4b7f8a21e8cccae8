"""The README's main job, shortened: the whole way from nothing to answers that need the picture."""

import json
from pathlib import Path

from tests.launch import run_training


def test_shortened_main_job_learns_to_answer(tmp_path: Path) -> None:
    """At least 70 % of the test questions: always saying the commonest answer is 37.3 %, and the best answers
    without looking at the picture are 67.0 %."""
    ended = run_training(tmp_path, 2, "max_steps=120", "stop_at=0.0", "eval_every=60", timeout_s=580)
    assert ended.returncode == 0, ended.stderr
    scores = json.loads((tmp_path / "runs/tiny/eval/easy_vqa/scores.json").read_text(encoding="utf-8"))
    assert scores["n"] == 9673
    assert scores["score"] >= 0.7
    before = json.loads((tmp_path / "runs/tiny-projector/eval/easy_vqa/scores.json").read_text(encoding="utf-8"))
    assert before["score"] < scores["score"]
    assert "always the commonest answer" in ended.stdout
    for name in ("tiny-vision", "tiny-language", "tiny-projector", "tiny"):
        run = tmp_path / "runs" / name
        files = {path.name for path in run.iterdir()}
        assert {"config.toml", "metrics.jsonl", "samples.jsonl", "loss.png", "final"} <= files
        (session,) = [json.loads(line) for line in (run / "sessions.jsonl").read_text(encoding="utf-8").splitlines()]
        assert (session["ranks"], session["num_steps"], session["first_step"]) == (2, 120, 0)
        assert 0 < session["trained_parameters"] <= session["parameters"]
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [row["step"] for row in rows] == list(range(1, 121))
        assert rows[119]["held_out_loss"] < rows[59]["held_out_loss"], name
