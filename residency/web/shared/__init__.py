"""Used by all of the web page: the language of a request, the versions of Gradio, and what is asked of the manager."""
