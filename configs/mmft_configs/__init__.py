"""Configs mmft ships."""
