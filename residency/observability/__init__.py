"""Events, history, unmanaged memory, and classification of errors."""
