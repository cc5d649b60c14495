"""LLaVA in two stages."""
