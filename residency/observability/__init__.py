"""Records what happens: events, history, memory outside the books, classes of errors."""
