"""Shared by all web packages: the language of a request, Gradio compatibility, the manager's protocol."""
