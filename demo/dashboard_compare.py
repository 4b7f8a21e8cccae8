"""The comparison of two runs that `eval/compare.py` writes, made in a process of its own."""

import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path

from data.runs import SCORES
from demo.dashboard_runs import Summary

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 180
MAX_BYTES = 2**24
MAX_PAGES = 4


class Comparer:
    """Makes one page at a time, and keeps the last ones until a score changes."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs.resolve()
        self.pages: OrderedDict[tuple, str] = OrderedDict()
        self.lock = threading.Lock()

    def compare(self, first: Summary, second: Summary, language: str) -> str:
        """Return a whole HTML page. Raises: ValueError saying why there is none."""
        stamps = [stamp for run in (first, second) for name, stamp in run.stamps.items() if Path(name).match(SCORES)]
        key = (first.name, second.name, language, *stamps)
        with self.lock:
            if key not in self.pages:
                self.pages[key] = self._make(first.name, second.name, language)
                while len(self.pages) > MAX_PAGES:
                    self.pages.popitem(last=False)
            self.pages.move_to_end(key)
            return self.pages[key]

    def _make(self, first: str, second: str, language: str) -> str:
        with tempfile.TemporaryDirectory() as out:
            # Paths as a user types them, so that the page names them so, and finds the data that the runs name.
            paths = [f"{self.runs.name}/{name}" for name in (first, second)]
            command = [sys.executable, str(ROOT / "eval/compare.py"), *paths, "--out", out, "--language", language]
            try:
                done = subprocess.run(
                    command, cwd=self.runs.parent, capture_output=True, text=True, errors="replace", check=False,
                    timeout=LIMIT_S,
                )  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise ValueError(f"eval/compare.py took more than {LIMIT_S} s") from error
            page = Path(out) / "compare.html"
            if done.returncode or not page.is_file():
                told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                raise ValueError(told[-1].removeprefix("error: "))
            if page.stat().st_size > MAX_BYTES:
                raise ValueError(f"the page has {page.stat().st_size:,} bytes, at most {MAX_BYTES:,} are shown")
            return page.read_text(encoding="utf-8")
