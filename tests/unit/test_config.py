"""Configs: a value has one home, an override lands or is an error, and what is written can be read again."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Use, Vision, override, use
from mmft.config.check import find_problems
from mmft.config.load import (
    copy_config,
    dump_config,
    find_config,
    list_configs,
    load_config,
    parse_settings,
)
from mmft.errors import AmbiguousName, ConfigError, UnknownName
from mmft.plugins import Plugins, load_plugins

ROOT = Path(__file__).parents[2] / "configs" / "mmft_configs"
NAMES = sorted(path.stem for path in ROOT.rglob("*.py") if path.stem != "__init__")

SOURCE = '''"""A text model.

More.
"""
from pathlib import Path
from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, use

config = TrainConfig(
    model=Model(llm=LLM(path="org/base", lora=Lora(r=4))),
    data=Data(datasets=(Dataset(source=use("json", path="a.json"), data_map="alpaca"),), max_length=64),
    optim=Optim(lr=1e-4),
    runtime=Runtime(output_dir=Path("out")),
)
'''


def text_config(**llm: Any) -> TrainConfig:
    return TrainConfig(
        model=Model(llm=LLM(path="org/base", **llm)),
        data=Data(datasets=(Dataset(source=use("json", path="a.json"), data_map="alpaca"),), max_length=64),
        optim=Optim(lr=1e-4),
        runtime=Runtime(output_dir=Path("out")),
    )


def seeing_config() -> TrainConfig:
    vision = Vision(encoder=use("clip", path="org/clip"), projector=use("linear"))
    return text_config().model_copy(update={"model": Model(llm=LLM(path="org/base"), vision=vision)})


def set_(*settings: str, config: TrainConfig | None = None) -> TrainConfig:
    return override(config or text_config(), parse_settings(settings), where="--set ")


def problems(act: Callable[[], object]) -> list[str]:
    """What a `ConfigError` lists, as text."""
    with pytest.raises(ConfigError) as caught:
        act()
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("optim.lr=1e-5", lambda c: c.optim.lr == 1e-5),
        ("optim.accumulate=8", lambda c: c.optim.accumulate == 8),
        ("data.packing=true", lambda c: c.data.packing is True),
        ("data.packing=True", lambda c: c.data.packing is True),
        ("data.too_long=truncate", lambda c: c.data.too_long == "truncate"),
        ("runtime.output_dir=some/where", lambda c: c.runtime.output_dir == Path("some/where")),
        ("model.llm.path=a=b", lambda c: c.model.llm.path == "a=b"),
        ("data.datasets.0.limit=7", lambda c: c.data.datasets[0].limit == 7),
        ("data.datasets.0.source.path=b.json", lambda c: c.data.datasets[0].source == use("json", path="b.json")),
        ("data.datasets.0.source.use=jsonl", lambda c: c.data.datasets[0].source == use("jsonl", path="a.json")),
        ("data.datasets.0.source=jsonl", lambda c: c.data.datasets[0].source == use("jsonl")),
        ('runtime.report_to=["tensorboard"]', lambda c: c.runtime.report_to == ("tensorboard",)),
        ('model.llm.lora={"r": 8}', lambda c: c.model.llm.lora == Lora(r=8)),
        ("model.llm.lora.r=8", lambda c: c.model.llm.lora == Lora(r=8)),
        ("model.llm.quantization=nf4", lambda c: c.model.llm.quantization == "nf4"),
        ("model.llm.quantization=none", lambda c: c.model.llm.quantization == "none"),
        ("model.llm.revision=12345678", lambda c: c.model.llm.revision == "12345678"),
        ("data.datasets.0.system=none", lambda c: c.data.datasets[0].system is None),
    ],
)
def test_a_setting_is_read_by_the_type_of_its_field(setting: str, read: Callable[[TrainConfig], bool]) -> None:
    config = set_(setting, config=text_config(quantization="int8"))
    assert isinstance(config, TrainConfig) and read(config)


def test_none_empties_an_optional_field() -> None:
    config = override(text_config(lora=Lora(r=4)), {"optim.max_steps": 5})
    changed = set_("model.llm.lora=none", "optim.max_steps=null", config=config)
    assert changed.model.llm.lora is None and changed.optim.max_steps is None


def test_two_settings_of_one_empty_part_both_land() -> None:
    assert set_("model.llm.lora.r=8", "model.llm.lora.alpha=4").model.llm.lora == Lora(r=8, alpha=4)


def test_an_empty_part_with_required_fields_can_be_filled_by_settings() -> None:
    vision = set_("model.vision.encoder=clip", "model.vision.projector=linear").model.vision
    assert vision == Vision(encoder=use("clip"), projector=use("linear"))


def test_a_required_field_left_out_of_an_empty_part_is_named() -> None:
    assert problems(lambda: set_("model.vision.encoder=clip")) == ["--set model.vision.projector: is required"]


def test_override_leaves_the_config_it_is_given_as_it_was() -> None:
    config = text_config(lora=Lora(r=4))
    before = dump_config(config)
    override(config, {"model.llm.lora.r": 8, "data.datasets.0.source.path": "b.json", "data.datasets.0.limit": 3})
    assert dump_config(config) == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr=1e-5", r"--set lr=.*: TrainConfig has no field 'lr'; it has model, data, .*; did you mean 'optim\.lr'\?"),
        ("optim.batch_size=4", r"Optim has no field 'batch_size'; .*; did you mean 'batch_size_per_device'\?"),
        ("optim.l_r=4", r"Optim has no field 'l_r'; .*; did you mean 'lr'\?"),
        ("model.lm.path=x", r"Model has no field 'lm'; it has llm, vision, hub; did you mean 'llm'\?"),
        ("model.llm.lora.rank=4", r"Lora has no field 'rank'; it has r, alpha, dropout, targets"),
        ("model.llm.path.x=1", r"model\.llm\.path is 'org/base' and has no field 'x'"),
        ("data.datasets.1.limit=4", r"data\.datasets has 1 entr.*not '1'"),
        ("data.datasets.first.limit=4", r"data\.datasets has 1 entr.*not 'first'"),
        ("data.datasets.0.source.path.x=1", r"takes options only; 'path' cannot be followed by another name"),
        ("optim.lr=-1", r"--set optim\.lr: input should be greater than 0, got -1"),
        ("optim.lr=fast", r"--set optim\.lr: .*got 'fast'"),
        ("optim.lr=none", r"--set optim\.lr: input should be a valid number, got None"),
        ("model.llm.quantization=int4", r"model\.llm\.quantization: 'int4' is not one of 'none', 'nf4', 'fp4', 'int8'"),
        ("model.llm.lora.r=many", r"^--set model\.llm\.lora\.r: "),
        ("optim.lr", r"--set optim\.lr: has no '='; write: --set optim\.lr=1e-4"),
    ],
)
def test_a_setting_that_does_not_land_is_an_error_that_says_where_it_belongs(setting: str, message: str) -> None:
    (problem,) = problems(lambda: set_(setting))
    assert re.search(message, problem), problem


def test_all_settings_are_judged_at_once() -> None:
    found = problems(lambda: set_("lr=1e-5", "optim.batch_size=4", "model.llm.quantization=int4", "optim.lr=-1"))
    assert len(found) == 4


def write(path: Path, text: str) -> str:
    path.write_text(text, "utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("optim=Optim(lr=1e-4)", "optim=Optim(lr=1e-4, batch_size=2)", 11, "did you mean 'batch_size_per_device'?"),
        ("optim=Optim(lr=1e-4)", "optim=Optim(lr='fast')", 11, "lr: input should be a valid number"),
        ("Lora(r=4)", "Lora(r=4, targts=())", 9, "did you mean 'targets'?"),
        ('"org/base"', "1 / 0", 9, "ZeroDivisionError: division by zero"),
        ("max_length=64),", "max_length=64,", 8, "SyntaxError"),
        ("import Path", "import Pth", 5, "ImportError"),
    ],
)
def test_an_error_in_a_config_file_has_its_file_and_line(
    tmp_path: Path, plugins: Plugins, old: str, new: str, line: int, message: str
) -> None:
    assert old in SOURCE
    path = write(tmp_path / "mine.py", SOURCE.replace(old, new))
    found = problems(lambda: load_config(path, plugins))
    assert all(problem.startswith(f"{path}:{line}: ") for problem in found), found
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    ("source", "found"),
    [("x = 1\n", "found no such name"), ("config = {}\n", "found a dict"), ("config = None\n", "found a NoneType")],
)
def test_a_file_that_binds_no_config_is_named(tmp_path: Path, plugins: Plugins, source: str, found: str) -> None:
    path = write(tmp_path / "mine.py", source)
    assert problems(lambda: load_config(path, plugins)) == [f"{path}: must bind `config = TrainConfig(...)`, {found}"]


def test_unknown_and_missing_fields_of_a_json_config_are_all_listed_with_their_paths(
    tmp_path: Path, plugins: Plugins
) -> None:
    text = dump_config(text_config()).replace('"max_length": 64', '"max_lenght": 64').replace('"lr"', '"learning_rate"')
    path = write(tmp_path / "config.json", text)
    found = "\n".join(problems(lambda: load_config(path, plugins)))
    assert re.search(r"config\.json: data: Data has no field 'max_lenght'; .*; did you mean 'max_length'\?", found)
    assert re.search(r"config\.json: optim: Optim has no field 'learning_rate'", found)
    assert "data.max_length: is required" in found and "optim.lr: is required" in found


def test_a_json_config_that_is_not_json_is_named(tmp_path: Path, plugins: Plugins) -> None:
    path = write(tmp_path / "config.json", "{")
    (problem,) = problems(lambda: load_config(path, plugins))
    assert problem.startswith(f"{path}: is not JSON: ")


@pytest.mark.parametrize("name", NAMES)
def test_a_dumped_config_loads_equal_and_is_as_runnable(name: str, tmp_path: Path, plugins: Plugins) -> None:
    config = load_config(name, plugins)
    again = load_config(write(tmp_path / "config.json", dump_config(config)), plugins)
    assert dump_config(again) == dump_config(config)
    assert list(find_problems(again, plugins)) == list(find_problems(config, plugins))
    assert again == config


def test_use_is_one_thing_in_its_three_spellings() -> None:
    assert Use.model_validate("linear") == Use.model_validate({"use": "linear"}) == use("linear")
    assert use("clip", path=Path("a/b")).model_dump() == {"use": "clip", "path": "a/b"}


def test_a_run_folder_is_its_config(tmp_path: Path, plugins: Plugins) -> None:
    write(tmp_path / "config.json", dump_config(text_config()))
    assert load_config(str(tmp_path), plugins) == text_config()


def test_list_cfg_finds_every_shipped_config_once_with_a_summary(plugins: Plugins) -> None:
    listed = list(list_configs(plugins))
    assert [config.name for config in listed] == NAMES and len(NAMES) >= 11
    assert all(len(config.summary) > 20 for config in listed)
    assert {config.plugin for config in listed} == {"configs"}


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_config_loads_and_names_only_what_exists(name: str, plugins: Plugins) -> None:
    config = load_config(name, plugins)
    assert config.runtime.output_dir.name == name
    local = ("does not exist", "is not a folder", "has no adapter_config.json", "bitsandbytes", "flash-attn")
    assert [p for p in find_problems(config, plugins) if not any(word in str(p) for word in local)] == []


OWN = """
from pathlib import Path
from mmft import ConfigDir, hookimpl

