"""Requests for speech: uploads, conversion, the queue, the call of the engine, the files of results."""
