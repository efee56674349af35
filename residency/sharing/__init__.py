"""Shares one card with other processes: leaves when they need room, and queues for room with them."""
