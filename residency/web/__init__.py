"""The page and the HTTP API. They access the manager only through `protocols.Manager`."""

from ..extras import require

require("app", "gradio", "starlette", "fastapi", "fastapi_offline", "prometheus_client", "numpy", "soundfile")
