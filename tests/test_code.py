"""The rules of the house, checked: style, types, who may import whom, and that the README tells the truth."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("model", "data", "train", "eval", "demo")
READMES = ("README.md", "README.zh-CN.md")

# What a room may import of the others, and the commands that have to see one more: some benchmarks measure the trainer,
# `model/convert.py` writes a tokenizer beside the weights, `data/features.py` runs the vision tower.
MAY_IMPORT = {
    "model": {"model"},
    "data": {"data"},
    "train": {"train", "model", "data"},
    "eval": {"eval", "model", "data"},
    "demo": {"demo", "model", "data"},
}
MAY_ALSO_IMPORT = {
    "eval/speed_train.py": {"train"},
    "eval/speed_train_contestants.py": {"train"},
    "eval/speed_start_rank.py": {"train"},
    "eval/speed_memory.py": {"train"},
    "eval/speed_growth_steps.py": {"train"},
    "eval/speed_growth_plan.py": {"train"},
    "model/convert.py": {"data"},
    "data/features.py": {"model"},
}
DISTRIBUTED = {"train/parallel.py", "train/checkpoint.py"}


def product_files() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imported_modules(file: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    return modules


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=["ruff check", "ruff format", "mypy"],
)
def test_style_and_types(command: list[str]) -> None:
    checked = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("file", product_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_what_they_may(file: Path) -> None:
    name = str(file.relative_to(ROOT))
    allowed = MAY_IMPORT[file.relative_to(ROOT).parts[0]] | MAY_ALSO_IMPORT.get(name, set())
    modules = imported_modules(file)
    assert {module.split(".")[0] for module in modules} & set(ROOMS) <= allowed
    if name not in DISTRIBUTED:
        assert not [module for module in modules if module.startswith("torch.distributed")]


def commands(readme: str) -> list[str]:
    """Return the lines of a README's shell blocks."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def test_both_readmes_give_the_same_commands() -> None:
    first, second = (commands(readme) for readme in READMES)
    assert first == second
    assert len(first) >= 6


@pytest.mark.parametrize("readme", READMES)
def test_every_path_in_the_readme_exists(readme: str) -> None:
    """Files that running makes (`runs/`, `.venv/`) are left out."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link}
    rooms = "|".join((*ROOMS, "tests", r"\.ci"))
    named = set(re.findall(rf"(?<![\w/.-])((?:{rooms})/[\w./-]*\w)", text))
    missing = [path for path in sorted(links | named) if path and not (ROOT / path).exists()]
    assert missing == []


def read_with_imports(file: Path) -> str:
    """Return a command's source, and those of the modules of its room that it imports, which may add options."""
    modules = [name for name in imported_modules(file) if name.startswith(f"{file.relative_to(ROOT).parts[0]}.")]
    files = [file, *(ROOT / f"{name.replace('.', '/')}.py" for name in modules)]
    return "\n".join(path.read_text(encoding="utf-8") for path in files if path.is_file())


@pytest.mark.parametrize("readme", READMES)
def test_every_option_in_the_readme_exists(readme: str) -> None:
    for line in commands(readme):
        for script, module, arguments in re.findall(
            r"(?:python3? ((?:eval|demo|train)/\w+\.py)|-m ((?:data|model)\.[\w.]+))([^&|]*)", line
        ):
            file = ROOT / (script or module.replace(".", "/"))
            file = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
            source = read_with_imports(file)
            for option in re.findall(r"--[\w-]+", arguments):
                field = option.removeprefix("--").replace("-", "_")  # `data.zh.options` makes options of settings
                is_setting = re.search(rf"^    {field}: .* = setting\(", source, flags=re.MULTILINE)
                assert f'"{option}"' in source or is_setting, f"{file} has no {option}"


def test_ci_runs_the_readmes_test_command() -> None:
    (pattern,) = re.findall(r"grep -m 1 -E '(.*)' README.md", (ROOT / ".ci/run").read_text(encoding="utf-8"))
    assert [line for line in commands("README.md") if re.search(pattern, line)]
