"""A trained model and everything it takes to ask it something: what sample chat, chat, web and eval share.

The prompt is made by the functions training uses (template, `tokenize`), so what is asked is a prefix of what was
trained.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from mmft.data.shape import Shape, describe_model
from mmft.data.tokenize import tokenize
from mmft.errors import CheckpointError, DataError, MmftError
from mmft.images import open_image
from mmft.modeling.build import build_model
from mmft.modeling.checkpoint import MANIFEST, checkpoints, read_manifest
from mmft.modeling.llava import LlavaModel
from mmft.plugins import Plugins
from mmft.specs import ChatTemplate
from mmft.types import Conversation, Image, Message, Text, TokenizedSample

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How answers are drawn. Greedy unless the temperature says otherwise; `seed` makes sampling repeatable."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 50
    repetition_penalty: float = 1.0
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """As transformers' `generate` wants them."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.repetition_penalty != 1.0:
            options["repetition_penalty"] = self.repetition_penalty
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return options


@dataclass(frozen=True)
class Assistant:
    """A model, its tokenizer and its chat template."""

    model: LlavaModel
    shape: Shape
    template: ChatTemplate

    @property
    def sees(self) -> bool:
        """Whether it takes pictures."""
        return self.shape.vision is not None

    def prompt(self, conversation: Conversation) -> TokenizedSample:
        """The ids that end where the answer begins. Raises `DataError` for pictures a text model is given."""
        return tokenize(self.template.render(conversation, generation_prompt=True), self.shape.tokenizer)

    def answer(self, conversation: Conversation, generation: Generation | None = None) -> str:
        """The whole answer to a conversation that ends in a question."""
        return "".join(self.stream(conversation, generation))

    def stream(self, conversation: Conversation, generation: Generation | None = None) -> Iterator[str]:
        """The answer in pieces, as it is written. Closing the iterator stops the model at its next token."""
        prompt = self.prompt(conversation)
        pieces: Queue[str | BaseException | None] = Queue()
        stop = Event()
        streamer = _Streamer(self.shape.tokenizer.hf, self._stop_ids(), pieces)

        def work() -> None:
            try:
                self._generate([prompt], generation or Generation(), streamer=streamer, stop=stop)
                pieces.put(None)
            except BaseException as error:  # handed over to the thread that reads
                pieces.put(error)

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            stop.set()
            thread.join()

    def answer_batch(self, conversations: Sequence[Conversation], generation: Generation | None = None) -> list[str]:
        """The answers to several conversations at once, prompts padded on the left."""
        prompts = [self.prompt(conversation) for conversation in conversations]
        generated = self._generate(prompts, generation or Generation())
        return [self._text(ids) for ids in generated.tolist()]

    def _text(self, ids: list[int]) -> str:
        stops = set(self._stop_ids())
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        return str(self.shape.tokenizer.hf.decode(ids[:end], skip_special_tokens=True)).strip()

    def _stop_ids(self) -> list[int]:
        """eos and the template's stop strings that are one token; longer ones go to `stop_strings`."""
        tokenizer = self.shape.tokenizer
        ids = [ids[0] for ids in map(self._ids_of, self.template.stop) if len(ids) == 1]
        return sorted({*ids, *([tokenizer.eos_id] if tokenizer.eos_id is not None else [])})

    def _ids_of(self, text: str) -> list[int]:
        return [int(token) for token in self.shape.tokenizer.encode([text])[0]]

    def _generate(self, prompts: Sequence[TokenizedSample], generation: Generation, **extra: Any) -> Tensor:
        """int64[B, new]: one call into the model for some prompts."""
        hf = self.shape.tokenizer.hf
        stop_ids = self._stop_ids()
        pad = hf.pad_token_id if hf.pad_token_id is not None else stop_ids[0]
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt.input_ids.astype("int64"))
            mask[row, width - len(prompt) :] = 1
        images = [open_image(image.source) for prompt in prompts for image in prompt.images]
        if images and self.shape.vision is None:
            raise DataError("the model has no vision encoder and takes no pictures")
        transform = self.shape.vision.transform if self.shape.vision else None
        pixels = torch.stack([transform(image) for image in images]) if images and transform else None
        stop_strings = [text for text in self.template.stop if len(self._ids_of(text)) != 1]
        if stop_strings:
            extra |= {"stop_strings": stop_strings, "tokenizer": hf}
        if (stop := extra.pop("stop", None)) is not None:
            extra["stopping_criteria"] = [lambda ids, scores: torch.full((len(ids),), stop.is_set(), device=ids.device)]
        if generation.seed is not None:
            torch.manual_seed(generation.seed)
        return self.model.generate(
            ids, attention_mask=mask, pixel_values=pixels, eos_token_id=stop_ids, pad_token_id=pad,
            **generation.options(), **extra,
        )  # fmt: skip


