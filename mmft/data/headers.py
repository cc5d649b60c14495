"""Image files, many at once: which of them cannot be read, and how large the others are.

On a local disk one thread reads more headers than any data set needs (18,000 a second, two cores; four threads 7,500,
for Python runs one at a time). A few threads are there for network file systems, where reading is waiting.
"""

import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from mmft.errors import DataError
from mmft.images import MAX_PIXELS, image_size, open_image

WORKERS = 4
CHUNK = 64  # files a task: a future a file would cost as much as the header


@dataclass(frozen=True)
class ImageReport:
    """What was found in a set of image files. `bad` maps a path to its reason, in the order the paths came."""

    num_images: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    smallest: tuple[int, int] | None = None  # width, height of the picture with the fewest pixels
    largest: tuple[int, int] | None = None
    decoded: bool = False  # every pixel was read, not only the headers

    @property
    def reasons(self) -> Counter[str]:
        """How many files there are of each kind of reason, without the details of each."""
        return Counter(reason_kind(reason) for reason in self.bad.values())


def check_images(
    paths: Iterable[str],
    *,
    decode: bool = False,
    workers: int = WORKERS,
    progress: Callable[[int], None] = lambda _: None,
) -> ImageReport:
    """Read the header of each distinct file; with `decode` all its pixels, which alone shows a file cut off.

    `progress` is called with the number of files read since it was called last, from this thread.
    """
    distinct = list(dict.fromkeys(paths))
    chunks = [distinct[start : start + CHUNK] for start in range(0, len(distinct), CHUNK)]
    sizes: list[tuple[int, int]] = []
    bad: dict[str, str] = {}
    # catch_warnings is not for threads, so it stands around all of them: a picture too large is counted, not warned of
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore")
        waiting = iter(chunks)
        running = deque(pool.submit(_read, chunk, decode) for chunk in islice(waiting, 4 * workers))
        for chunk in chunks:
            found = running.popleft().result()
            running.extend(pool.submit(_read, chunk, decode) for chunk in islice(waiting, 1))
            for path, size in zip(chunk, found, strict=True):
                if isinstance(size, str):
                    bad[path] = size
                else:
                    sizes.append(size)
            progress(len(found))
    return ImageReport(
        len(distinct),
        bad,
        min(sizes, key=_pixels, default=None),
        max(sizes, key=_pixels, default=None),
        decode,
    )


def _read(paths: Sequence[str], decode: bool) -> list[tuple[int, int] | str]:
    return [_size_or_reason(path, decode) for path in paths]


def _size_or_reason(path: str, decode: bool) -> tuple[int, int] | str:
    try:
        return open_image(path).size if decode else image_size(path)
    except DataError as error:
        return str(error).removeprefix(f"{path}: ")


def _pixels(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def reason_kind(reason: str) -> str:
    """What a reason has in common with others of its kind: no sizes, no decoder's message."""
    if " pixels; at most " in reason or "DecompressionBombError" in reason:  # Pillow's own limit is twice ours
        return f"more than {MAX_PIXELS:,} pixels"
    return reason.partition(": ")[0].partition(";")[0]
