"""Excludes the app's own addresses from the network's proxy.

Gradio's first request to its own server obeys ``http_proxy``, and fails the start if the proxy cannot reach it.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from ..addresses import EVERY_ADDRESS

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def reach_directly(host: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Adds loopback names and the listening address ``host`` to ``no_proxy`` and ``NO_PROXY``.

    Sets both, since programs differ in which one they read.
    """
    host = host.strip("[]")
    own = [*_LOOPBACK, *([] if host in (*EVERY_ADDRESS, "") else [host])]
    present = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    names = dict.fromkeys([*(name.strip() for name in present.split(",") if name.strip()), *own])
    environ["no_proxy"] = environ["NO_PROXY"] = ",".join(names)
