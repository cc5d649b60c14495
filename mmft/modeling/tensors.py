"""Tables of weights held against each other: by name, and by shape."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from mmft.errors import CheckpointError

SHOWN = 4  # misfits in a message


def misfits(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """What of `found` is missing, unexpected or of another shape than in `own`, a word on each."""
    missing, unexpected = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    wrong = [
        f"{name} is {list(found[name].shape)}, here {list(own[name].shape)}"
        for name in sorted(own.keys() & found.keys())
        if own[name].shape != found[name].shape
    ]
    return [*(f"missing {name}" for name in missing), *(f"unexpected {name}" for name in unexpected), *wrong]


def refuse_misfits(found: Sequence[str], what: str) -> None:
    """Raise `CheckpointError` with the first of `misfits`, where there are any; `what` begins the line."""
    if found:
        raise CheckpointError(f"{what}: {'; '.join(found[:SHOWN])}")
