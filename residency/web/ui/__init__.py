"""Parts of the page: components, handlers and texts."""
