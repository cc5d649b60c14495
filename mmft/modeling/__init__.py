"""The model: language model, vision encoder, projector, and the folder they are saved in."""
