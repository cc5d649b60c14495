"""Fixtures of the unit tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmft.testing import CHATML, tiny_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Callable[..., Any]:
    """A tiny tokenizer of transformers; `jinja=None` leaves it without a chat template."""
    from transformers import AutoTokenizer

    def tokenizer(jinja: str | None = CHATML, **options: Any) -> Any:
        folder = tiny_tokenizer(tmp_path / "tokenizer", chat_template=jinja or "", **options)
        loaded = AutoTokenizer.from_pretrained(folder)
        loaded.chat_template = jinja
        return loaded

    return tokenizer
