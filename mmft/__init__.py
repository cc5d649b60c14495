"""mmft: turn a language model into one that sees.

These are the names a plugin needs; configs import from `mmft.config`. Importing this package imports neither torch
nor transformers.
"""

from importlib.metadata import PackageNotFoundError, version

from mmft.errors import DataError, MmftError, Problem
from mmft.hookspecs import hookimpl
from mmft.specs import (
    ChatTemplate,
    ConfigDir,
    DataMap,
    DatasetSpec,
    ProjectorSpec,
    SystemText,
    Tool,
    VisionEncoderSpec,
    VisionInfo,
)
from mmft.types import BadRecord, Conversation, Document, Image, Message, RawRecord, Sample, Segment, Text, ToolCall

try:
    __version__ = version("mmft")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "BadRecord",
    "ChatTemplate",
    "ConfigDir",
    "Conversation",
    "DataError",
    "DataMap",
    "DatasetSpec",
    "Document",
    "Image",
    "Message",
    "MmftError",
    "Problem",
    "ProjectorSpec",
    "RawRecord",
    "Sample",
    "Segment",
    "SystemText",
    "Text",
    "Tool",
    "ToolCall",
    "VisionEncoderSpec",
    "VisionInfo",
    "__version__",
    "hookimpl",
]
