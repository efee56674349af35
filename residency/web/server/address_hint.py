"""Tells people who open the page through a proxy that does not pass its address on what to set.

``address.js`` looks in the browser, since only that knows under which address the page was opened.
"""

from __future__ import annotations

from .. import static
from .page_head import with_script

around = with_script(static.text("address.js"))
"""An ASGI middleware."""
