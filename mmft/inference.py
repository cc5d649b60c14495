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
from mmft.errors import DataError, MmftError
from mmft.folders import find_model as find_model
from mmft.generation import Generation as Generation
from mmft.generation import Writer, cut_at
from mmft.images import open_image
from mmft.memory import Memory, Usage
from mmft.modeling.build import build_model
from mmft.modeling.checkpoint import as_trained, read_manifest
from mmft.modeling.llava import LlavaModel
from mmft.plugins import Plugins
from mmft.specs import ChatTemplate
from mmft.types import Conversation, Image, Message, Text, TokenizedSample

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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

    @property
    def max_context(self) -> int | None:
        """Tokens of prompt and answer that the language model has positions for; None where it does not say."""
        config = self.model.causal_lm.config.get_text_config(decoder=True)
        positions = getattr(config, "max_position_embeddings", None)
        return int(positions) if positions else None

    def prompt(self, conversation: Conversation) -> TokenizedSample:
        """The ids that end where the answer begins. Raises `DataError` for pictures a text model is given."""
        return tokenize(self.template.render(conversation, generation_prompt=True), self.shape.tokenizer)

    def answer(self, conversation: Conversation, generation: Generation | None = None) -> str:
        """The whole answer to a conversation that ends in a question."""
        return "".join(self.stream(conversation, generation))

    def stream(
        self,
        conversation: Conversation,
        generation: Generation | None = None,
        memory: Memory | None = None,
        *,
        marks: bool = False,
        cancel: Event | None = None,
    ) -> Iterator[str]:
        """The answer in pieces, as it is written. Closing the iterator, or `cancel`, stops the model at its next token.

        With a `memory`, what its last prompt and this one share is not run again; its `usage` tells of this answer.
        With `marks` the answer's control tokens are among the pieces, as `Mark`.
        """
        prompt, generation, memory = self.prompt(conversation), generation or Generation(), memory or Memory()
        pieces: Queue[str | BaseException | None] = Queue()
        cancel = cancel or Event()
        stop = (*self.template.stop, *generation.stop)
        writer = Writer(self.shape.tokenizer.hf, self._stop_ids(), stop, pieces.put, cancel, marks=marks)

        def work() -> None:
            try:
                if self.model.device.type == "cuda":  # a new thread begins with number 0
                    torch.cuda.set_device(self.model.device)
                self._write(prompt, generation, memory, writer)
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
        except BaseException:  # nobody reads on
            cancel.set()
            raise
        finally:
            thread.join()

    def _write(self, prompt: TokenizedSample, generation: Generation, memory: Memory, writer: Writer) -> None:
        """Run what is new of a prompt and write its answer."""
        recall = memory.begin(self.model, self.shape.vision, prompt)
        ids = torch.from_numpy(prompt.input_ids.astype("int64"))[None]
        generated = self.model.generate(
            ids, image_features=recall.features, past_key_values=recall.cache, stopping_criteria=[writer],
            **self._options(generation),
        )  # fmt: skip
        writer.end()
        memory.keep(recall, generated[0].tolist())
        memory.usage = Usage(len(prompt), recall.reused, generated.shape[1], writer.finish)

    def answer_batch(self, conversations: Sequence[Conversation], generation: Generation | None = None) -> list[str]:
        """The answers to several conversations at once, prompts padded on the left."""
        prompts = [self.prompt(conversation) for conversation in conversations]
        generated = self._generate(prompts, generation or Generation())
        stop = (*self.template.stop, *(generation.stop if generation else ()))
        return [cut_at(self._text(ids), stop).strip() for ids in generated.tolist()]

    def _text(self, ids: list[int]) -> str:
        stops = set(self._stop_ids())
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        return str(self.shape.tokenizer.hf.decode(ids[:end], skip_special_tokens=True))

    def _stop_ids(self) -> list[int]:
        """eos and the template's stop strings that are one token; longer ones go to `stop_strings`."""
        tokenizer = self.shape.tokenizer
        ids = [ids[0] for ids in map(self._ids_of, self.template.stop) if len(ids) == 1]
        return sorted({*ids, *([tokenizer.eos_id] if tokenizer.eos_id is not None else [])})

    def _ids_of(self, text: str) -> list[int]:
        return [int(token) for token in self.shape.tokenizer.encode([text])[0]]

    def _generate(self, prompts: Sequence[TokenizedSample], generation: Generation) -> Tensor:
        """int64[B, new]: one call into the model for some prompts."""
        options = self._options(generation)
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), options["pad_token_id"], dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt.input_ids.astype("int64"))
            mask[row, width - len(prompt) :] = 1
        images = [open_image(image.source) for prompt in prompts for image in prompt.images]
        if images and self.shape.vision is None:
            raise DataError("the model has no vision encoder and takes no pictures")
        transform = self.shape.vision.transform if self.shape.vision else None
        pixels = torch.stack([transform(image) for image in images]) if images and transform else None
        if stop := [text for text in (*self.template.stop, *generation.stop) if len(self._ids_of(text)) != 1]:
            options |= {"stop_strings": stop, "tokenizer": self.shape.tokenizer.hf}
        return self.model.generate(ids, attention_mask=mask, pixel_values=pixels, **options)

    def _options(self, generation: Generation) -> dict[str, Any]:
        """Of transformers' `generate`; the random numbers are seeded here."""
        if generation.seed is not None:
            torch.manual_seed(generation.seed)
        stop_ids, pad = self._stop_ids(), self.shape.tokenizer.hf.pad_token_id
        pad = pad if pad is not None else next(iter(stop_ids), 0)
        return {"eos_token_id": stop_ids or None, "pad_token_id": pad, **generation.options()}


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
    plugins = as_trained(folder, manifest, plugins)
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
        template = plugins.chat_templates.get(chat_template or manifest.chat_template)
    except MmftError as error:
        raise type(error)(f"{folder}: {error}") from error
    try:
        bound = template.for_tokenizer(shape.tokenizer.hf)
    except MmftError as error:  # a base model, trained on documents
        raise type(error)(f"{folder}: {error}; for chat: --prompt-template NAME") from error
    return Assistant(built.eval(), shape, bound)
