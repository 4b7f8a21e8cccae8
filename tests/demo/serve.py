"""Runs demo/app.py for tests, as its user would."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
START_S = 180.0  # of a busy machine


@contextlib.contextmanager
def serve(
    model: Path, runs: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen]]:
    """Yield the page's address and its process, which writes to `<runs>/../page.log`, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = runs.parent / "page.log"
    command = [
        sys.executable, str(ROOT / "demo/app.py"), "--model-path", str(model), "--runs", str(runs), "--device", "cpu",
        "--port", str(port), *options,
    ]  # fmt: skip
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=runs.parent, env={**os.environ, **(environment or {})}
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for_page(address, process, log)
        yield address, process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_page(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{address}/robots.txt", timeout=10).status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"the page did not start: {log.read_text(errors='replace')[-3000:]}")
