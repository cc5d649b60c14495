"""What the oracle tests of families share."""

from collections.abc import Callable
from typing import Any

import pytest
from family_cases import loaded


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The tokenizer of a family, with its own jinja or that of another file."""
    return lambda name, jinja="": loaded(tmp_path_factory.mktemp(name), name, jinja)
