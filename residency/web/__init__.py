"""The page and the HTTP API. They access the manager only through `protocols.Manager`."""

from ..errors import require

require("app", "gradio", "starlette", "fastapi", "fastapi_offline", "prometheus_client", "numpy", "soundfile")
