"""Shows which proxy setting is missing, if the page is opened through a proxy that does not forward its address.

``address.js`` checks in the browser, since the server cannot detect the page's address.
"""

from __future__ import annotations

from .. import static
from .page_head import with_script

around = with_script(static.text("address.js"))
"""An ASGI middleware."""
