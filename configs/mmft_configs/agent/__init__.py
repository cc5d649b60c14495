"""Agent and tool data."""
