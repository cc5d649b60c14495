"""Models that the parity gate asks: a folder as transformers opens it, without mmft, and a folder as mmft opens it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmft.convert.parts import stop_ids
from mmft.data.proof_cases import as_messages
from mmft.images import open_image
from mmft.inference import Assistant
from mmft.modeling.attention import for_generation
from mmft.types import Conversation, Image


class TransformersResult:
    """The model of a folder through transformers' auto classes."""

    def __init__(self, folder: Path, *, sees: bool, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

        model_class = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        self.model = model_class.from_pretrained(folder, dtype=dtype).to(device).eval()
        # the backend that has the pixels of training to the bit; torchvision's resizes with other rounding
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil") if sees else None
        self.tokenizer = self.processor.tokenizer if self.processor else AutoTokenizer.from_pretrained(folder)

    def inputs(self, conversation: Conversation) -> tuple[list[int], Tensor | None]:
        """See `Result`."""
        found = self._inputs(conversation)
        return found["input_ids"][0].tolist(), found.get("pixel_values")

    def _inputs(self, conversation: Conversation) -> dict[str, Any]:
        messages = as_messages(conversation, parts=bool(conversation.images))
        sources = iter(conversation.images)
        for message, original in zip(messages, conversation.messages, strict=True):
            for part, was in zip(message["content"] if conversation.images else (), original.parts, strict=False):
                if isinstance(was, Image):
                    part["path"] = str(next(sources).source)
        asked = self.processor or self.tokenizer
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


class OurResult:
    """A model folder of ours, as `mmft chat` has it."""

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        self._stop = stop_ids(assistant.template, assistant.shape)

    def inputs(self, conversation: Conversation) -> tuple[list[int], Tensor | None]:
        """See `Result`. Raises `DataError` where the template has no form for the conversation."""
        prompt = self.assistant.prompt(conversation)
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
