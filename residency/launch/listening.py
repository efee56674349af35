"""Checks of the address, the port and the certificate, before models load; and the app's exception from the proxy."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import MutableMapping

from ..addresses import EVERY_ADDRESS
from ..errors import InvalidInput
from .terminal import output_of


def check_port(
    host: str, port: int, given: str = "", flags: tuple[str, str] = ("--server-name", "--server-port"), lowest: int = 0
) -> None:
    """Binds as a server does; raises `InvalidInput` with the holder of the port and a free port. Port 0: host only.

    ``given`` names the host in the message, ``flags`` set host and port; a port below ``lowest`` is refused.
    """
    if 0 < port < lowest:
        en, zh = f"the app has no rights to a port below {lowest}", f"应用无权使用低于 {lowest} 的端口"
    elif (error := _refusal(host, port)) is None:
        return
    elif getattr(error, "errno", None) == errno.EADDRINUSE:
        en, zh = "it is in use", "端口已被占用"
        for pid in holders_of_port(port)[:1]:
            command = (output_of("ps", "-o", "args=", "-p", str(pid)) or "")[:80]
            en, zh = f"{en} by pid {pid}: {command}", f"{zh}（进程 {pid}：{command}）"
    else:
        en = zh = getattr(error, "strerror", None) or ""
        en, zh = en or "not the name of a host", zh or "不是主机名"
    candidates = (*range(max(port + 1, lowest), 65536), *range(1024, port))
    other = next((each for each in candidates if not _refusal(host, each)), "") if not _refusal(host, 0) else ""
    name, number = flags[0], f"{flags[1]} {other}".strip()
    raise InvalidInput(
        f"Cannot listen on {given or host}, port {port}: {en}. Choose another port with {number} or an address of this "
        f"machine with {name} 127.0.0.1, or stop the program that uses the port",
        f"无法监听 {given or host} 的端口 {port}：{zh}。请用 {number} 换端口，或用 {name} 127.0.0.1 换本机地址，"
        f"或停止占用该端口的程序",
    )


def _refusal(host: str, port: int) -> OSError | UnicodeError | None:
    """Returns the error of a bind, if any; UnicodeError for an impossible host name, such as a..b."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As in the server: a port whose last connections are still closing counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        return error
    return None


def holders_of_port(port: int) -> list[int]:
    """Returns the pids of processes that listen on the port, as far as visible to this user."""
    pids = re.findall(r"pid=(\d+)", output_of("ss", "-Hltnp", f"sport = :{port}") or "")
    pids = pids or (output_of("lsof", "-nP", "-t", f"-iTCP:{port}", "-sTCP:LISTEN") or "").split()
    return sorted({int(pid) for pid in pids})


def reach_directly(host: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Adds loopback names and the listening address ``host`` to ``no_proxy`` and ``NO_PROXY``.

    Gradio's first request to its own server obeys ``http_proxy``, and fails the start if the proxy cannot reach it.
    Sets both variables, since programs differ in which one they read.
    """
    host = host.strip("[]")
    own = ["localhost", "127.0.0.1", "::1", *([] if host in (*EVERY_ADDRESS, "") else [host])]
    present = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    names = dict.fromkeys([*(name.strip() for name in present.split(",") if name.strip()), *own])
    environ["no_proxy"] = environ["NO_PROXY"] = ",".join(names)


def check_certificate(certfile: str | None, keyfile: str | None) -> None:
    """Raises `InvalidInput` unless a server can use these two PEM files, or neither is given."""
    if certfile is None and keyfile is None:
        return
    if certfile is None or keyfile is None:
        raise InvalidInput(
            "--ssl-certfile and --ssl-keyfile go together: give both for https, or neither",
            "--ssl-certfile 与 --ssl-keyfile 必须一起使用：启用 https 请两者都给出，否则都去掉",
        )
    import ssl  # a tenth of the time of app.py --help

    try:
        for path in (certfile, keyfile):
            open(path, "rb").close()
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, _no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InvalidInput(
                f"The key {keyfile} does not belong to the certificate {certfile}: give two files made together",
                f"私钥 {keyfile} 与证书 {certfile} 不匹配：请给出同一次生成的一对文件",
            ) from error
        raise InvalidInput(
            f"{certfile} and {keyfile} are not a certificate and its key in PEM format ({error.reason}): give "
            f"files that begin with -----BEGIN, such as fullchain.pem and privkey.pem",
            f"{certfile} 与 {keyfile} 不是 PEM 格式的证书与私钥（{error.reason}）："
            f"请给出以 -----BEGIN 开头的文件，例如 fullchain.pem 与 privkey.pem",
        ) from error
    except OSError as error:
        raise InvalidInput(
            f"Cannot read {error.filename} ({error.strerror}): give a PEM file that the user of the app may read",
            f"无法读取 {error.filename}（{error.strerror}）：请给出运行本应用的用户可读的 PEM 文件",
        ) from error


def _no_password() -> str:
    """Called for an encrypted key; without this callback, OpenSSL prompts on the terminal."""
    raise InvalidInput(
        "The key of --ssl-keyfile is encrypted: remove its password with openssl pkey -in KEY -out NEW",
        "--ssl-keyfile 的私钥已加密：请用 openssl pkey -in KEY -out NEW 去掉密码",
    )
