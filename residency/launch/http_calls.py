"""HTTP calls of a running app from a shell. Standard library only."""

from __future__ import annotations

import argparse
import sys
import urllib.parse
import urllib.request
from http.client import HTTPResponse

from ..sentences import in_locale
from .values import checked, sendable

DEFAULT_URL = "http://127.0.0.1:7860"


def add_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", type=_with_scheme, default=DEFAULT_URL, help="the app's address (default: %(default)s)"
    )


def add_secret(parser: argparse.ArgumentParser, flag: str, secret: str | None, help: str) -> None:
    parser.add_argument(flag, type=checked(sendable), default=secret, help=help)


def _with_scheme(url: str) -> str:
    return url if "://" in url else f"http://{url}"


def opened(request: urllib.request.Request, secret: str | None) -> HTTPResponse:
    """Sends a request with a bearer token; returns the response, or raises `urllib.error.URLError`."""
    if secret:
        request.add_header("Authorization", f"Bearer {secret}")
    # For a proxy, 127.0.0.1 is another machine.
    here = urllib.parse.urlsplit(request.full_url).hostname in ("localhost", "127.0.0.1", "::1")
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if here else []))
    response: HTTPResponse = opener.open(request, timeout=600)
    return response


def failed(sentence: str) -> int:
    """Prints a sentence, ``en / zh``, as one line to stderr; returns the exit code. Errors may quote several lines."""
    print(in_locale(" ".join(sentence.split())), file=sys.stderr)
    return 1


def untrusted(error: Exception, url: str) -> str | None:
    """Returns the sentence about a certificate that is not trusted; None for another error."""
    reason = getattr(error, "reason", None)
    if not getattr(reason, "verify_code", 0):
        return None
    return (
        f"The certificate of {url} is not trusted ({reason}): set SSL_CERT_FILE to the file of --ssl-certfile, and "
        f"use a name that is in it / {url} 的证书不受信任：请把环境变量 SSL_CERT_FILE 设为 --ssl-certfile 的文件，"
        f"并使用证书中的名称"
    )
