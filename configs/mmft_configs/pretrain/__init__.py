"""Incremental pretraining."""
