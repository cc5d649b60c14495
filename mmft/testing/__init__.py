"""Help for plugin authors and for our own tests: conformance checks, and models small enough for a unit test.

`check_plugin(module)` runs everything that applies to what a plugin offers. The tiny models are random but real
transformers models with fixed seeds; they are written to a folder and loaded through the same code as a 7B.
"""

from mmft.testing.parts import check_config_dir, check_dataset, check_projector, check_vision_encoder
from mmft.testing.plugin import check_data_map, check_plugin, check_tool
from mmft.testing.templates import BATTERY, check_chat_template
from mmft.testing.tiny import CHATML, CORPUS, save_image_processor, tiny_llm, tiny_tokenizer, tiny_vision

__all__ = [
    "BATTERY",
    "CHATML",
    "CORPUS",
    "check_chat_template",
    "check_config_dir",
    "check_data_map",
    "check_dataset",
    "check_plugin",
    "check_projector",
    "check_tool",
    "check_vision_encoder",
    "save_image_processor",
    "tiny_llm",
    "tiny_tokenizer",
    "tiny_vision",
]
