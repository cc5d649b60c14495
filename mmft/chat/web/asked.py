"""A question on its way to its answer, and what has become of it, whoever comes first: its turn or the stop button."""

from dataclasses import dataclass, field
from threading import Lock
from typing import Literal

from mmft.chat.web.turns import Turn


@dataclass(eq=False)
class Asked:
    """A question that was asked: its turn, and how many turns stand before it. Shared by threads.

    It waits, is answered, and has ended. Where it is stopped while it waits, its place in the queue may come all the
    same; then it has ended too.
    """

    turn: Turn
    place: int
    _state: Literal["waiting", "stopped", "answering", "stopping", "ended"] = "waiting"
    _lock: Lock = field(default_factory=Lock, repr=False)

    @property
    def answering(self) -> bool:
        """Whether an answer is being written."""
        return self._state in ("answering", "stopping")

    @property
    def stopped(self) -> bool:
        """Whether the answer that is being written should end."""
        return self._state == "stopping"

    @property
    def ended(self) -> bool:
        """Whether its place in the queue has come and gone."""
        return self._state == "ended"

    def begin(self) -> bool:
        """Its place in the queue has come: whether there is an answer to write."""
        with self._lock:
            begins = self._state == "waiting"
            self._state = "answering" if begins else "ended"
            return begins

    def stop(self) -> bool:
        """Whoever asked wants no answer any more: whether there is a place in the queue to give up."""
        with self._lock:
            if waits := self._state in ("waiting", "stopped"):
                self._state = "stopped"
            elif self._state == "answering":
                self._state = "stopping"
            return waits

    def end(self) -> None:
        """The answer is written, or will not be."""
        with self._lock:
            self._state = "ended"
