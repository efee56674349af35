"""Keeps this process from sending requests for itself through a proxy of the network.

``http_proxy`` and its like are set where packages come through a proxy. Gradio's first request to its own server obeys
them, and ends the app if the proxy does not answer for this machine.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_EVERY_ADDRESS = {"0.0.0.0", "::", ""}


def reach_directly(host: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Add this machine, and the address ``host`` on which the app listens, to the names without a proxy.

    Both spellings are set: programs read one of ``no_proxy`` and ``NO_PROXY``, and not all the same.
    """
    host = host.strip("[]")
    own = [*_LOOPBACK, *([] if host in _EVERY_ADDRESS else [host])]
    present = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    names = dict.fromkeys([*(name.strip() for name in present.split(",") if name.strip()), *own])
    environ["no_proxy"] = environ["NO_PROXY"] = ",".join(names)
