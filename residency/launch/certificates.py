"""Checks certificate files for https before other modules are loaded."""

from __future__ import annotations

from ..errors import InvalidInput


def check_certificate(certfile: str | None, keyfile: str | None) -> None:
    """Raises `InvalidInput` unless a server can use these two PEM files, or neither is given."""
    if certfile is None and keyfile is None:
        return
    if certfile is None or keyfile is None:
        raise InvalidInput(
            "--ssl-certfile and --ssl-keyfile go together: give both for https, or neither",
            "--ssl-certfile 与 --ssl-keyfile 必须一起使用：启用 https 请两者都给出，否则都去掉",
        )
    for flag, path in (("--ssl-certfile", certfile), ("--ssl-keyfile", keyfile)):
        try:
            open(path, "rb").close()
        except OSError as error:
            raise InvalidInput(
                f"Cannot read {flag} {path} ({error.strerror}): give a PEM file that the user of the app may read",
                f"无法读取 {flag} {path}（{error.strerror}）：请给出运行本应用的用户可读的 PEM 文件",
            ) from error
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, _no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InvalidInput(
                f"The key {keyfile} does not belong to the certificate {certfile}: give the two made together",
                f"私钥 {keyfile} 与证书 {certfile} 不匹配：请给出同一次生成的一对文件",
            ) from error
        raise InvalidInput(
            f"{certfile} and {keyfile} are not a certificate and its key in PEM format ({error.reason}): give "
            f"files that begin with -----BEGIN, such as fullchain.pem and privkey.pem",
            f"{certfile} 与 {keyfile} 不是 PEM 格式的证书与私钥（{error.reason}）："
            f"请给出以 -----BEGIN 开头的文件，例如 fullchain.pem 与 privkey.pem",
        ) from error


def _no_password() -> str:
    """Called for an encrypted key; without this callback, OpenSSL prompts on the terminal."""
    raise InvalidInput(
        "The key of --ssl-keyfile is encrypted: remove its password with openssl pkey -in KEY -out NEW",
        "--ssl-keyfile 的私钥已加密：请用 openssl pkey -in KEY -out NEW 去掉密码",
    )
