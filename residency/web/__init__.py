"""The page and the HTTP calls. The manager is seen only through `protocols.Manager`."""

from ..extras import require

require("app", "gradio", "starlette", "fastapi", "fastapi_offline", "prometheus_client", "numpy", "soundfile")
