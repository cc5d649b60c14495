"""From a config to files: the training run."""
