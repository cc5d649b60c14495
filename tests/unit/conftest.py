"""Fixtures of the unit tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmft.plugins import load_plugins
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


@pytest.fixture(scope="session")
def llm_tokenizer(tiny_llm_path: Path) -> Any:
    """The tokenizer of the tiny Llama, as our own data code has it."""
    from transformers import AutoTokenizer

    from mmft.data.tokenize import Tokenizer

    return Tokenizer.for_model(AutoTokenizer.from_pretrained(tiny_llm_path))


@pytest.fixture
def counting(install: Callable[..., Path]) -> tuple[Any, Any]:
    """Plugins with a source of numbers, and that source: it says what was read of it, and where it was opened."""
    from streams import COUNTING

    install("counting-mmft", "1", {"counting": "counting_mod"}, counting_mod=COUNTING)
    plugins = load_plugins()
    import counting_mod  # type: ignore[import-not-found]

    counting_mod.READ.clear()
    counting_mod.STARTS.clear()
    return plugins, counting_mod


@pytest.fixture
def converted(tmp_path: Path, plugins: Any) -> Callable[..., Any]:
    """`converted(body, (old, new), ...)`: an XTuner config as ours (what was written, its config), texts replaced."""
    from xtuner_configs import TEXT, convert

    def converted(body: str = TEXT, *changes: tuple[str, str], after: str = "") -> Any:
        return convert(tmp_path, plugins, body, *changes, after=after)

    return converted
