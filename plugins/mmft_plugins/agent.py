"""Conversations in which the assistant calls tools: OpenAI's messages, MOSS's plugins, MSAgent-Bench.

What the assistant writes is trained, its calls included; what a tool answers never is. A format for the calls is the
chat template's affair: choose one that supports tools, such as `react`, which is here too and writes them as text.
"""

from mmft import hookimpl
from mmft.specs import ChatTemplate, DataMap
from mmft_plugins._moss import MOSS
from mmft_plugins._msagent import MSAGENT
from mmft_plugins._react import REACT
from mmft_plugins.text_sft import messages_map


@hookimpl
def mmft_data_maps() -> list[DataMap]:
    """Tool use."""
    return [messages_map(name="agent", summary="the same as openai"), MOSS, MSAGENT]


@hookimpl
def mmft_chat_templates() -> list[ChatTemplate]:
    """Calls as text, for models whose own format has none."""
    return [REACT]
