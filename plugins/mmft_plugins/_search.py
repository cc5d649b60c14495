"""A web search through Serper (https://serper.dev), or any endpoint that takes and answers what it does.

`{"q": "..."}` is posted as JSON; the answer is `{"answerBox": {...}, "organic": [{"title", "snippet", "link"}]}`. The
key is in SERPER_API_KEY, another endpoint in MMFT_SEARCH_URL. Titles and snippets are text for the model and no more.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from mmft.errors import DataError

SERPER = "https://google.serper.dev/search"
KEY, URL = "SERPER_API_KEY", "MMFT_SEARCH_URL"
SECONDS, MAX_BYTES, MAX_QUERY, MAX_HITS = 15, 500_000, 500, 5


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *given: Any, **options: Any) -> None:
        return None


def missing() -> str | None:
    """Why nothing can be searched for here."""
    url = os.environ.get(URL, "")
    if url and not url.startswith(("https://", "http://")):
        return f"{URL} is {url!r}; allowed is an address with https:// or http://"
    if url or os.environ.get(KEY, "").strip():
        return None
    return f"{KEY} is not set; get a key at serper.dev, or name another endpoint in {URL}"


def searched(query: str, seconds: float = SECONDS) -> str:
    """The first hits, a line each. Raises `DataError` where the search engine cannot be reached or answers nonsense."""
    if reason := missing():
        raise DataError(reason)
    body = json.dumps({"q": query[:MAX_QUERY]}).encode()
    url, key = os.environ.get(URL) or SERPER, os.environ.get(KEY, "").strip()
    headers = {"Content-Type": "application/json", **({"X-API-KEY": key} if key else {})}
    request = urllib.request.Request(url, body, headers, method="POST")
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=seconds) as response:
            content = _read(response, time.monotonic() + seconds)
    except urllib.error.HTTPError as error:
        refused = f"; is {KEY} right?" if error.code in (401, 403) else ""
        raise DataError(f"the search engine answers with HTTP {error.code}{refused}") from None
    except (OSError, ValueError) as error:  # no network, no such host, a broken header, too slow
        raise DataError(f"the search engine cannot be reached: {getattr(error, 'reason', None) or error}") from None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise DataError("the search engine answers with something that is no JSON") from None
    return "\n".join(_lines(found)) or "nothing found"


def _read(response: Any, deadline: float) -> bytes:
    """The whole answer, however slowly it comes, within the time and size there is."""
    content = b""
    while piece := response.read1(65_536):
        content += piece
        if len(content) > MAX_BYTES:
            raise DataError(f"the search engine answers with more than {MAX_BYTES:,} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
    return content


def _lines(found: Any) -> Iterator[str]:
    box, hits = (found.get("answerBox"), found.get("organic")) if isinstance(found, Mapping) else (None, None)
    if isinstance(box, Mapping) and (answer := _text(box, "answer") or _text(box, "snippet")):
        yield f"answer: {answer}"
    listed = [hit for hit in hits if isinstance(hit, Mapping)] if isinstance(hits, list) else []
    for number, hit in enumerate(listed[:MAX_HITS], 1):
        yield f"{number}. {_text(hit, 'title')}: {_text(hit, 'snippet')} ({_text(hit, 'link')})"


def _text(hit: Mapping[str, Any], key: str) -> str:
    """One line of at most 300 characters; empty where there is none."""
    value = hit.get(key)
    return " ".join(str(value).split())[:300] if isinstance(value, str | int | float) else ""
