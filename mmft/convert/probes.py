"""The probes: what every conversion is asked, before and after. Texts and pictures, made here and always the same.

Each is there for something that conversions lose: a role, a space, a byte, a position, a picture's shape or place.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mmft.inference import user_message
from mmft.types import Conversation, Message, Text

Size = tuple[int, int]  # width and height in pixels

# About 150 tokens. Four times as many were tried: llama.cpp, which keeps keys and values in 16 bits, then chose another
# word on tiny random models than their float32 did, and the gate took nearly twice the time.
LONG = "\n".join(f"{n}. Box {n} holds {7 * n % 31} apples, {n * n % 17} pears and {n % 3} plums." for n in range(1, 7))


@dataclass(frozen=True)
class Probe:
    """A conversation that ends in a question: `turns` in turn of user and assistant, pictures before the first."""

    name: str
    turns: tuple[str, ...]
    system: str = ""
    pictures: tuple[Size, ...] = ()


PROBES = (
    Probe("a question", ("What is the capital of France?",)),
    Probe("two turns", ("Name a colour.", "Red.", "And another one?")),
    Probe("unicode", ("用一句话介绍你自己。 ✓ «Ünïcödé»",)),
    Probe("code", ("def add(a, b):\n    return a + b\n\nWhat does this do?",)),
    Probe("white space", ("  List three fruits.\n\n",)),
    Probe("a system text", ("Who are you?",), system="You are a poet. Answer in rhymes."),
    Probe("a long text", (f"{LONG}\nWhich box holds most apples?",)),
    Probe("a picture", ("What is it?",), pictures=((217, 160),)),
    Probe("a tall picture", ("Describe the picture in one sentence.",), pictures=((96, 243),)),
    Probe("two pictures", ("Compare the two.",), pictures=((320, 120), (150, 150))),
    Probe("a picture, then text", ("What colour is it?", "It is red.", "Are you sure?"), pictures=((51, 64),)),
)


@contextmanager
def probes(*, pictures: bool) -> Iterator[list[tuple[str, Conversation]]]:
    """(name, conversation) of the probe set; its pictures are drawn into a folder that is gone afterwards."""
    with TemporaryDirectory() as folder:
        yield [
            (probe.name, _conversation(probe, draw(probe, Path(folder))))
            for probe in PROBES
            if pictures or not probe.pictures
        ]


def _conversation(probe: Probe, pictures: Sequence[Path]) -> Conversation:
    messages = [Message("system", (Text(probe.system),))] if probe.system else []
    messages.append(user_message(probe.turns[0], pictures))
    for k, turn in enumerate(probe.turns[1:]):
        messages.append(user_message(turn) if k % 2 else Message("assistant", (Text(turn),)))
    return Conversation(tuple(messages))


def draw(probe: Probe, folder: Path) -> list[Path]:
    """The pictures of a probe: edges, smooth parts and three different channels."""
    from PIL import Image, ImageDraw

    paths = []
    for number, (width, height) in enumerate(probe.pictures):
        ramp = Image.linear_gradient("L").resize((width, height))
        image = Image.merge("RGB", (ramp, ramp.rotate(90).resize((width, height)), ramp.rotate(180)))
        pen = ImageDraw.Draw(image)
        pen.ellipse((width // 5, height // 5, width * 4 // 5, height // 2), fill=(220, 30 + 90 * number, 30))
        pen.line((0, height, width, height // 3), fill=(10, 60, 200), width=7)
        paths.append(folder / f"{probe.name.replace(' ', '_').replace(',', '')}-{number}.png")
        image.save(paths[-1])
    return paths