@hookimpl
def mmft_config_dirs():
    return [ConfigDir(path=Path(__file__).parent / "recipes")]
"""


def ship(install: Callable[..., Path], **configs: str) -> Plugins:
    """A third party's plugin with these configs."""
    site = install("acme-mmft", "0.2.0", {"acme": "acme_mod"}, acme_mod=OWN)
    (site / "recipes").mkdir()
    for name, source in configs.items():
        write(site / "recipes" / f"{name}.py", source)
    return load_plugins()


def test_list_cfg_executes_nothing(install: Callable[..., Path]) -> None:
    loaded = ship(install, explosive='"""Bang."""\nraise SystemExit("executed")\n', undocumented="x = 1\n")
    summaries = {config.name: config.summary for config in list_configs(loaded) if config.plugin == "acme"}
    assert summaries == {"explosive": "Bang.", "undocumented": ""}


def test_a_config_that_does_not_parse_does_not_hide_the_others(install: Callable[..., Path]) -> None:
    loaded = ship(install, half="config = (\n")
    assert {config.name for config in list_configs(loaded)} == {*NAMES, "half"}


def test_a_config_name_of_two_plugins_must_be_qualified(install: Callable[..., Path]) -> None:
    loaded = ship(install, llava_pretrain=SOURCE)
    with pytest.raises(AmbiguousName, match="write one of: acme/llava_pretrain, configs/llava_pretrain"):
        load_config("llava_pretrain", loaded)
    assert load_config("acme/llava_pretrain", loaded) == text_config(lora=Lora(r=4))


