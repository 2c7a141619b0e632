"""Bringing up and checking whole clusters."""
