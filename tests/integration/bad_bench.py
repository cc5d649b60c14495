"""A folder of pictures and records that are handed in both ways: to a run, and to `mmft data check FILE`."""

import json
from pathlib import Path
from typing import Any

from PIL import Image as Pillow
from rich.progress import Progress
from transformers import AutoTokenizer

from mmft.config import Data, Dataset, use
from mmft.data.check_file import FileOptions, check_file
from mmft.data.check_report import CheckReport
from mmft.data.collate import Collator
from mmft.data.dataset import prepare
from mmft.data.store import TokenStore
from mmft.data.tokenize import Tokenizer
from mmft.images import ImageTransform
from mmft.plugins import Plugins

PATCHES = 4
PIXELS = ImageTransform(resize=(8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), resample=0)


def told(*values: str, image: Any = None, speakers: tuple[str, ...] = ("human", "gpt")) -> dict[str, Any]:
    """A record of the `llava` data map."""
    turns = [{"from": speakers[n % len(speakers)], "value": value} for n, value in enumerate(values)]
    return {"id": "r2", "conversations": turns} | ({} if image is None else {"image": image})


GOOD = told("Hi?", "Hello."), told("<image>\nWhat?", "A dot.", image="dot.png")


class Bench:
    """A folder with pictures, and both ways to hand in a file of records."""

    def __init__(self, folder: Path, plugins: Plugins, llm: Path) -> None:
        self.folder, self.plugins = folder, plugins
        self.tokenizer = Tokenizer.for_model(AutoTokenizer.from_pretrained(llm), PATCHES)
        self.images = folder / "images"
        self.images.mkdir()
        Pillow.new("RGB", (8, 8), "red").save(self.images / "dot.png")

    def write(self, content: Any, name: str = "data.json") -> Path:
        file = self.folder / name
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            lines = "\n".join(map(json.dumps, content)) if file.suffix == ".jsonl" else json.dumps(content)
            file.write_text(lines, "utf-8")
        return file

    def prepare(self, file: Path, **options: Any) -> TokenStore:
        """What a run does before its first step."""
        source = use(file.suffix[1:], path=str(file))
        dataset = Dataset(source=source, data_map="llava", image_folder=self.images)
        given = {"chat_template": "chatml", "max_length": 256, "max_bad_fraction": 1.0, **options}
        return prepare(Data(datasets=(dataset,), **given), self.plugins, self.tokenizer, self.folder / "cache")

    def check(self, file: Path, **options: Any) -> CheckReport:
        """What `mmft data check FILE --image-folder` does."""
        given = {"data_map": "llava", "image_folder": self.images, **options}
        with Progress(disable=True) as progress:
            return check_file(file, self.plugins, FileOptions(**given), progress)

    def batch(self, store: TokenStore, on_bad_sample: Any = "drop") -> Any:
        """The batch of all samples, as a worker makes it."""
        collate = Collator("flat", transform=PIXELS, on_bad_sample=on_bad_sample)
        return collate([store[item] for item in range(len(store))])