def test_an_unknown_config_name_suggests_one(plugins: Plugins) -> None:
    with pytest.raises(UnknownName, match=r"named 'llava_pretrian'; did you mean 'llava_pretrain'\?; see: mmft list"):
        find_config("llava_pretrian", plugins)
    assert problems(lambda: find_config("no/such.py", plugins))[0].startswith("no/such.py: no such file")


def test_copy_cfg_copies_into_a_folder_or_to_a_name_and_never_overwrites(tmp_path: Path, plugins: Plugins) -> None:
    copied = copy_config("llava_pretrain", tmp_path, plugins)
    renamed = copy_config("llava_pretrain", tmp_path / "new" / "mine.py", plugins)
    assert (copied, renamed) == (tmp_path / "llava_pretrain.py", tmp_path / "new" / "mine.py")
    copied.write_text("edited", "utf-8")
    for taken in (tmp_path, copied):
        message = f"{copied}: exists already; choose another file or folder"
        assert problems(lambda taken=taken: copy_config("llava_pretrain", taken, plugins)) == [message]
    assert copied.read_text("utf-8") == "edited"


@pytest.mark.parametrize("name", NAMES)
def test_a_copied_config_says_where_it_is_from_and_loads_equal(name: str, tmp_path: Path, plugins: Plugins) -> None:
    path = copy_config(name, tmp_path, plugins)
    assert re.match(rf"# from mmft [\w.+]+: {name}\n\"\"\"", path.read_text("utf-8"))
    assert load_config(str(path), plugins) == load_config(name, plugins)
