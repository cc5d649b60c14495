r"""MOSS's plugins and tool calls: the same thing said in two ways.

MOSS is told of its tools in the system text, a line each (`- Calculator: enabled. API: Calculate(expression)`), calls
them as `Calculate("1 + 2")` and reads `Calculate("1 + 2") => 3`. Other tools than its own three are called with a JSON
object. A model that wants none writes `None` and still gets results: `None`. https://github.com/OpenLMLab/MOSS.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from mmft.types import Conversation, Message, Text, ToolCall
from mmft_plugins._calls import Read, decoded

BLOCK = r"(<\|{}\|>:)(.*?)(<{}>)(\n?)"
THOUGHTS, COMMANDS, ANSWER, RESULTS = (
    BLOCK.format(*mark)
    for mark in (("Inner Thoughts", "eot"), ("Commands", "eoc"), ("MOSS", "eom"), ("Results", "eor"))
)
ASSISTANT = re.compile(f"(?=.)(?:{THOUGHTS})?(?:{COMMANDS})?(?:{ANSWER})?", re.DOTALL)
TOOL = re.compile(RESULTS, re.DOTALL)
MARKS = ("<|Inner Thoughts|>", "<|Commands|>", "<|MOSS|>")
# MOSS's own tools: what the system text calls each, and its API; then the tool here and its argument.
OWN = {
    "search": ("Web search", "Search", "query"),
    "calculate": ("Calculator", "Calculate", "expression"),
    "solve": ("Equation solver", "Solve", "equations"),
}
BY_API = {api: name for name, (_, api, _) in OWN.items()} | {"Calculator": "calculate", "Solver": "solve"}
LINE = re.compile(r"^- (Web search|Calculator|Equation solver): (?:enabled|disabled)\..*$", re.MULTILINE)
AVAILABLE = "What is available:\n- Inner thoughts: enabled.\n"
CALL = re.compile(r"([A-Za-z_]\w*)\s*\(")
QUOTED = re.compile(r'\s*"(.*?)"\s*\)', re.DOTALL)


def prepare(conversation: Conversation) -> Conversation:
    """Tools as lines of the system text, and the results of each turn as one text in MOSS's marks."""
    messages: list[Message] = []
    waiting: list[ToolCall] = []
    lines: list[str] = []
    for number, message in enumerate(conversation.messages):
        if message.role != "tool" or not (waiting or lines):
            waiting, lines = list(message.tool_calls), []
            messages.append(message)
            continue
        call = next((one for one in waiting if message.call_id and one.id == message.call_id), None)
        call = call or (waiting[0] if waiting else ToolCall("", {}))
        waiting = [one for one in waiting if one is not call]
        lines.append(f"{written(call)} => {message.text}" if call.name else message.text)
        following = conversation.messages[number + 1 : number + 2]
        if not following or following[0].role != "tool":
            body = f"\n{chr(10).join(lines)}\n" if call.name else f" {lines[0]}"
            messages.append(Message("tool", (Text(f"<|Results|>:{body}<eor>\n"),)))
            waiting, lines = [], []
    if conversation.tools:
        has_system = bool(messages) and messages[0].role == "system"
        told = _told(messages[0].text if has_system else "", [tool["function"] for tool in conversation.tools])
        messages = [Message("system", (Text(told),)), *messages[has_system:]]
    return replace(conversation, messages=tuple(messages), tools=())


def _told(system: str, functions: Sequence[dict[str, object]]) -> str:
    """A system text that says of MOSS's own tools which are enabled, in the lines it has for them, and adds others."""
    names = [str(function["name"]) for function in functions]

    def state(label: str) -> str:
        name, api, argument = next((name, api, arg) for name, (said, api, arg) in OWN.items() if said == label)
        return f"- {label}: enabled. API: {api}({argument})" if name in names else f"- {label}: disabled."

    listed = set(LINE.findall(system))
    text = LINE.sub(lambda found: state(found[1]), system)
    new = [state(OWN[name][0]) for name in names if name in OWN and OWN[name][0] not in listed]
    for function in functions:
        if function["name"] not in OWN:
            schema = json.dumps(function.get("parameters", {}), ensure_ascii=False)
            new.append(
                f"- {function.get('description') or function['name']}: enabled. API: {function['name']}({schema})"
            )
    if not new:
        return text
    gap = "\n" if text and not text.endswith("\n") else ""
    return text + gap + ("" if listed else AVAILABLE) + "\n".join(new) + "\n"


def commands(message: Message) -> tuple[str, str]:
    """What stands behind the marks of the thoughts and of the commands, in an answer that calls."""
    thoughts = re.fullmatch(THOUGHTS, message.text, re.DOTALL)
    thought = thoughts[2] if thoughts else f" {message.text or 'None'}"
    return thought, " " + (", ".join(written(call) for call in message.tool_calls if call.name) or "None")


def written(call: ToolCall) -> str:
    """`Calculate("1 + 2")`, or `weather({"city": "Paris"})` for what is none of MOSS's own."""
    own = OWN.get(call.name)
    if own and list(call.arguments) == [own[2]] and isinstance(call.arguments[own[2]], str):
        return f"{own[1]}({json.dumps(call.arguments[own[2]], ensure_ascii=False)})"
    return f"{call.name}({json.dumps(dict(call.arguments), ensure_ascii=False)})"


def read_moss(text: str) -> Read:
    """The thoughts, in their marks, and the commands; or the answer without its marks."""
    before, found, after = text.partition("<|Commands|>:")
    if not found:
        return text.rpartition("<|MOSS|>:")[2].strip() if "<|MOSS|>:" in text else text, ()
    calls, body = [], after.partition("<eoc>")[0]
    name = CALL.search(body)
    while name:
        call, end = _call(name[1], body, name.end())
        calls += [call] if call else []
        name = CALL.search(body, end)
    return before, tuple(calls) or (ToolCall("", {}),)


def _call(name: str, text: str, at: int) -> tuple[ToolCall | None, int]:
    """The call whose argument begins at a place, and where it ends. A string need not be JSON: backslashes."""
    value, end = decoded(text, at)
    if value is None and (quoted := QUOTED.match(text, at)):
        value, end = quoted[1], quoted.end()
    name = BY_API.get(name, name)
    if isinstance(value, dict):
        return ToolCall(name, value), end
    if isinstance(value, str):
        return ToolCall(name, {OWN[name][2] if name in OWN else "input": value}), end
    return None, at
