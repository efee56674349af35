"""The app with a certificate of its own: the page in a browser, and the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from app_process import ROOT, ForkedApp
from reverse_proxies import NAME, make_certificate

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import Page


def test_the_page_and_the_command_line_over_https(new_page: Callable[..., Page], tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path / "certificate", "localhost", NAME)
    (tmp_path / "gates").mkdir()
    arguments = ("--enable-gpu-management", "--simulate-gpu", "48GB", "--allowed-host", NAME)
    tls = ("--ssl-certfile", certificate, "--ssl-keyfile", key)
    with ForkedApp(tmp_path / "tmp", *arguments, *tls, gates=tmp_path / "gates") as app:
        assert f"Serving on https://127.0.0.1:{app.port}" in app.log
        page = new_page(ignore_https_errors=True)
        page.goto(f"https://{NAME}:{app.port}/")
        sync_api.expect(page.locator("#gpu-status [data-model=tts]")).to_be_visible()
        assert page.evaluate("!!navigator.mediaDevices")
        assert page.locator("#no-microphone, #wrong-address").count() == 0

        url = f"https://localhost:{app.port}"
        warmed = command_line("warm", "--url", url, SSL_CERT_FILE=certificate)
        assert (warmed.returncode, "tts" in warmed.stdout) == (0, True), warmed.stderr
        untrusted = command_line("status", "--url", url)
        assert (untrusted.returncode, "SSL_CERT_FILE" in untrusted.stderr) == (1, True), untrusted.stderr


def command_line(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpu_manager", *arguments],
        cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
