"""Text and picture weights in llama.cpp's format, and what Ollama needs beside them."""
