"""What starts the app or talks to one from a shell: settings, command line, signals, certificates, port."""
