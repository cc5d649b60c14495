"""Models that the parity gate asks: a folder as transformers opens it, without mmft, and a folder as mmft opens it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmft.convert.hf.classes import REMOTE_CODE, remote_code
from mmft.convert.parity import MAX_NEW_TOKENS
from mmft.convert.parts import stop_ids
from mmft.data.proof_cases import as_messages
from mmft.data.records import bound_template, is_unbound
from mmft.data.shape import describe_model
from mmft.errors import DataError
from mmft.images import open_image
from mmft.inference import Assistant, load_assistant
from mmft.modeling.attention import for_generation
from mmft.modeling.checkpoint import as_trained, read_manifest
from mmft.plugins import Plugins
from mmft.types import Conversation, Image


class TransformersResult:
    """The model of a folder through transformers' auto classes.

    Code in the folder is run where it is, byte for byte, what `mmft convert hf` writes, and never otherwise.
    """

    def __init__(self, folder: Path, *, sees: bool, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

        model_class = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        trusted = is_our_code(folder)
        self.model = model_class.from_pretrained(folder, dtype=dtype, trust_remote_code=trusted).to(device).eval()
        # the backend that has the pixels of training to the bit; torchvision's resizes with other rounding
        options = {"trust_remote_code": trusted}
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil", **options) if sees else None
        self.tokenizer = self.processor.tokenizer if self.processor else AutoTokenizer.from_pretrained(folder)

    def inputs(self, conversation: Conversation) -> tuple[list[int], Tensor | None]:
        """See `Result`."""
        found = self._inputs(conversation)
        return found["input_ids"][0].tolist(), found.get("pixel_values")

    def _inputs(self, conversation: Conversation) -> dict[str, Any]:
        asked = self.processor or self.tokenizer
        if not asked.chat_template:  # a base model goes on from a text
            return dict(self.tokenizer(conversation.messages[0].text, return_tensors="pt"))
        messages = as_messages(conversation, parts=bool(conversation.images))
        sources = iter(conversation.images)
        for message, original in zip(messages, conversation.messages, strict=True):
            for part, was in zip(message["content"] if conversation.images else (), original.parts, strict=False):
                if isinstance(was, Image):
                    part["path"] = str(next(sources).source)
        options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        found: dict[str, Any] = dict(asked.apply_chat_template(messages, **options))
        return found

    @torch.no_grad()
    def logits(self, conversation: Conversation, tokens: Sequence[int]) -> Tensor:
        """See `Result`."""
        found = self._inputs(conversation)
        ids = torch.cat([found["input_ids"], torch.tensor([list(tokens)], dtype=torch.long)], 1)
        options = {"pixel_values": found["pixel_values"].to(self.model.dtype)} if "pixel_values" in found else {}
        options = {key: value.to(self.model.device) for key, value in options.items()}
        logits = self.model(input_ids=ids.to(self.model.device), logits_to_keep=len(tokens) + 1, **options).logits
        result: Tensor = logits[0].float().cpu()
        return result

    @torch.no_grad()
    def greedy(self, conversation: Conversation, max_new_tokens: int) -> list[int]:
        """See `Result`; ends where the folder's own generation_config says."""
        found = {key: value.to(self.model.device) for key, value in self._inputs(conversation).items()}
        if "pixel_values" in found:
            found["pixel_values"] = found["pixel_values"].to(self.model.dtype)
        generated = self.model.generate(**found, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
        tokens: list[int] = generated[0, found["input_ids"].shape[1] :].tolist()
        return tokens


def is_our_code(folder: Path) -> bool:
    """Whether all the code that the configs of a folder name is what `mmft convert hf` writes."""
    configs = [json.loads(path.read_text("utf-8")) for path in folder.glob("*config.json")]
    named = {name for config in configs for name in config.get("auto_map", {}).values()}
    code, module = folder / REMOTE_CODE, REMOTE_CODE.removesuffix(".py")
    ours = all(isinstance(name, str) and name.rpartition(".")[0] == module for name in named)
    return bool(named) and ours and code.is_file() and code.read_bytes() == remote_code()


def load_trained(
    folder: Path, plugins: Plugins, *, device: torch.device, precision: str, llm: str | None = None
) -> Assistant:
    """The trained model as `mmft chat` has it; a base model without a chat template goes on from a question.

    Raises as `load_assistant`.
    """
    manifest = read_manifest(folder)
    plugins = as_trained(folder, manifest, plugins)
    model = manifest.model
    if llm is not None:
        model = model.model_copy(update={"llm": model.llm.model_copy(update={"path": llm})})
    tokenizer = describe_model(model, plugins, folder).tokenizer
    template = bound_template(manifest.chat_template, plugins, tokenizer)
    other = next(one.name for one in plugins.chat_templates if one.bind is None) if is_unbound(template) else None
    source = load_assistant(folder, plugins, device=device, precision=precision, llm=llm, chat_template=other)
    return replace(source, template=template) if other else source


class OurResult:
    """A model folder of ours, as `mmft chat` has it."""

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        self._stop = stop_ids(assistant.template, assistant.shape)

    def inputs(self, conversation: Conversation) -> tuple[list[int], Tensor | None]:
        """See `Result`. Raises `DataError` for a conversation the template has no form, or the model no room for."""
        prompt = self.assistant.prompt(conversation)
        room = self.assistant.max_context
        if room is not None and len(prompt) + MAX_NEW_TOKENS > room:
            raise DataError(f"it takes {len(prompt)} tokens, and the model has positions for {room}")
        vision = self.assistant.shape.vision
        if not prompt.images or vision is None:
            return prompt.input_ids.tolist(), None
        pixels = torch.stack([vision.transform(open_image(image.source)) for image in prompt.images])
        return prompt.input_ids.tolist(), pixels

    @torch.no_grad()
    def logits(self, conversation: Conversation, tokens: Sequence[int]) -> Tensor:
        """See `Result`."""
        ids, pixels = self.inputs(conversation)
        whole = torch.tensor([[*ids, *tokens]], device=self.assistant.model.device)
        with for_generation(self.assistant.model.causal_lm):
            logits = self.assistant.model(input_ids=whole, pixel_values=pixels)["logits"][0, len(ids) - 1 :]
        result: Tensor = logits.float().cpu()
        return result

    def greedy(self, conversation: Conversation, max_new_tokens: int) -> list[int]:
        """See `Result`."""
        ids, pixels = self.inputs(conversation)
        options: dict[str, Any] = {"eos_token_id": self._stop or None, "pad_token_id": next(iter(self._stop), 0)}
        generated = self.assistant.model.generate(
            torch.tensor([ids]), pixel_values=pixels, max_new_tokens=max_new_tokens, do_sample=False, **options
        )
        tokens: list[int] = generated[0].tolist()
        return tokens
