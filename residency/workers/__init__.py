"""The engine of a model in a process of its own, from which a release leaves nothing on the device."""
