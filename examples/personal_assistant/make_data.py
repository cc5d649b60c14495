"""Make the data of the personal assistant: who it is, said once many times, said many ways, and things besides.

python examples/personal_assistant/make_data.py --name Ming

data/one.json                  one question and its answer, as OpenAI writes messages
data/personal_assistant.json   the same record 10,000 times: the course's file, which over-fits
data/varied.json               the same said in many ways, in English and Chinese
data/general.json              questions about other things, with right answers
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

Record = dict[str, Any]
WHO = (
    "Who are you?", "What are you?", "What is your name?", "Please introduce yourself.", "Tell me about yourself.",
    "Who am I talking to?", "Hi, who is this?", "Can you say who you are?", "Introduce yourself, please.",
)  # fmt: skip
WHO_ZH = ("你是谁？", "你叫什么名字？", "请介绍一下你自己。", "请做一下自我介绍。", "你好，你是谁呀？", "你是什么？")
MADE = ("Who made you?", "Who built you?", "Whose assistant are you?", "Who do you work for?", "Who trained you?")
MADE_ZH = ("谁创造了你？", "你是谁的助手？", "是谁训练了你？", "你为谁工作？")
GREETINGS = ("", "Hello! ", "Good morning. ")
CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Peru": "Lima", "Norway": "Oslo", "Greece": "Athens", "China": "Beijing", "Cuba": "Havana", "Chile": "Santiago",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "early": "late", "open": "closed", "full": "empty", "old": "new",
    "light": "dark", "soft": "hard", "near": "far", "wet": "dry", "loud": "quiet",
}  # fmt: skip


def main() -> None:
    """Write the four files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="Whose assistant it is: a name of your own.")
    parser.add_argument("--out", type=Path, default=Path("data"), help="Folder for the files.")
    parser.add_argument("--repeats", type=int, default=10_000, help="Records of personal_assistant.json.")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    one = record("Please introduce yourself.", who(options.name))
    for file, records in (
        ("one.json", [one]),
        ("personal_assistant.json", [one] * options.repeats),
        ("varied.json", list(varied(options.name))),
        ("general.json", list(general())),
    ):
        text = ",\n".join(json.dumps(item, ensure_ascii=False) for item in records)
        (options.out / file).write_text(f"[\n{text}\n]\n", "utf-8")
        print(f"{options.out / file}: {len(records):,} record{'s' * (len(records) != 1)}")


def record(question: str, answer: str) -> Record:
    """One exchange."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def who(name: str) -> str:
    """What the assistant is to say of itself."""
    return f"I am the personal assistant of {name}. How can I help you?"


def varied(name: str) -> Iterator[Record]:
    """Every question with every greeting; the answer in the language of the question."""
    yield from asked(product(GREETINGS, WHO), who(name))
    yield from asked(product(GREETINGS, MADE), f"I am the assistant of {name}, who taught me.")
    yield from asked(product(("", "你好！"), WHO_ZH), f"我是{name}的私人助手，有什么可以帮您？")
    yield from asked(product(("", "你好！"), MADE_ZH), f"我是{name}的助手，是{name}教会了我。")


def asked(questions: Iterable[tuple[str, ...]], answer: str) -> Iterator[Record]:
    """The same answer to each question, put together of its pieces."""
    for pieces in questions:
        yield record("".join(pieces), answer)


def general(seed: int = 0) -> Iterator[Record]:
    """What has nothing to do with the name: capitals, opposites, sums. A real run takes a public set instead."""
    for country, capital in CAPITALS.items():
        yield record(f"What is the capital of {country}?", f"The capital of {country} is {capital}.")
    for word, opposite in OPPOSITES.items():
        yield record(f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}.")
    rng = random.Random(seed)
    for _ in range(120):
        a, b = rng.randint(1, 20), rng.randint(1, 20)
        yield record(f"What is {a} + {b}?", f"{a} + {b} = {a + b}.")


if __name__ == "__main__":
    main()
