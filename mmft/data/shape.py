"""What is known of a model without its weights: its tokenizer, and how many tokens a picture takes.

This is all that preparing data needs, and what lets `mmft check` and `mmft data show` answer in seconds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmft.config import LLM, Model
from mmft.config.picture import describe_encoder, num_tokens
from mmft.data.tokenize import Tokenizer
from mmft.errors import ModelError
from mmft.hub import encoder_options, load_tokenizer
from mmft.plugins import Plugins
from mmft.specs import VisionInfo

TOKENIZER = "tokenizer"  # the folder inside a model folder


@dataclass(frozen=True)
class Shape:
    """What is known of a model without its weights: the tokenizer, and what pictures become."""

    tokenizer: Tokenizer
    vision: VisionInfo | None


def describe_model(model: Model, plugins: Plugins, folder: Path | None = None) -> Shape:
    """The tokenizer and the picture geometry, without a weight; `folder` is a model folder with its own tokenizer."""
    info, tokens = None, 0
    if model.vision:
        try:
            options = encoder_options(model.vision.encoder, plugins, model.hub)
            info = describe_encoder(model.vision, plugins, options)
            tokens = num_tokens(model.vision, plugins, info)
        except ValueError as error:
            raise ModelError(f"model.vision: {str(error).splitlines()[0]}") from error
    own = folder / TOKENIZER if folder and (folder / TOKENIZER).is_dir() else None
    hf = load_tokenizer(model.llm, model.hub, own)
    return Shape(Tokenizer.for_model(hf, tokens), info)


def load_hf_tokenizer(path: str | Path, llm: LLM) -> Any:
    """The tokenizer of a model by its folder or name. Raises `ModelError` in one line where there is none."""
    return load_tokenizer(llm.model_copy(update={"path": str(path)}))
