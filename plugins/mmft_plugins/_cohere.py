r"""Command R's tools: signatures in Python in a long system turn, calls as a list of actions, results in system turns.

    <|CHATBOT_TOKEN|>text\nAction:\n```json\n[ {"tool_name": ..., "parameters": {...}} ]```\n
    <|SYSTEM_TOKEN|><results>\nresult</results>

The model's second jinja, `tool_use`, asks for a list of actions in a system turn after everything, so also after each
answer that it has already got. What an earlier answer was given is then not what inference showed it: only the last
one is trained, after that turn. Earlier calls stand without a token that ends them; the one that is trained has it.
https://huggingface.co/CohereForAI/c4ai-command-r-plus/blob/main/tokenizer_config.json
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmft.types import Conversation, Message, Segment, Text
from mmft_plugins._families import Family, render_family
from mmft_plugins._tools import as_json, markup
from mmft_plugins.templates import content, stripped

START = "<|START_OF_TURN_TOKEN|>"
SYSTEM, END = f"{START}<|SYSTEM_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
KINDS = {"string": "str", "number": "float", "integer": "int", "boolean": "bool"}
DEFAULT = (
    "## Task and Context\nYou help people answer their questions and other requests interactively. You will be asked "
    "a very wide array of requests on all kinds of topics. You will be equipped with a wide range of search engines "
    "or similar tools to help you, which you use to research your answer. You should focus on serving the user's "
    "needs as best you can, which will be wide-ranging.\n\n## Style Guide\nUnless the user asks for a different "
    "style of answer, you should answer in full sentences, using proper grammar and spelling."
)
BEFORE = (
    "# Safety Preamble\nThe instructions in this section override those in the task description and style guide "
    "sections. Don't answer questions that are harmful or immoral.\n\n# System Preamble\n## Basic Rules\nYou are a "
    "powerful conversational AI trained by Cohere to help people. You are augmented by a number of tools, and your "
    "job is to use and consume the output of these tools to best help the user. You will see a conversation history "
    "between yourself and a user, ending with an utterance from the user. You will then see a specific instruction "
    "instructing you what kind of response to generate. When you answer the user's requests, you cite your sources "
    "in your answers, according to those instructions.\n\n# User Preamble\n"
)
AFTER = "\n\n## Available Tools\nHere is a list of tools that you have available to you:\n\n"
ASK = (
    "Write 'Action:' followed by a json-formatted list of actions that you want to perform in order to produce a "
    "good response to the user's last input. You can use any of the supplied tools any number of times, but you "
    "should aim to execute the minimum number of necessary actions for the input. You should use the "
    "`directly-answer` tool if calling the other tools is unnecessary. The list of actions you want to call should "
    'be formatted as a list of json objects, for example:\n```json\n[\n    {\n        "tool_name": title of the '
    'tool in the specification,\n        "parameters": a dict of parameters to input into the tool as they are '
    "defined in the specs, or {} if it takes no parameters\n    }\n]```"
)


def render_command_r(form: Family, conversation: Conversation, /, *, generation_prompt: bool = False) -> list[Segment]:
    """Render by the family's row, and tools where the conversation has any; then only a last answer is trained."""
    messages = conversation.messages
    if not conversation.tools and not any(m.tool_calls or m.role == "tool" for m in messages):
        return render_family(form, conversation, generation_prompt=generation_prompt)
    has = bool(messages) and messages[0].role == "system"
    told = messages[0] if has else Message("system", (Text(DEFAULT),))
    segments = [*markup(f"{form.bos}{SYSTEM}{BEFORE}"), *content(told), *markup(AFTER)]
    segments += [Segment("\n\n".join(map(_signature, conversation.tools))), *markup(END)]
    rest, last = messages[has:], None
    if rest and rest[-1].role == "assistant" and not generation_prompt:
        rest, last = rest[:-1], rest[-1]
    for message in rest:
        segments += _turn(form, replace(stripped(message), loss=False))
    if last or generation_prompt:
        segments += markup(f"{SYSTEM}{ASK}{END}{form.prompt}")
    if last:
        said = stripped(last)
        segments += [*content(said), *_actions(said), *markup(END, said.is_trained)]
    return segments


def _turn(form: Family, message: Message) -> list[Segment]:
    """A turn of the history."""
    if message.role == "assistant":
        end = "\n" if message.tool_calls else END
        return [*markup(form.prompt), *content(message), *_actions(message), *markup(end)]
    if message.role == "tool":
        return [*markup(f"{SYSTEM}<results>\n"), *content(message), *markup(f"</results>{END}")]
    before = SYSTEM if message.role == "system" else form.user[0]
    return [*markup(before), *content(message), *markup(END)]


def _actions(message: Message) -> list[Segment]:
    if not message.tool_calls:
        return []
    loss, segments = message.is_trained, list[Segment]()
    for call in message.tool_calls:
        before = ",\n" if segments else "\nAction:\n```json\n[\n"
        written = as_json(dict(call.arguments), indent=4).replace("\n", "\n        ")
        segments += [*markup(before + '    {\n        "tool_name": "', loss), Segment(call.name, loss)]
        segments += [*markup('",\n        "parameters": ', loss), Segment(written, loss), *markup("\n    }", loss)]
    return [*segments, *markup("\n]```", loss)]


def _signature(tool: Mapping[str, Any]) -> str:
    """A tool as a function in Python, with the kinds that the model's own jinja finds, odd as some are."""
    function = tool["function"]
    schema = function.get("parameters") or {}
    properties, required = schema.get("properties") or {}, schema.get("required") or ()
    kinds = {name: _kind(one) for name, one in properties.items()}
    kinds |= {name: f"Optional[{kind}]" for name, kind in kinds.items() if name not in required}
    takes = ", ".join(f"{name}: {kind}" + ("" if name in required else " = None") for name, kind in kinds.items())
    lines = [f"{name} ({kinds[name]}): {one.get('description', '')}" for name, one in properties.items()]
    told = "\n        ".join(["\n\n    Args:", *lines]) if lines else ""
    head = f'```python\ndef {function["name"]}({takes}) -> List[Dict]:\n    """{function.get("description", "")}'
    return f'{head}{told}\n    """\n    pass\n```'


def _kind(schema: Any) -> str:
    """The Python type of a schema. Of an array's items the jinja finds nothing, as `items` is a method of a mapping."""
    kind = schema.get("type", ()) if isinstance(schema, Mapping) else ()
    if not isinstance(kind, str):
        return f"Union[{','.join(_kind({'type': one}) for one in kind)}]"
    if kind == "object":
        return f"Dict[str, {_kind(schema.get('additionalProperties'))}]"
    return "List[Union[]]" if kind == "array" else KINDS.get(kind, "Any")
