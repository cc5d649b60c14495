"""Requests to the server, and what they are made of."""

import base64
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

LOOK_UP = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"word": {"type": "string"}}}},
}


QUESTION = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12}


def data_url(color: str, tmp_path: Path) -> str:
    PILImage.new("RGB", (30, 20), color).save(tmp_path / f"{color}.png")
    return "data:image/png;base64," + base64.b64encode((tmp_path / f"{color}.png").read_bytes()).decode()


def shown(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
