"""Scheduling: model state, planner, dispatcher, leases and policies."""
