"""Starts the app, or talks to one from a shell: settings, signals, certificates, port, and the launcher."""
