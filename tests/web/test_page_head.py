"""The scripts that the browser runs before those of Gradio."""

from __future__ import annotations

import gradio as gr
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from residency.web import page


@pytest.fixture(params=[None, ("me", "secret")], ids=["open", "with a password"])
def client(request: pytest.FixtureRequest) -> TestClient:
    page.adapt_page_templates(page._HEAD)
    with gr.Blocks() as blocks:
        gr.Markdown("{{ page }} and <head>")
    return TestClient(gr.mount_gradio_app(FastAPI(), blocks, path="", auth=request.param))


def test_the_scripts_come_before_everything_else(client: TestClient) -> None:
    head = client.get("/").text.partition("<head>")[2]
    assert head.startswith("<script>")
    scripts, _, rest = head.partition('<meta charset="utf-8"')
    assert "zh-TW" in scripts
    assert "wrong-address" in scripts
    assert ("too-often" in scripts) == (client.get("/config").status_code == 401)
    assert "zh-TW" not in rest


def test_other_answers_are_left_alone(client: TestClient) -> None:
    for path in ("/missing", "/theme.css", "/gradio_api/app_id"):
        assert "zh-TW" not in client.get(path).text
