"""The chain: what its file may say, in which order it runs, where it stops, and what it does when it is run again."""

from pathlib import Path
from typing import Any

import pytest

from data.zh import build, publish
from data.zh.build import STEPS, Step, load_config, main
from tests.conftest import ROOT

CONFIG = """
work = "{work}"
[collect]
source = "folder"
folder = "somewhere"
[generate]
model = "writer-1"
[publish]
test_share = 0.1
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "build.toml"
    file.write_text(CONFIG.format(work=tmp_path / "work"), encoding="utf-8")
    return file


def test_config(config: Path) -> None:
    """Each table is its step's settings; what is not said has its default, also a whole table."""
    work, settings = load_config(config)
    assert work == config.parent / "work"
    assert list(settings) == ["collect", "generate", "clean", "publish"]
    assert settings["publish"] == publish.PublishSettings(test_share=0.1)
    assert settings["generate"].model == "writer-1"
    assert settings["clean"] == STEPS["clean"].settings()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("work =", "wokr =", r"unknown key 'wokr', known are work, \[collect"),
        ('work = "', 'work = ["', "is not TOML"),
        ("[publish]", "[publsh]", "unknown key 'publsh', known are work, "),
        ("test_share", "test_shares", r"\[publish\]: unknown key 'test_shares', did you mean 'test_share'"),
        ("0.1", '"0.1"', r"\[publish\]: test_share = '0.1', expected a number"),
        ("0.1", "1.5", r"\[publish\]: validation_share = 0.05 and test_share = 1.5, expected shares"),
        ('model = "writer-1"', "", r"\[generate\]: model is missing"),
        ('source = "folder"', 'source = "web"', r"\[collect\]: source = 'web', expected one of"),
    ],
)
def test_config_that_cannot_be(config: Path, old: str, new: str, message: str) -> None:
    """Every error names the file and the place, before anything is run or paid for."""
    config.write_text(config.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{config}.*{message}"):
        load_config(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "work = '', expected the folder"),
        ("work = 7", "work = 7, expected the folder"),
        ('work = "x"\ncollect = 1', r"collect = 1, expected a table \[collect\]"),
    ],
)
def test_config_without_a_folder(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "x.toml")
    with pytest.raises(FileNotFoundError, match=r"configuration .*y.toml is missing"):
        load_config(tmp_path / "y.toml")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps that only note that they ran, and write their result the first time; which ones did."""
    names: list[str] = []

    def make(name: str, result: str) -> Any:
        def run(settings: Any, work: Path) -> dict[str, Any]:
            names.append(name)
            work.mkdir(exist_ok=True)
            (work / result).write_text(f"by {name}")
            return {"left": 3} if name == "generate" and settings.max_pictures else {}

        return run

    fakes = {name: Step(step.settings, make(name, step.result), step.result) for name, step in STEPS.items()}
    monkeypatch.setattr(build, "STEPS", fakes)
    return names


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["build", *map(str, arguments)])
    main()


def test_order_and_what_is_said(
    config: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All steps in their order, or up to one; run again, those that change nothing say so."""
    run_command(monkeypatch, config, "--step", "generate")
    assert ran == ["collect", "generate"]
    assert "nothing new" not in capsys.readouterr().out
    run_command(monkeypatch, config)
    assert ran[2:] == ["collect", "generate", "clean", "publish"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[::2]] == [
        [f"[{number}/4]", name] for number, name in enumerate(STEPS, start=1)
    ]
    assert [line.endswith(", nothing new") for line in lines[1::2]] == [True, True, False, False]


@pytest.mark.parametrize("setting", ["pilot = 5", "dry_run = true"])
def test_pilot_ends_the_chain(
    config: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    """Nobody wants the data set of a pilot."""
    text = config.read_text(encoding="utf-8").replace("[publish]", f"{setting}\n[publish]")
    config.write_text(text, encoding="utf-8")
    run_command(monkeypatch, config)
    assert ran == ["collect", "generate"]
    assert capsys.readouterr().out.endswith("a pilot or a dry run ends here: take it out of [generate] to go on\n")


def test_unfinished_step(
    config: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was paid for is used; that it is not all is said."""
    text = config.read_text(encoding="utf-8").replace("[publish]", "max_pictures = 1\n[publish]")
    config.write_text(text, encoding="utf-8")
    run_command(monkeypatch, config)
    assert ran[-1] == "publish"
    assert "generate: 3 are still to be done; what is there goes on" in capsys.readouterr().out


def test_failing_step(config: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, and nothing behind it runs."""

    def fail(settings: object, work: Path) -> dict[str, Any]:
        raise FileNotFoundError("tokenizer x is missing")

    monkeypatch.setitem(build.STEPS, "clean", STEPS["clean"]._replace(run=fail))
    with pytest.raises(SystemExit, match=r"^error: clean: tokenizer x is missing$"):
        run_command(monkeypatch, config)
    assert ran == ["collect", "generate"]

    def interrupt(settings: object, work: Path) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setitem(build.STEPS, "clean", STEPS["clean"]._replace(run=interrupt))
    with pytest.raises(SystemExit, match=r"^error: interrupted; the same command goes on where this one stopped$"):
        run_command(monkeypatch, config)


def test_configuration_of_the_encyclopedia(tmp_path: Path) -> None:
    """It is whole but for what only its user knows, and asks for that."""
    text = (ROOT / "data/zh/encyclopedia.toml").read_text(encoding="utf-8")
    file = tmp_path / "zh.toml"
    for old, new, message in (
        ('user_agent = ""', 'user_agent = "mine/1.0 (https://example.org/mine)"', "user_agent = ''"),
        ('model = ""', 'model = "writer-1"', "model is missing"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_config(file)
        text = text.replace(old, new)
    for old, new in (("# max_cost", "max_cost"), ("input = 0.0", "input = 2.5"), ("output = 0.0", "output = 10.0")):
        assert old in text
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")
    _, settings = load_config(file)
    assert settings["collect"].max_records * settings["generate"].kinds_per_picture * 0.8 > 14_000
    assert settings["generate"].pilot == 20
    assert settings["generate"].max_cost == 50
