"""HTTP calls and Gradio endpoints for programs."""
