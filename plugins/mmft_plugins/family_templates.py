"""Chat templates of current model families, each with the token ids of its model's own jinja template.

`tests/oracle/test_family_templates.py` compares them. Where a model's own template cannot take a conversation (a system
text in Gemma 2 or Mistral v1, which know none), ours puts it before the first question, as their successors do.

Three kinds rewrite earlier turns once others follow: Qwen3 takes thoughts out of the history, Mistral v2, v3 and Nemo
move the system text to the last question, and Command R asks for the use of tools after everything. What an earlier
answer was given is then no longer what inference shows, so of such a conversation only the last answer is trained;
`rewrites_history` makes a run say so.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from mmft import hookimpl
from mmft.errors import DataError
from mmft.specs import ChatTemplate, RenderFn
from mmft.types import Conversation, Message, Text
from mmft_plugins._calls import (
    COHERE,
    DEEPSEEK,
    DEEPSEEK_CALL,
    HERMES,
    INTERNLM,
    LLAMA_MARKS,
    MISTRAL,
    Read,
    read_command_r,
    read_deepseek,
    read_glm,
    read_hermes,
    read_internlm,
    read_llama,
    read_mistral,
)
from mmft_plugins._cohere import render_command_r
from mmft_plugins._deepseek import END as DEEPSEEK_END
from mmft_plugins._deepseek import prepare_deepseek, render_deepseek
from mmft_plugins._families import Family, qwen, render_family
from mmft_plugins._glm import render_glm
from mmft_plugins._internlm import render_internlm
from mmft_plugins._mistral import render_mistral
from mmft_plugins._tools import as_json
from mmft_plugins.templates import stripped

HUB = "https://huggingface.co/{}/blob/main/tokenizer_config.json"
Prepare = Callable[[Conversation], Conversation]
Reader = tuple[Callable[[str], Read], tuple[str, ...]]  # of an answer's calls, and where one may begin

QWEN2 = qwen("qwen2", "You are a helpful assistant.", tools=False)
QWEN2_5 = qwen("qwen2_5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
QWEN3 = replace(qwen("qwen3", None), thinks=True)
SMOLLM = qwen("smollm", "You are a helpful AI assistant named SmolLM, trained by Hugging Face", tools=False)
YI = replace(qwen("yi", None, tools=False), system=("", ""))  # Yi-1.5 writes a system text bare, before everything
INTERNLM2_5 = replace(qwen("internlm2_5", None, tools=False), bos="<s>")
INTERNLM3 = replace(INTERNLM2_5, name="internlm3")
LLAMA3_1 = Family(
    name="llama3_1",
    bos="<|begin_of_text|>",
    system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
    tool=("<|start_header_id|>ipython<|end_header_id|>\n\n", "<|eot_id|>"),
    strips=("user", "assistant"),
)
LLAMA3_2 = replace(LLAMA3_1, name="llama3_2")
MISTRAL_V1 = Family(
    name="mistral_v1", bos="<s>", system="first", user=(" [INST] ", " [/INST]"), prompt="", lead=" ", end="</s>"
)
MISTRAL_V2 = replace(MISTRAL_V1, name="mistral_v2", system="last", user=("[INST] ", "[/INST]"), strips=("assistant",))
MISTRAL_V3 = replace(MISTRAL_V2, name="mistral_v3")
MISTRAL_NEMO = replace(MISTRAL_V2, name="mistral_nemo", user=("[INST]", "[/INST]"), lead="", strips=())
GEMMA2 = Family(
    name="gemma2",
    bos="<bos>",
    system="first",
    user=("<start_of_turn>user\n", "<end_of_turn>\n"),
    prompt="<start_of_turn>model\n",
    end="<end_of_turn>",
    after="\n",
    strips=("user", "assistant"),
)
GEMMA3 = replace(GEMMA2, name="gemma3")
PHI3 = Family(
    name="phi3",
    system=("<|system|>\n", "<|end|>\n"),
    user=("<|user|>\n", "<|end|>\n"),
    prompt="<|assistant|>\n",
    end="<|end|>",
    after="\n",
    close="<|endoftext|>",
    skips_empty=("system",),
)
PHI4 = Family(
    name="phi4",
    system=("<|im_start|>system<|im_sep|>", "<|im_end|>"),
    user=("<|im_start|>user<|im_sep|>", "<|im_end|>"),
    prompt="<|im_start|>assistant<|im_sep|>",
    end="<|im_end|>",
)
DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    bos="<｜begin▁of▁sentence｜>",
    system=("", ""),
    user=("<｜User｜>", ""),
    prompt="<｜Assistant｜>",
    end="<｜end▁of▁sentence｜>",
)
COMMAND_R = Family(
    name="command_r",
    bos="<BOS_TOKEN>",
    system=("<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    user=("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    prompt="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    end="<|END_OF_TURN_TOKEN|>",
    strips=("user", "assistant"),
)
GRANITE_BEFORE = (
    "You are a helpful assistant with access to the following tools. You may call one or more tools to assist with "
    "the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
GRANITE_AFTER = (
    "\n</tools>\n\nFor each tool call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>. If a tool does not exist in the provided list of tools, notify the user that you do not have "
    "the ability to fulfill the request."
)
GRANITE = Family(
    name="granite",
    system=("<|start_of_role|>system<|end_of_role|>", "<|end_of_text|>\n"),
    user=("<|start_of_role|>user<|end_of_role|>", "<|end_of_text|>\n"),
    prompt="<|start_of_role|>assistant<|end_of_role|>",
    end="<|end_of_text|>",
    after="\n",
    default_system="You are a helpful assistant. Please ensure responses are professional, accurate, and safe.",
    default_with_tools=False,
    default_for_empty=True,
    hermes=(GRANITE_BEFORE, GRANITE_AFTER),
)

# Llama 3.1's own template writes this date unless it is told another; a clock would change the data every day.
LLAMA_DATE = "26 Jul 2024"
LLAMA_TOOLS = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument '
    "name and its value}.Do not use variables.\n\n"
)


def prepare_llama(conversation: Conversation, *, name: str) -> Conversation:
    """Llama 3.1's system preamble; tools before the first question, calls and their results as JSON.

    Raises `DataError` for what the format has no place for: a text beside a call, two calls in one turn, tools where
    no question comes first.
    """
    messages = list(conversation.messages)
    system = messages.pop(0).text.strip() if messages and messages[0].role == "system" else ""
    environment = "Environment: ipython\n" if conversation.tools else ""
    preamble = f"{environment}Cutting Knowledge Date: December 2023\nToday Date: {LLAMA_DATE}\n\n"
    if conversation.tools:
        if not messages or messages[0].role != "user":
            raise DataError(f"chat template {name!r}: tools stand in the first question, and no question comes first")
        schemas = "".join(f"{as_json(dict(tool), indent=4)}\n\n" for tool in conversation.tools)
        first = stripped(messages[0])
        messages[0] = replace(first, parts=(Text(LLAMA_TOOLS + schemas), *first.parts))
    prepared = [Message("system", (Text(preamble), Text(system))), *(_llama_message(m, name) for m in messages)]
    return replace(conversation, messages=tuple(prepared))


def _llama_message(message: Message, name: str) -> Message:
    if message.role == "system":  # one that is not the first is stripped like every other turn
        return stripped(message)
    if message.role == "tool":
        return replace(message, parts=(Text(as_json(message.text)),), loss=False)
    if not message.tool_calls:
        return message
    if len(message.tool_calls) > 1 or message.text or message.images:
        raise DataError(
            f"chat template {name!r} takes one call a turn and no text beside it; split the turn, or choose 'chatml' "
            "with data.allow_template_difference=True"
        )
    call = message.tool_calls[0]
    text = f'{{"name": "{call.name}", "parameters": {as_json(dict(call.arguments))}}}'
    return replace(message, parts=(Text(text),), tool_calls=())


def prepare_qwen3(conversation: Conversation) -> Conversation:
    r"""Thoughts stay with the answers after the last question; the last answer has a block of them, if an empty one.

    Answers before that lose theirs. What is trained: every answer whose text would be the same if it were the last, as
    long as that holds of all of them; else the last alone, if it holds of that.
    """
    messages = conversation.messages
    asked = [n for n, m in enumerate(messages) if m.role == "user" and not _is_tool_response(m.text)]
    last_question = asked[-1] if asked else len(messages) - 1
    prepared, certain = [], {}
    for index, message in enumerate(messages):
        if message.role != "assistant" or message.images:
            prepared.append(message)
            continue
        own = message.reasoning
        thought, answer = (own, message.text) if own is not None else _thought_and_answer(message.text)
        thinks = index > last_question and (index == len(messages) - 1 or bool(thought))
        text = f"<think>\n{thought.strip(chr(10))}\n</think>\n\n" + answer.lstrip("\n") if thinks else answer
        prepared.append(replace(message, parts=(Text(text),) if text else ()))
        if message.is_trained:
            certain[index] = thinks
    if not all(certain.values()):
        keep = max(certain) if certain[max(certain)] else -1
        prepared = [replace(m, loss=False) if n in certain and n != keep else m for n, m in enumerate(prepared)]
    return replace(conversation, messages=tuple(prepared))


def _is_tool_response(text: str) -> bool:
    return text.startswith("<tool_response>") and text.endswith("</tool_response>")


def _thought_and_answer(text: str) -> tuple[str, str]:
    if "</think>" not in text:
        return "", text
    before, after = text.split("</think>")[0], text.split("</think>")[-1]
    return before.rstrip("\n").split("<think>")[-1].lstrip("\n"), after.lstrip("\n")


def _offer(
    form: Family,
    model: str,
    *,
    prepare: Prepare | None = None,
    stop: tuple[str, ...] = (),
    rewrites: bool = False,
    with_tools: RenderFn | None = None,
    reader: Reader | None = None,
) -> ChatTemplate:
    """The template of a row; `with_tools` renders it where the row alone does not know the family's tools."""
    by_row = partial(render_family, form, prepare=prepare) if prepare else partial(render_family, form)
    read, marks = reader or ((read_hermes, (HERMES,)) if form.hermes else (None, ()))
    return ChatTemplate(
        name=form.name,
        render=with_tools or by_row,
        stop=stop or (form.end,),
        supports_tools=bool(form.hermes or form.tool or with_tools),
        source=HUB.format(model),
        rewrites_history=rewrites,
        read_calls=read,
        call_marks=marks,
    )


