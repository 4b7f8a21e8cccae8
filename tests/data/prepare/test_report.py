"""The report: what is counted appears, printed and written."""

import hashlib
import json
from pathlib import Path

import pytest

from data.prepare.report import Report


def make_report(tmp_path: Path) -> Report:
    (tmp_path / "in.json").write_text("[1]", encoding="utf-8")
    report = Report("coco")
    report.options = {"seed": 7}
    assert report.add_input(tmp_path / "in.json") == tmp_path / "in.json"
    report.read, report.rows = 5, 2
    report.mend("caption: full stop added")
    report.mend("answer: nothing to do", 0)
    report.drop("in COCO val2014", 2)
    report.drop("in COCO val2014")
    report.note("图 are pictures")
    return report


def test_written(tmp_path: Path) -> None:
    report = make_report(tmp_path)
    report.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == {
        "source": "coco",
        "options": {"seed": 7},
        "inputs": [{"name": "in.json", "bytes": 3, "sha256": hashlib.sha256(b"[1]").hexdigest()}],
        "read": 5,
        "rows": 2,
        "mended": {"caption: full stop added": 1},
        "dropped": {"in COCO val2014": 3},
        "notes": ["图 are pictures"],
    }


def test_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = make_report(tmp_path)
    report.parts = [{"file": "a.json", "rows": 12}, {"file": "b.json", "rows": 3}]
    report.print()
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "coco",
        "read 5",
        "written 2 rows",
        "mended 1 caption: full stop added",
        "dropped 3 in COCO val2014",
        "file rows",
        "a.json 12",
        "b.json 3",
        "note: 图 are pictures",
    ]


def test_missing_input(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"in\.json is missing"):
        Report("coco").add_input(tmp_path / "in.json")
