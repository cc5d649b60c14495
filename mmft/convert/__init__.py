"""A trained model in other programs' formats, each result compared with the model it came from."""
