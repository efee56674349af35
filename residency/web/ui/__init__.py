"""Parts of the page: their components, their handlers, and the sentences on them."""
