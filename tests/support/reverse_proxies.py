"""The configurations in ``examples/``, run by real proxies on local ports."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme
from app_process import free_port, wait_until
from fork_server import ROOT

EXAMPLES = ROOT / "examples"
NAME = "tts.example.com"
"""The host name in the examples. The tests' browsers resolve it to this machine."""

#: Debian's nginx.conf around the files in conf.d, with its folders inside the test's folder.
_AROUND = """
pid {folder}/nginx.pid;
error_log {folder}/error.log;
{user}
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {servers}
}}
"""


def find(program: str) -> str:
    """Returns the program's path. If missing, skips the test, or fails it if ``REQUIRE_`` and its name are set."""
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        (pytest.fail if os.environ.get(f"REQUIRE_{program.upper()}") else pytest.skip)(f"needs {program}")
    return path


def make_certificate(folder: Path, *names: str) -> tuple[str, str]:
    """Creates a certificate without a known authority, and its key; returns the paths of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    made = authority.issue_cert(*names)
    certificate, key = folder / "fullchain.pem", folder / "privkey.pem"
    certificate.write_bytes(b"".join(each.bytes() for each in [*made.cert_chain_pems, authority.cert_pem]))
    key.write_bytes(made.private_key_pem.bytes())
    return str(certificate), str(key)


@contextmanager
def nginx_with(servers: str, folder: Path, *ports: int) -> Iterator[None]:
    """Runs nginx with these ``server`` blocks on these ports, until the block ends."""
    folder.mkdir(parents=True)
    # Otherwise its workers run as another user, without write access to this folder.
    user = "user root;" if os.getuid() == 0 else ""
    configuration = folder / "nginx.conf"
    configuration.write_text(_AROUND.format(folder=folder, servers=servers, user=user))
    command = [find("nginx"), "-p", str(folder), "-c", str(configuration), "-g", "daemon off;"]
    with _running(command, folder, ports):
        yield


@contextmanager
def nginx(app_port: int, folder: Path, *, removes_prefix: bool) -> Iterator[str]:
    """Runs ``examples/nginx.conf`` in front of the app on that port; yields the address of the page."""
    certificate, key = make_certificate(folder / "certificate", NAME, "127.0.0.1")
    http, https = free_port(), free_port()
    text = _replaced(
        (EXAMPLES / "nginx.conf").read_text(encoding="utf-8"),
        ("listen 80;", f"listen 127.0.0.1:{http};"),
        ("listen 443 ssl;", f"listen 127.0.0.1:{https} ssl;"),
        (f"/etc/letsencrypt/live/{NAME}/fullchain.pem", certificate),
        (f"/etc/letsencrypt/live/{NAME}/privkey.pem", key),
        ("proxy_pass http://127.0.0.1:7860;", f"proxy_pass http://127.0.0.1:{app_port}{'/' * removes_prefix};"),
    )
    with nginx_with(text, folder / "nginx", http, https):
        yield f"https://{NAME}:{https}/tts/"


@contextmanager
def bare_nginx(app_port: int, folder: Path, port: int) -> Iterator[str]:
    """Runs nginx with no setting but the address of the app; yields the address of the page."""
    location = f"location / {{ proxy_pass http://127.0.0.1:{app_port}; client_max_body_size 0; }}"
    with nginx_with(f"server {{ listen 127.0.0.1:{port}; {location} }}", folder, port):
        yield f"http://{NAME}:{port}/"


@contextmanager
def caddy(app_port: int, folder: Path, *, removes_prefix: bool) -> Iterator[str]:
    """Runs ``examples/Caddyfile`` in front of the app on that port; yields the address of the page.

    Uses a local certificate, since no public one is available for this name.
    """
    program, port = find("caddy"), free_port()
    certificate, key = make_certificate(folder / "certificate", NAME, "127.0.0.1")
    text = _replaced(
        (EXAMPLES / "Caddyfile").read_text(encoding="utf-8"),
        (
            f"\n{NAME} {{",
            f"\n{{\nadmin off\ngrace_period 1s\nauto_https disable_redirects\n}}\n"
            f"https://{NAME}:{port}, https://127.0.0.1:{port} {{\nbind 127.0.0.1\ntls {certificate} {key}",
        ),
        ("\thandle /", f"\thandle{'_path' * removes_prefix} /"),
        ("127.0.0.1:7860", f"127.0.0.1:{app_port}"),
    )
    (folder / "Caddyfile").write_text(text)
    with _running([program, "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"], folder, [port]):
        yield f"https://{NAME}:{port}/tts/"


def _replaced(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert text.count(old) == 1, f"{old!r} is not once in the example"
        text = text.replace(old, new)
    return text


@contextmanager
def _running(command: list[str], home: Path, ports: tuple[int, ...] | list[int]) -> Iterator[None]:
    environ = {**os.environ, "HOME": str(home), "XDG_DATA_HOME": str(home), "XDG_CONFIG_HOME": str(home)}
    log = (home / "log").open("w+")
    with log, subprocess.Popen(command, cwd=home, env=environ, stdout=log, stderr=log) as process:
        try:
            assert wait_until(lambda: process.poll() is not None or all(map(_listens, ports)))
            assert process.poll() is None, (home / "log").read_text()
            yield
        finally:
            process.terminate()
            process.wait(timeout=30)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
