"""Decides when a model moves and which request gets it: state, planner, dispatcher, leases, policies."""