def _llama(form: Family, model: str) -> ChatTemplate:
    return _offer(form, model, prepare=partial(prepare_llama, name=form.name), reader=(read_llama, LLAMA_MARKS))


def _mistral(form: Family, model: str, space: str = " ") -> ChatTemplate:
    render = partial(render_mistral, form, space=space)
    return _offer(form, model, rewrites=True, with_tools=render, reader=(read_mistral, (MISTRAL,)))


def _internlm(form: Family, model: str) -> ChatTemplate:
    return _offer(form, model, with_tools=partial(render_internlm, form), reader=(read_internlm, (INTERNLM,)))


def _command_r(form: Family, model: str) -> ChatTemplate:
    render = partial(render_command_r, form)
    return _offer(form, model, rewrites=True, with_tools=render, reader=(read_command_r, (COHERE,)))


def _glm4() -> ChatTemplate:
    return ChatTemplate(
        name="glm4",
        render=render_glm,
        stop=("<|user|>", "<|observation|>", "<|endoftext|>"),
        supports_tools=True,
        source=HUB.format("THUDM/glm-4-9b-chat-hf"),
        read_calls=read_glm,
        call_marks=("",),  # a call begins with a name, as any word might: nothing is shown before an answer is whole
    )


def _deepseek_v3_1() -> ChatTemplate:
    return ChatTemplate(
        name="deepseek_v3_1",
        render=render_deepseek,
        stop=(DEEPSEEK_END,),
        supports_tools=True,
        source=HUB.format("deepseek-ai/DeepSeek-V3.1") + ", without thoughts; tools as in its README.md",
        read_calls=read_deepseek,
        call_marks=(DEEPSEEK, DEEPSEEK_CALL),
    )


