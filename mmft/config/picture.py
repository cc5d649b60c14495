"""What a picture becomes, asked of the plugins without a weight: its patches, and its tokens in the language model.

A plugin's function is somebody's code. Whatever it raises or gives instead of what its spec says becomes one line that
names the part, its plugin and the function.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mmft.config.schema import Vision
from mmft.errors import MmftError, ModelError
from mmft.plugins import Catalog, Plugins
from mmft.plugins.places import described
from mmft.specs import VisionInfo


def describe_encoder(vision: Vision, plugins: Plugins, options: Mapping[str, Any]) -> VisionInfo:
    """What the encoder says of its features, given its options.

    Raises `ModelError` for a `describe` that fails or gives something else, and what it raises for people.
    """
    encoder = made_by(plugins.vision_encoders, vision.encoder.name)
    info = called(encoder, "describe", plugins.vision_encoders.get(vision.encoder.name).describe, **options)
    if not isinstance(info, VisionInfo):
        raise ModelError(f"{encoder}: describe gave a {type(info).__name__}, expected a VisionInfo")
    for name in ("hidden_size", "num_patches"):
        _refuse_no_number(f"{encoder}: describe says {name}=", getattr(info, name))
    return info


def num_tokens(vision: Vision, plugins: Plugins, info: VisionInfo) -> int:
    """The tokens of a picture, as the projector says. Raises `ModelError`, and `ValueError` for options that do not fit
    the patches.
    """
    projector, spec = made_by(plugins.projectors, vision.projector.name), plugins.projectors.get(vision.projector.name)
    try:
        tokens = spec.num_tokens(info.num_patches, **vision.projector.options)
    except ValueError:
        raise
    except Exception as error:
        raise failed(projector, "num_tokens", spec.num_tokens, error) from error
    _refuse_no_number(f"{projector}: num_tokens gave ", tokens)
    return tokens


def made_by(catalog: Catalog[Any], name: str) -> str:
    """`projector 'qformer' of plugin 'acme' from acme-mmft 0.2.0`. Raises as `Catalog.get`."""
    return f"{catalog.kind} {catalog.get(name).name!r} of {catalog.owner(name).origin}"


def called(who: str, what: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a plugin's function gives; what it raises becomes a `ModelError` that names `who` and `what`."""
    try:
        return function(*args, **options)
    except Exception as error:
        raise failed(who, what, function, error) from error


def failed(who: str, what: str, code: Any, error: Exception) -> Exception:
    """An error of `code`, a function or an object, in one line with its place; one meant for people stays as it is."""
    if isinstance(error, MmftError | MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return error
    while isinstance(code, partial):
        code = code.func
    return ModelError(f"{who}: {what} failed: {described(error, getattr(code, '__module__', None))}")


def _refuse_no_number(what: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{what}{value!r}, expected a whole number above 0")
