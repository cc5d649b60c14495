"""Calls that models write beside the letter of their template, and what of GLM-4's answers is a call."""

import pytest

from mmft.chat.tools import CallReader
from mmft.plugins import load_plugins
from mmft.types import ToolCall

PLUGINS = load_plugins()


@pytest.mark.parametrize(
    ("name", "text", "said_"),
    [
        ("internlm3", 'Wait.<|action_start|><|plugin|>\n{"name": "f", "arguments": {"a": 1}}<|action_end|>', "Wait."),
        ("deepseek_v3_1", '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>', ""),
        ("deepseek_v3_1", 'A.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>\n{"a": 1}', "A."),
        ("glm4", 'f\n{"a": 1}', ""),
        ("glm4", 'f \n{"a": 1}\n', ""),
        ("command_r", 'Action: ```json\n[{"tool_name": "f", "parameters": {"a": 1}}]```', ""),
    ],
)
def test_what_models_write_beside_their_templates_form_is_read_too(name: str, text: str, said_: str) -> None:
    read = PLUGINS.chat_templates.get(name).read_calls
    assert read is not None
    assert read(text) == (said_, (ToolCall("f", {"a": 1}),))


def test_of_glm4_an_answer_in_words_is_no_call_and_no_call_is_ever_shown() -> None:
    template = PLUGINS.chat_templates.get("glm4")
    for answer in ("\nf\n{}", "f\n{} is what I call", "two words\n{}", '{"a": 1}\n{}', "f {}"):
        reader = CallReader(template)
        assert reader.take(answer) == ""
        assert reader.end() == (answer.lstrip(), answer.lstrip(), ())
    reader = CallReader(template)
    assert "".join(map(reader.take, "f\n{}")) == ""
    assert reader.end() == ("", "", (ToolCall("f", {}),))
