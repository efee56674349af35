"""The HTTP server and everything that a request passes before the page or the API sees it."""
