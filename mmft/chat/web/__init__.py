"""A chat page with pictures, on this machine: Gradio over `ChatSession`, for one model or two side by side."""

from mmft.chat.web.options import PageOptions as PageOptions
from mmft.chat.web.options import ServeOptions as ServeOptions
from mmft.chat.web.server import serve as serve
