"""HTTP API and Gradio endpoints for programs."""
