"""Models as transformers' own classes."""
