"""The families under test: their control tokens, their models' own jinja, and short conversations."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mmft.data.tokenize import Tokenizer, tokenize
from mmft.specs import ChatTemplate
from mmft.testing import tiny_tokenizer
from mmft.types import Conversation, Message, Role, Text
from mmft_plugins.family_templates import mmft_chat_templates

JINJA = Path(__file__).parent / "jinja"
TEMPLATES = {template.name: template for template in mmft_chat_templates()}
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
MISTRAL = (
    "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)  # fmt: skip
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
DEEPSEEK_TOOLS = (
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
    "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "</think>",
)  # fmt: skip
INTERNLM = ("<|action_start|>", "<|action_end|>", "<|plugin|>")
GLM = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
COHERE = (
    "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
)  # fmt: skip
# family: control tokens, BOS, EOS
TOKENS: dict[str, tuple[tuple[str, ...], str | None, str]] = {
    **dict.fromkeys(("qwen2", "qwen2_5", "qwen3", "smollm", "yi"), (CHATML, None, "<|im_end|>")),
    **dict.fromkeys(("internlm2_5", "internlm3"), (("<s>", "</s>", *CHATML, *INTERNLM), "<s>", "</s>")),
    **dict.fromkeys(("llama3_1", "llama3_2"), (LLAMA, "<|begin_of_text|>", "<|eot_id|>")),
    "mistral_v1": (("<s>", "</s>"), "<s>", "</s>"),
    **dict.fromkeys(("mistral_v2", "mistral_v3", "mistral_nemo"), (MISTRAL, "<s>", "</s>")),
    **dict.fromkeys(("gemma2", "gemma3"), (GEMMA, "<bos>", "<eos>")),
    "phi3": (("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"), None, "<|endoftext|>"),
    "phi4": ((*CHATML, "<|im_sep|>"), None, "<|im_end|>"),
    "deepseek_v3": (DEEPSEEK, DEEPSEEK[0], DEEPSEEK[1]),
    "deepseek_v3_1": ((*DEEPSEEK, *DEEPSEEK_TOOLS), DEEPSEEK[0], DEEPSEEK[1]),
    "glm4": (GLM, None, "<|endoftext|>"),
    "command_r": (COHERE, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "granite": (("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"), None, "<|end_of_text|>"),
}
MISTRALS = ("mistral_v2", "mistral_v3", "mistral_nemo")
OPENAI = ("qwen2_5", "qwen3", "llama3_1", "llama3_2", "granite", *MISTRALS)  # take tools as transformers gives them
INTERNLMS = ("internlm2_5", "internlm3")
TOOL_FAMILIES = (*OPENAI, *INTERNLMS, "glm4", "deepseek_v3_1", "command_r")
# auto finds no sound mask: Mistral loses the system text of a finished conversation, GLM-4 ends an answer with nothing
AUTO_REFUSES = (*MISTRALS, "glm4")


def loaded(folder: Path, name: str, jinja: str = "") -> Any:
    """A tiny tokenizer with a family's control tokens and the jinja of a file."""
    special, bos, eos = TOKENS[name]
    file = "mistral_v3" if name == "mistral_v2" else jinja or name
    text = (JINJA / f"{file}.jinja").read_text(encoding="utf-8")
    return AutoTokenizer.from_pretrained(tiny_tokenizer(folder, chat_template=text, special=special, bos=bos, eos=eos))


def talk(*turns: tuple[Role, str], **options: Any) -> Conversation:
    return Conversation(tuple(Message(role, (Text(text),)) for role, text in turns), **options)


def render(template: ChatTemplate, hf: Any, conversation: Conversation, *, prompt: bool = False) -> Any:
    segments = template.for_tokenizer(hf).render(conversation, generation_prompt=prompt)
    return tokenize(segments, Tokenizer(hf))
