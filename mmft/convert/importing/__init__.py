"""Models and parts of models that other programs trained, as mmft has them."""
