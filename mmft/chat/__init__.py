"""Talking to a model: one session behind the terminal and the page."""
