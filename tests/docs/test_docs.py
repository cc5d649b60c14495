"""The documentation is true: its commands exist and run, its Python runs, its sessions print what they show.

The commands of a README are executed in order in one folder, as a reader would, on tiny models. What a reader edits by
hand the test edits too, and nothing else is changed except the number of DataLoader workers and that the
tiny model may have another chat template than the one it stands for.
"""

import doctest
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, get_args

import click
import pytest
import torch
from PIL import Image
from pydantic import BaseModel

from mmft.cli import cli, main
from mmft.config import Lora, TrainConfig
from mmft.plugins import load_plugins

ROOT = Path(__file__).parents[2]
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
PAGES = (
    *READMES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / "examples" / name for name in ("mmft-plugin-hello/README.md", "personal_assistant/README.md")),
)  # fmt: skip


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language; the language of a bare block is ''."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands(page: Path) -> list[list[str]]:
    """Each `mmft` line of the bash blocks, split as a shell does."""
    lines = [line for text in blocks(page, "bash") for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("mmft ") or line == "mmft"]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Parse a command line down to its last subcommand, running nothing. Raises `click.UsageError`."""
    monkeypatch.setattr(click.Command, "invoke", lambda self, context: None)  # of the leaves; groups have their own
    return lambda arguments: cli(args=list(arguments), standalone_mode=False)


ALL_COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(
    ("page", "command"), ALL_COMMANDS, ids=[f"{page.name}:{shlex.join(command)}" for page, command in ALL_COMMANDS]
)
def test_every_command_of_the_docs_parses(page: Path, command: list[str], parse: Callable[[list[str]], None]) -> None:
    parse(command)


def test_the_parser_of_this_test_refuses_what_the_command_line_refuses(parse: Callable[[list[str]], None]) -> None:
    parse(["train", "x.py", "--set", "a=1"])
    wrong = (["trian", "x.py"], ["train", "x.py", "--sett", "a=1"], ["data", "shwo", "x"], ["chat", "--bits", "5"])
    for arguments in wrong:
        with pytest.raises(click.UsageError):
            parse(arguments)


def test_both_readmes_have_the_same_commands_blocks_links_and_tables() -> None:
    english, chinese = READMES
    assert commands(english) == commands(chinese) and len(commands(english)) > 15
    assert blocks(english, "python") == blocks(chinese, "python")
    assert blocks(english, "") == blocks(chinese, "")
    shell = [[line for line in t.splitlines() if not line.startswith("#")] for t in blocks(english, "bash")]
    assert shell == [[line for line in t.splitlines() if not line.startswith("#")] for t in blocks(chinese, "bash")]
    counted = [[len(re.findall(p, r.read_text("utf-8"), re.M)) for p in (r"^#", r"^\|", r"^- ")] for r in READMES]
    assert counted[0] == counted[1]
    targets = [set(links(r)) - {"README.md", "README.zh-CN.md"} for r in READMES]
    assert targets[0] == targets[1]


def links(page: Path) -> list[str]:
    """The relative targets of a page's links."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL))
    return [target for target in targets if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in links(page):
        file, _, anchor = target.partition("#")
        assert (page.parent / file).exists(), target
        headings = re.findall(r"^#+ (.+)$", (page.parent / file if file else page).read_text("utf-8"), re.MULTILINE)
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target


def test_every_make_target_of_the_docs_exists() -> None:
    shell = [text for page in PAGES for text in blocks(page, "bash")]
    wanted = {target for text in shell for target in re.findall(r"^make (\w+)", text, re.MULTILINE)}
    assert wanted >= {"demo", "test"}
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert wanted <= set(rules)


def test_files_that_pip_is_told_to_read_exist() -> None:
    files = {name for page in PAGES for text in blocks(page, "bash") for name in re.findall(r" -c (\S+)", text)}
    assert files == {"constraints.txt"}
    assert (ROOT / "constraints.txt").is_file()


def test_life_of_a_sample_prints_what_the_page_shows() -> None:
    page = ROOT / "docs" / "life-of-a-sample.md"
    outcome = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert outcome.failed == 0
    assert outcome.attempted > 30


@pytest.mark.parametrize("name", ["data.md", "data.zh-CN.md"])
def test_the_walk_through_the_data_prints_what_the_page_shows(name: str) -> None:
    outcome = doctest.testfile(str(ROOT / "docs" / name), module_relative=False, encoding="utf-8")
    assert (outcome.failed, outcome.attempted > 20) == (0, True)


def test_both_pages_about_data_have_the_same_commands_and_sessions() -> None:
    english, chinese = ROOT / "docs" / "data.md", ROOT / "docs" / "data.zh-CN.md"
    assert all(blocks(english, language) == blocks(chinese, language) for language in ("bash", "python", ""))


TRAINING = (ROOT / "docs" / "training.md", ROOT / "docs" / "training.zh-CN.md")


def test_both_pages_about_training_have_the_same_commands_and_tables() -> None:
    english, chinese = TRAINING
    assert all(blocks(english, language) == blocks(chinese, language) for language in ("bash", "python"))
    counted = [[len(re.findall(p, page.read_text("utf-8"), re.M)) for p in (r"^#", r"^\|")] for page in TRAINING]
    assert counted[0] == counted[1]


def test_both_pages_about_converting_have_the_same_commands_and_tables() -> None:
    english, chinese = pages = (ROOT / "docs" / "convert.md", ROOT / "docs" / "convert.zh-CN.md")
    assert blocks(english, "bash") == blocks(chinese, "bash") and len(commands(english)) > 10
    counted = [[len(re.findall(p, page.read_text("utf-8"), re.M)) for p in (r"^#", r"^\|", r"^- ")] for page in pages]
    assert counted[0] == counted[1]


def test_both_pages_about_chat_have_the_same_commands_and_tables() -> None:
    english, chinese = pages = (ROOT / "docs" / "chat.md", ROOT / "docs" / "chat.zh-CN.md")
    assert all(blocks(english, language) == blocks(chinese, language) for language in ("bash", "python", ""))
    assert len(commands(english)) > 15
    counted = [[len(re.findall(p, page.read_text("utf-8"), re.M)) for p in (r"^#", r"^\|")] for page in pages]
    assert counted[0] == counted[1]


@pytest.mark.parametrize("page", TRAINING, ids=lambda page: page.name)
def test_every_field_and_setting_that_the_training_pages_name_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    names = re.findall(r"`((?:model|data|optim|runtime)(?:\.\w+)+)", text)
    assert len(names) > 15
    for name in names:
        part: Any = TrainConfig
        for field in name.split("."):
            annotation = part.model_fields[field].annotation
            options = [one for one in (annotation, *get_args(annotation)) if isinstance(one, type)]
            part = next((one for one in options if issubclass(one, BaseModel)), None)
    for block in blocks(page, "python"):
        exec(block, {})
    values = re.findall(r"`(Lora\([a-z]+=.*?\))`", text)
    assert len(values) == 4 and all(eval(value, {"Lora": Lora}) for value in values)


Run = Callable[..., tuple[object, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """`mmft ARGUMENTS` through `main()` in a folder of its own: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmft", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capfd.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


def test_configs_shows_the_error_that_really_comes(run: Run) -> None:
    (shown,) = [text for text in blocks(ROOT / "docs" / "configs.md", "") if text.startswith("$ mmft check")]
    command, _, message = shown.partition("\n")
    code, out, err = run(*shlex.split(command)[2:])
    assert (code, out) == (2, "")
    assert err == message


def test_commands_of_configs_run(run: Run, tmp_path: Path) -> None:
    shows = [command for command in commands(ROOT / "docs" / "configs.md") if command[0] == "show"]
    printed = [json.loads(run(*command)[1]) for command in shows]
    assert printed[0]["model"]["llm"]["lora"]["r"] == 64 and printed[0]["optim"]["lr"] == 1e-4
    assert printed[1]["data"]["datasets"][0]["limit"] == 1000 and printed[1]["data"]["packing"] is True
    assert printed[2]["model"]["vision"]["encoder"]["select_layer"] == -1
    example = next(text for text in blocks(ROOT / "docs" / "configs.md", "python") if "override" in text)
    (tmp_path / "my.py").write_text(example, "utf-8")
    assert json.loads(run("show", "my.py")[1])["data"]["datasets"][0]["source"]["path"] == "data/my.json"


def write_data(folder: Path) -> None:
    """The files a reader of the README is told to have, at the places its configs name."""
    pictures = [folder / "data/llava/images", folder / "data/llava/LLaVA-Pretrain/images", folder / "images"]
    for pictured in pictures:
        pictured.mkdir(parents=True)
        Image.new("RGB", (40, 30), "red").save(pictured / "1.jpg")
    Image.new("RGB", (40, 30), "red").save(folder / "cat.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    seen = json.dumps([{"id": str(i), "image": "1.jpg", "conversations": turns} for i in range(4)])
    for name in ("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "llava_v1_5_mix665k.json"):
        (folder / "data/llava" / name).write_text(seen, "utf-8")
    (folder / "questions.json").write_text(seen, "utf-8")
    messages = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}]
    (folder / "messages.jsonl").write_text(f"{json.dumps({'messages': messages})}\n" * 4, "utf-8")
    (folder / "asked.txt").write_text("What is it?\n", "utf-8")
    (folder / "quiz.jsonl").write_text('{"ask": "1 + 1?", "solution": "2"}\n', "utf-8")


def edit(config: Path, **settings: object) -> None:
    """What a reader does: give the constants at the top of a copied config other values."""
    text = config.read_text("utf-8")
    for name, value in settings.items():
        text, changed = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", text, flags=re.MULTILINE)
        assert changed <= 1
    config.write_text(text, "utf-8")


@contextmanager
def served(run: str, folder: Path) -> Iterator[str]:
    """The address of `mmft serve` on a run, in this process."""
    import uvicorn

    from mmft.chat.server.app import ServerOptions, bind, build_app
    from mmft.chat.server.desk import Desk
    from mmft.chat.server.pictures import Pictures
    from mmft.chat.server.request import Reader
    from mmft.inference import Generation, find_model, load_assistant

    options, pictures = ServerOptions(port=0), Pictures(folder)
    assistant = load_assistant(find_model(run), load_plugins(), device=torch.device("cpu"))
    defaults = Generation(max_new_tokens=4)
    reader = Reader("llava_finetune", assistant.template, assistant.sees, defaults, pictures)
    desk = Desk(assistant, pictures, max_waiting=1)
    server = uvicorn.Server(uvicorn.Config(build_app(reader, desk, options), log_level="warning"))
    with bind(options) as bound:
        bound.listen()
        thread = Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
            assert (desk.answered, desk.cancelled) == (3, 0)
        finally:
            server.should_exit = True
            thread.join()


def test_the_readme_can_be_followed_from_top_to_bottom(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llm_path: Path, tiny_clip_path: Path
) -> None:
    """Every `mmft` line but `web`, in order: copy, edit, check, train, resume, show, chat, evaluate, a plugin.

    What `serve` serves is asked by the client of docs/chat.md.
    """
    write_data(tmp_path)
    (tmp_path / "my_map.py").write_text(blocks(READMES[0], "python")[0], "utf-8")
    outputs = {}
    for command in commands(READMES[0]):
        if command[0] == "web":
            continue
        if command[0] == "serve":
            (client,) = blocks(ROOT / "docs" / "chat.md", "python")
            (tmp_path / "uploads").mkdir()
            with served(command[1], tmp_path / "uploads") as address:
                assert "http://127.0.0.1:8000/v1" in client
                exec(client.replace("http://127.0.0.1:8000", address), {})
            continue
        # the tiny model stands for Llama 3 and for Vicuna, and has another template than either
        stands_in = ["--set", "data.num_workers=0", "--set", "data.allow_template_difference=true"]
        extra = stands_in if command[0] == "train" else []
        extra += ["--max-new-tokens", "4"] if command[0] == "chat" else []
        if "--resume" in command:
            assert run(*command[:2], "--overwrite", "--set", "runtime.save_steps=1", *extra)[0] == 0
        monkeypatch.setattr(sys, "stdin", (tmp_path / "asked.txt").open())  # read by `mmft chat` without -m
        code, out, err = run(*command, *extra)
        assert code == 0, (command, out, err)
        assert command[0] != "chat" or out.endswith("\n")  # an answer, however short, ends its line
        outputs[shlex.join(command)] = out
        if command[0] == "copy-cfg":
            edit(
                tmp_path / out.strip(),
                LLM_PATH=str(tiny_llm_path), CLIP_PATH=str(tiny_clip_path), DATA=str(tmp_path / "messages.jsonl"),
            )  # fmt: skip
    assert "⟦Hello." in outputs["data show my_sft.py -n 2"]
    assert "1.jpg: 16 tokens" in outputs["data show llava_finetune.py"]
    assert "⟦2" in next(out for command, out in outputs.items() if command.startswith("--plugin"))
    assert json.loads(outputs["show llava_finetune --set model.llm.lora.r=512"])["model"]["llm"]["lora"]["r"] == 512
    for run_folder in ("llama3_8b_qlora_messages", "llava_pretrain", "llava_finetune"):
        assert (tmp_path / "work_dirs" / run_folder / "final" / "mmft.json").is_file()
    assert json.loads((tmp_path / "work_dirs/eval/eval.json").read_text())["questions"] == 4
