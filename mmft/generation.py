"""One answer, token by token: how tokens are drawn, when they end, and the text they make as they come."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from mmft.errors import DataError

Finish: TypeAlias = Literal["stop", "length", "cancelled"]
MIN_TEMPERATURE = 1e-4  # below it, and beyond such a penalty, what is drawn from is no longer finite in float32
PENALTIES = 1e-4, 1e4
HALF_A_CHARACTER = "\ufffd"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How answers are drawn. Greedy unless the temperature says otherwise; `seed` makes sampling repeatable.

    `stop` are strings that end an answer, beside the template's own. Raises `DataError` for values no sampler takes.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 50
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        bounds = (
            ("max_new_tokens", self.max_new_tokens >= 1, "a whole number from 1"),
            (
                "temperature",
                self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < float("inf"),
                f"0 (greedy), or {MIN_TEMPERATURE} or more",
            ),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            (
                "repetition_penalty",
                PENALTIES[0] <= self.repetition_penalty <= PENALTIES[1],
                f"{PENALTIES[0]} to {PENALTIES[1]:.0f}; 1 is none",
            ),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "0 or more"),
            ("stop", all(self.stop), "strings that are not empty"),
        )
        for name, holds, allowed in bounds:
            if not holds:
                raise DataError(f"{name}={getattr(self, name)}: allowed is {allowed}")

    def options(self) -> dict[str, Any]:
        """As transformers' `generate` wants them; what a model's own generation_config.json says does not count."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return options


class Mark(str):
    """A control token as it is spelled: a piece of an answer that is not for the user's eyes."""


class Writer:
    """The text of an answer as its tokens come: whole characters, no control tokens, nothing from a stop string on.

    Called by transformers' `generate` as a stopping criterion, after each token. `send` gets the pieces. `cancel` ends
    the answer at the next token. A token costs the same at the end of a long answer as at its beginning. With `marks`
    control tokens are sent too, each as a `Mark`.
    """

    def __init__(
        self,
        hf: Any,
        stop_ids: Sequence[int],
        stop: Sequence[str],
        send: Callable[[str], None],
        cancel: Event,
        *,
        marks: bool = False,
    ) -> None:
        self.finish: Finish = "length"
        self._hf, self._stop_ids, self._stop, self._send, self._cancel = hf, set(stop_ids), tuple(stop), send, cancel
        self._ids: list[int] = []
        self._start = self._read = 0  # tokens from `_start` are decoded again, up to `_read` their text is known
        self._begun = False
        self._held = ""  # the end of the text, where it may become a stop string
        added = hf.added_tokens_decoder.items() if marks else ()
        self._marks = {number: str(token) for number, token in added if token.special}

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """bool[1], True where the answer is over; ids int64[1, new tokens]."""
        if self.finish == "length":
            token = int(ids[0, -1])
            if token in self._stop_ids:
                self.finish = "stop"
            else:
                self._ids.append(token)
                if token in self._marks:
                    self._take_mark(self._marks[token])
                else:
                    self._take(self._grown())
            if self._cancel.is_set() and self.finish == "length":
                self.finish = "cancelled"
        return torch.full((len(ids),), self.finish != "length", device=ids.device)

    def end(self) -> None:
        """Send what was held back: the beginning of a stop string, a broken character."""
        self._take(self._decoded(self._start)[len(self._decoded(self._start, self._read)) :])
        self._send_text(self._held)
        self._held = ""

    def _take_mark(self, spelling: str) -> None:
        """Send a control token, and before it what was held back."""
        self.end()
        self._read = len(self._ids)
        if self.finish == "length":
            self._send(Mark(spelling))

    def _grown(self) -> str:
        """The text that the last token completes; empty in the middle of a character."""
        known, now = self._decoded(self._start, self._read), self._decoded(self._start)
        if now.endswith(HALF_A_CHARACTER) or len(now) <= len(known):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(known) :]

    def _decoded(self, start: int, end: int | None = None) -> str:
        """Text of some tokens. A tokenizer may drop a space at their start, so only differences are used."""
        return str(self._hf.decode(self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _take(self, text: str) -> None:
        """Send a piece up to a stop string, or up to what may become one."""
        if not text:
            return
        text = self._held + text
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.finish, self._held = "stop", text[: min(ends)]
            return
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        self._send_text(text[: len(text) - held])

    def _send_text(self, text: str) -> None:
        if not self._begun:  # a template may let the answer begin with the space after its prompt
            text = text.lstrip()
        if text:
            self._begun = True
            self._send(text)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def cut_at(text: str, stop: Sequence[str]) -> str:
    """A whole answer up to its first stop string."""
    return text[: min([at for at in (text.find(end) for end in stop) if at >= 0], default=len(text))]
