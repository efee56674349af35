"""A proxy in the environment, without which packages cannot be installed in many networks."""

from __future__ import annotations

from pathlib import Path

import pytest
from app_process import RunningApp, free_port

from residency.launch.listening import reach_directly

DEAD = "127.0.0.1:9"


@pytest.mark.parametrize(
    "proxies",
    [
        {"http_proxy": f"http://{DEAD}", "HTTP_PROXY": f"http://{DEAD}", "ALL_PROXY": f"http://{DEAD}"},
        {"all_proxy": f"socks5://{DEAD}", "no_proxy": "internal.example"},
    ],
    ids=["http", "socks"],
)
def test_an_app_behind_a_proxy_that_does_not_answer_serves_this_machine(
    tmp_path: Path, proxies: dict[str, str]
) -> None:
    prelude = f"import os; os.environ.update({proxies!r})\n"
    with RunningApp(tmp_path, "--enable-gpu-management", prelude=prelude, port=free_port()) as app:
        assert app.get("/readyz") == (200, {"status": "ok"})
        assert app.get("/config")[0] == 200
        assert app.process.poll() is None


@pytest.mark.parametrize(
    ("present", "host", "expected"),
    [
        ({}, "0.0.0.0", "localhost,127.0.0.1,::1"),
        ({}, "[::]", "localhost,127.0.0.1,::1"),
        ({}, "192.0.2.7", "localhost,127.0.0.1,::1,192.0.2.7"),
        ({"NO_PROXY": "a.example, 127.0.0.1"}, "127.0.0.1", "a.example,127.0.0.1,localhost,::1"),
        ({"no_proxy": "b.example", "NO_PROXY": "c.example"}, "localhost", "b.example,localhost,127.0.0.1,::1"),
    ],
)
def test_this_machine_is_added_to_the_names_without_a_proxy(present: dict[str, str], host: str, expected: str) -> None:
    environ = dict(present)
    reach_directly(host, environ)
    assert environ["no_proxy"] == environ["NO_PROXY"] == expected