@hookimpl
def mmft_chat_templates() -> list[ChatTemplate]:
    """The formats of current families."""
    return [
        _offer(QWEN2, "Qwen/Qwen2-7B-Instruct"),
        _offer(QWEN2_5, "Qwen/Qwen2.5-7B-Instruct"),
        _offer(QWEN3, "Qwen/Qwen3-8B", prepare=prepare_qwen3, rewrites=True),
        _offer(SMOLLM, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        _offer(YI, "01-ai/Yi-1.5-9B-Chat"),
        _internlm(INTERNLM2_5, "internlm/internlm2_5-7b-chat"),
        _internlm(INTERNLM3, "internlm/internlm3-8b-instruct"),
        _llama(LLAMA3_1, "meta-llama/Llama-3.1-8B-Instruct"),
        _llama(LLAMA3_2, "meta-llama/Llama-3.2-3B-Instruct"),
        _offer(MISTRAL_V1, "mistralai/Mistral-7B-Instruct-v0.2"),
        _mistral(MISTRAL_V2, "mistralai/Mistral-7B-Instruct-v0.3"),
        _mistral(MISTRAL_V3, "mistralai/Mistral-7B-Instruct-v0.3"),
        _mistral(MISTRAL_NEMO, "mistralai/Mistral-Nemo-Instruct-2407", space=""),
        _offer(GEMMA2, "google/gemma-2-2b-it"),
        _offer(GEMMA3, "google/gemma-3-4b-it"),
        _offer(PHI3, "microsoft/Phi-3.5-mini-instruct", stop=("<|end|>", "<|endoftext|>")),
        _offer(PHI4, "microsoft/phi-4"),
        _offer(DEEPSEEK_V3, "deepseek-ai/DeepSeek-V3", prepare=prepare_deepseek),
        _deepseek_v3_1(),
        _glm4(),
        _command_r(COMMAND_R, "CohereForAI/c4ai-command-r-plus"),
        _offer(GRANITE, "ibm-granite/granite-4.0-micro"),
    ]