def user_message(text: str, images: Sequence[str | Path] = ()) -> Message:
    """A user's turn: the pictures first and a newline after each, as the `llava` data map puts them.

    Raises `DataError` where there is nothing in it, or bytes that are no UTF-8 came in through the shell.
    """
    if not text.strip() and not images:
        raise DataError("the question is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the question is not UTF-8 text (at character {error.start})") from error
    parts: list[Text | Image] = []
    for image in images:
        parts += [Image(image), Text("\n")]
    if parts:
        parts.pop()
        text = "\n" + text
    return Message("user", (*parts, Text(text)))


class _Streamer:
    """transformers' streamer protocol: whole characters to a queue, control tokens left out."""

    def __init__(self, hf: Any, stop_ids: Sequence[int], pieces: "Queue[str | BaseException | None]") -> None:
        self._hf, self._stop, self._pieces = hf, set(stop_ids), pieces
        self._ids: list[int] = []
        self._shown = 0

    def put(self, value: Tensor) -> None:
        """Take the newest token; `generate` also sends the (empty) prompt once."""
        self._ids += [token for token in value.flatten().tolist() if token not in self._stop]
        text = self._hf.decode(self._ids, skip_special_tokens=True)
        if text.endswith("\ufffd"):  # the middle of a character
            return
        self._send(text)

    def end(self) -> None:
        """Send what a broken character held back."""
        self._send(self._hf.decode(self._ids, skip_special_tokens=True))

    def _send(self, text: str) -> None:
        text = text.lstrip()  # a template may let the answer begin with the space after its prompt
        if len(text) > self._shown:
            self._pieces.put(text[self._shown :])
            self._shown = len(text)


def load_assistant(
    folder: Path,
    plugins: Plugins,
    *,
    device: torch.device,
    precision: str | None = None,
    quantization: str | None = None,
    llm: str | None = None,
    chat_template: str | None = None,
) -> Assistant:
    """The model of a folder that training wrote, in eval mode. `llm` is where its base model is now, if it moved.

    Raises `CheckpointError` for a damaged folder and `ModelError` where the base model is not found.
    """
    manifest = read_manifest(folder)
    changes = {k: v for k, v in (("path", llm), ("quantization", quantization)) if v is not None}
    model = manifest.model.model_copy(update={"llm": manifest.model.llm.model_copy(update=changes)})
    try:
        shape = describe_model(model, plugins, folder)
        built = build_model(
            model,
            plugins,
            info=shape.vision,
            image_id=shape.tokenizer.image_id,
            dtype=PRECISIONS[precision or manifest.precision],
            device=device,
            weights=folder,
        )
    except MmftError as error:
        raise type(error)(f"{folder}: {error}") from error
    template = plugins.chat_templates.get(chat_template or manifest.chat_template)
    return Assistant(built.eval(), shape, template.for_tokenizer(shape.tokenizer.hf))


def find_model(reference: str | None, work_dirs: Path = Path("work_dirs")) -> Path:
    """The model folder behind a folder, a run, or nothing (the newest finished run under work_dirs).

    Raises `CheckpointError` where there is none.
    """
    if reference is None:
        finished = sorted(work_dirs.glob(f"**/final/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
        if not finished:
            raise CheckpointError(f"no finished run under {work_dirs}; name a model folder or a run")
        return finished[-1].parent
    folder = Path(reference)
    for candidate in (folder, folder / "final", *checkpoints(folder)):
        if (candidate / MANIFEST).is_file():
            return candidate
    found = "holds no model (no mmft.json, no final/, no checkpoint)" if folder.is_dir() else "does not exist"
    raise CheckpointError(f"{reference} {found}; give a run's folder, its final/, or a checkpoint")
