"""A model that calls tools, by a script: what it says is what a conversation of the script says, token for token.

It is a real Llama behind the real session, tokenizer, template and cache; only its logits are the script's. Asked for
anything but the beginning of a conversation of its script it fails, so a prompt that is not what training renders is
found here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from chat_models import make_assistant
from transformers import AutoConfig

from mmft.data.tokenize import tokenize
from mmft.inference import Assistant
from mmft.plugins import load_plugins
from mmft.testing import tiny_llm
from mmft.types import Conversation, Message, Text, ToolCall

CONTROL = (
    "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<|end_of_text|>", "<|start_of_role|>",
    "<|end_of_role|>", "<|Human|>", "<|Inner Thoughts|>", "<|Commands|>", "<|MOSS|>", "<|Results|>", "<eoh>", "<eot>",
    "<eoc>", "<eor>", "<eom>", "<|action_start|>", "<|action_end|>", "<|plugin|>", "[gMASK]", "<sop>", "<|system|>",
    "<|user|>", "<|assistant|>", "<|observation|>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>",
    "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "</think>", "<BOS_TOKEN>",
    "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
)  # fmt: skip


def asked(text: str) -> Message:
    return Message("user", (Text(text),))


def said(text: str, *calls: ToolCall) -> Message:
    return Message("assistant", (Text(text),) if text else (), calls)


def result(text: str, call_id: str | None = None) -> Message:
    return Message("tool", (Text(text),), call_id=call_id)


def calculates(expression: str, call_id: str | None = None) -> ToolCall:
    return ToolCall("calculate", {"expression": expression}, call_id)


def make_caller(folder: Path) -> Assistant:
    """A tiny Llama with the control tokens of every family and room for their preambles, and the template `chatml`."""
    llm = tiny_llm(folder / "llm", special=CONTROL, bos="<s>", eos="</s>", pad="<|endoftext|>")
    AutoConfig.from_pretrained(llm, max_position_embeddings=4096).save_pretrained(llm)
    return make_assistant(folder, sees=False, llm=llm)


def with_template(assistant: Assistant, name: str) -> Assistant:
    template = load_plugins().chat_templates.get(name).for_tokenizer(assistant.shape.tokenizer.hf)
    return replace(assistant, template=template)


@contextmanager
def scripted(assistant: Assistant, *script: Conversation) -> Iterator[None]:
    """While inside, the model says what the first conversation of the script says that begins as its prompt does."""
    tokenizer = assistant.shape.tokenizer
    talks = [tokenize(assistant.template.render(talk), tokenizer).input_ids.tolist() for talk in script]
    model = assistant.model.causal_lm
    seen: list[int] = []  # all ids so far, of the prompt and the answer
    new: list[int] = []  # those of this pass

    def embedded(module: Any, args: tuple[torch.Tensor, ...], output: Any) -> None:
        new[:] = args[0][0].tolist()

    def say(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        end = output.past_key_values.get_seq_length()
        seen[end - len(new) :] = new
        following = next((talk[end] for talk in talks if talk[:end] == seen and len(talk) > end), None)
        assert following is not None, f"not in the script: {tokenizer.hf.decode(seen)!r}"
        output.logits[:, -1] = -100.0
        output.logits[:, -1, following] = 100.0
        return output

    hooks = [
        model.get_input_embeddings().register_forward_hook(embedded),
        model.register_forward_hook(say, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def talk(tools: Sequence[Any], *messages: Message) -> Conversation:
    """A conversation with these tools advertised."""
    return Conversation(messages, tuple(tools))
