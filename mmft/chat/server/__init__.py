"""One model behind OpenAI's API."""
