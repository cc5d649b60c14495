"""Where the names of models are looked up: a folder as it is, else the Hugging Face hub or ModelScope.

Hugging Face names go to transformers as they are, which reads its own cache; ModelScope's become a local folder first.
`HF_HUB_OFFLINE=1` keeps both from the network. A folder never causes a network call.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmft.config import LLM, Model, Use
from mmft.errors import ModelError
from mmft.foreign_paths import windows_hint
from mmft.plugins import Plugins

HUGGINGFACE, MODELSCOPE = "huggingface", "modelscope"


def model_folder(where: str, name: str | Path, hub: str, revision: str | None = None) -> str:
    """What transformers can load: the name itself, or the folder of a ModelScope snapshot.

    Raises `ModelError` in one line where there is no such snapshot, or `modelscope` is not installed.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return str(local)
    if hub != MODELSCOPE:
        return str(name)
    try:
        snapshot_download = importlib.import_module("modelscope.hub.snapshot_download").snapshot_download
    except ImportError as error:
        raise ModelError(
            f"{where}: model.hub='modelscope' needs modelscope: {error}; pip install 'mmft[modelscope]'"
        ) from error

    attempts = (True,) if is_offline() else (False, True)  # without a network, what is in the cache will do
    failure: Exception | None = None
    for local_files_only in attempts:
        try:
            folder = Path(snapshot_download(str(name), revision=revision, local_files_only=local_files_only))
            if (folder / "config.json").is_file():  # a download that failed leaves an empty folder behind
                return str(folder)
            failure = failure or FileNotFoundError(f"{folder} has no config.json")
        except Exception as error:  # modelscope, requests and urllib3 each have their own
            failure = failure or error
    assert failure is not None
    raise ModelError(missing(where, name, hub, failure)) from failure


def seen_from(model: Model, folder: Path) -> Model:
    """A trained model's parts, where they can be opened from here.

    A relative path means the folder that training was started in. Where it leads nowhere from the current one, it is
    looked for from the folders above the model's, the nearest first; where there is none, it stays as it is. One that
    begins with `./` is looked for in the model's own folder first: so an imported model names parts that lie in it.
    """

    def found(path: str) -> str:
        inside = folder.absolute() / path
        if path.startswith("./") and inside.is_dir():
            return str(inside)
        if Path(path).expanduser().is_absolute() or Path(path).exists():
            return path
        above = (parent / path for parent in folder.absolute().parents)
        return str(next((place for place in above if place.is_dir()), path))

    return _with_paths(model, found)


def named_from(model: Model, folder: Path) -> Model:
    """The other way: parts by the paths that `seen_from` finds again when it reads them in `folder`.

    A relative path stays as it is where the folders above lead to it, else it becomes absolute. Names on a hub stay.
    """

    def name(path: str) -> str:
        here = Path(path).absolute()
        if Path(path).expanduser().is_absolute() or path.startswith("./") or not here.is_dir():
            return path
        above = (parent / path for parent in folder.absolute().parents)
        first = next((place for place in above if place.is_dir()), None)
        return path if first is not None and first.samefile(here) else str(here)

    return _with_paths(model, name)


def _with_paths(model: Model, change: Callable[[str], str]) -> Model:
    """The model with each path or name of a part changed; a plugin's own `path` changes only where it is a folder."""
    model = model.model_copy(update={"llm": model.llm.model_copy(update={"path": change(model.llm.path)})})
    if model.vision and isinstance(path := model.vision.encoder.options.get("path"), str):
        encoder = Use(name=model.vision.encoder.name, options={**model.vision.encoder.options, "path": change(path)})
        model = model.model_copy(update={"vision": model.vision.model_copy(update={"encoder": encoder})})
    return model


def encoder_options(encoder: Use, plugins: Plugins, hub: str) -> dict[str, Any]:
    """The options of a vision encoder, with a ModelScope name, where it takes one, replaced by its folder."""
    options, option = dict(encoder.options), plugins.vision_encoders.get(encoder.name).hub_option
    if option and isinstance(name := options.get(option), str):
        options[option] = model_folder(f"model.vision.encoder.{option}", name, hub, options.get("revision"))
    return options


def encoder_path(model: Model) -> str:
    """Where the vision encoder of a model comes from, as far as its config alone tells; empty where it does not.

    For what compares and protects models whose plugins may not be installed here: it goes by `path`, the usual name.
    """
    path = model.vision.encoder.options.get("path") if model.vision else None
    return str(path or "")


def load_tokenizer(llm: LLM, hub: str = HUGGINGFACE, folder: Path | None = None) -> Any:
    """The language model's tokenizer with `llm.new_tokens`; `folder` holds one that training saved.

    New tokens are not special ones: data that spells them gets them, and answers show them. Raises `ModelError` in one
    line where there is no tokenizer, or a new token is not new.
    """
    from transformers import AutoTokenizer

    path = str(folder) if folder else model_folder("model.llm.path", llm.path, hub, llm.revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=llm.revision, trust_remote_code=llm.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(failed("model.llm.path", path, hub, error, "no tokenizer in")) from error
    if folder is None:
        new_token_ids(tokenizer, llm.new_tokens, llm.path)
    return tokenizer


def new_token_ids(tokenizer: Any, tokens: Sequence[str], path: str) -> list[int]:
    """Add tokens to the tokenizer of a base model and return their ids. Raises `ModelError` for one that it has."""
    from transformers import AddedToken

    known = tokenizer.get_vocab() if tokens else {}
    old = [token for token in tokens if token in known]
    if old:
        raise ModelError(f"model.llm.new_tokens: {', '.join(map(repr, old))} is a token of {path} already; drop it")
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]


def failed(where: str, name: str | Path, hub: str, error: Exception, what: str = "cannot load") -> str:
    """One line about a model that transformers did not load: it is not there, or what is wrong with it."""
    local = Path(name).expanduser()
    if not local.is_dir() and isinstance(error, OSError) and not _is_cached(str(name)):
        return missing(where, name, hub, error)
    return f"{where}: {what} {name}: {_first_line(error)}"


def missing(where: str, name: str | Path, hub: str, error: Exception) -> str:
    """One line that names the causes a missing model can have, and what to do about each."""
    if looks_like_path(str(name)):
        hint = windows_hint(str(name)) or f"give a folder saved by save_pretrained, or a name on {hub}"
        return f"{where}: the folder {name} does not exist; {hint}"
    lead = f"{where}: {str(name)!r} is no folder and was not found on {hub}: "
    if is_offline():
        other = "offline mode is on (HF_HUB_OFFLINE=1) and it was never downloaded here; correct it or go online once"
    elif hub != HUGGINGFACE:
        other = f"{hub} cannot be reached ({_first_line(error)[:100]}); correct it, or go online"
    elif _is_unknown(error):
        return f"{lead}the name is wrong, or the model is private: hf auth login"
    else:
        from huggingface_hub import constants

        switch = "set model.hub='modelscope'" if where.startswith("model.") else "give a folder from ModelScope"
        other = f"{constants.ENDPOINT} cannot be reached; set HF_ENDPOINT to a mirror, or {switch}"
    return f"{lead}either the name is wrong, or {other}"


def _is_unknown(error: BaseException | None) -> bool:
    """Whether the hub answered, and has no such model for this user."""
    from huggingface_hub.errors import RepositoryNotFoundError

    while error is not None and not isinstance(error, RepositoryNotFoundError):
        error = error.__cause__ or error.__context__
    return error is not None


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a path: hub names are `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
