"""Text fine-tuning."""
