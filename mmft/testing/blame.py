"""Whatever an author's function raises while it is checked becomes a `PluginError` that names the offer."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mmft.errors import MmftError, PluginError
from mmft.plugins.places import described


@contextmanager
def blamed(where: str, function: Callable[..., Any]) -> Iterator[None]:
    """An exception in the block is that of `function`, which `where` names."""
    try:
        yield
    except PluginError:
        raise
    except MmftError as error:
        told = str(error)
        raise PluginError(told if told.startswith(where) else f"{where}: {told}") from error
    except (Exception, SystemExit) as error:
        raise PluginError(f"{where}: {described(error, getattr(function, '__module__', None))}") from error


def must_pickle(value: Any, name: str) -> None:
    """Specs and transforms travel to DataLoader workers. Raises `PluginError`."""
    try:
        pickle.loads(pickle.dumps(value))
    except Exception as error:
        raise PluginError(f"{name}: must pickle (use module-level functions): {error}") from error
