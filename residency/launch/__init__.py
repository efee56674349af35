"""Start of the app: settings, signals, certificates, port, the launcher; and the command line for a running app."""
