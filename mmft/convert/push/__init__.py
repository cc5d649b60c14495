"""A model to a hub, with a card, and with nothing of the machine it was trained on."""
