"""A JupyterLab of its own on loopback, and Debian's Chromium to drive it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
# The news pop-up would cover a corner; cells out of sight must stay in the page, so that the test can read them.
PAGE_CONFIG = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
NOTEBOOK_SETTINGS = {"windowingMode": "none"}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def settings(folder: Path) -> dict[str, str]:
    """Every folder Jupyter writes to, under `folder`, so that neither the user's settings nor an earlier run is met."""
    jupyter = (f"JUPYTER_{name}_DIR" for name in ("CONFIG", "DATA", "RUNTIME"))
    lab = (f"JUPYTERLAB_{name}_DIR" for name in ("SETTINGS", "WORKSPACES"))
    variables = {name: str(folder / name.lower()) for name in (*jupyter, *lab, "IPYTHONDIR")}
    tracker = "@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    files = {
        Path(variables["JUPYTER_CONFIG_DIR"]) / "labconfig" / "page_config.json": PAGE_CONFIG,
        Path(variables["JUPYTERLAB_SETTINGS_DIR"]) / tracker: NOTEBOOK_SETTINGS,
    }
    for path, content in files.items():
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    return variables


@contextmanager
def jupyterlab(root: Path, folder: Path) -> Iterator[str]:
    """Serve `root`; yields the address of the server. `folder` takes its settings and its log."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    options = [f"--port={port}", "--ip=127.0.0.1", "--no-browser", "--allow-root", "--IdentityProvider.token="]
    options += ["--ServerApp.port_retries=0", f"--ServerApp.root_dir={root}"]
    log = folder / "jupyterlab.log"
    environment = {**os.environ, **settings(folder), "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment)
        try:
            wait_until_up(address, server, log)
            yield address
        finally:
            server.terminate()  # JupyterLab ends its kernels
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_until_up(address: str, server: subprocess.Popen, log: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{address}/api/status", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            assert server.poll() is None, f"JupyterLab ended: {log.read_text()[-2000:]}"
            time.sleep(0.3)
    raise AssertionError(f"JupyterLab is not up after {seconds:.0f} s: {log.read_text()[-2000:]}")


@contextmanager
def chromium() -> Iterator[Browser]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        pytest.fail("The browser test needs Chromium; on Debian: apt-get install chromium.")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=executable, args=flags)
        yield browser
        browser.close()
