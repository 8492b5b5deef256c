"""The sample data: small facts in Chinese and English, some of which are held out from training.

Each fact has a key, whose hash alone decides whether the fact is for training or for the questions, in any language,
direction or order. So the model cannot memorize an answer; it has to generalize.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

TEXTS, CHATS, QUESTIONS = "texts.jsonl", "conversations.jsonl", "questions.jsonl"
HELD_OUT_PERCENT = 10
NUM_QUESTIONS = 50
SYSTEM = {"en": "Answer briefly.", "zh": "请简短回答。"}

ENGLISH_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = dict(zip(ENGLISH_NUMBERS, "两三四五六七八九十", strict=True))
COLOURS = dict(zip(("red", "blue", "green", "white", "black", "yellow"), "红蓝绿白黑黄", strict=True))
# English plural, Chinese measure word, Chinese noun.
NOUNS = (
    ("cats", "只", "猫"), ("birds", "只", "鸟"), ("dogs", "条", "狗"), ("boats", "条", "船"),
    ("books", "本", "书"), ("cars", "辆", "车"), ("flowers", "朵", "花"), ("trees", "棵", "树"),
    ("pens", "支", "笔"), ("lamps", "盏", "灯"), ("doors", "扇", "门"), ("horses", "匹", "马"),
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """A question with its answer, and both as a statement."""

    key: str
    language: str
    question: str
    answer: str
    statement: str


def held_out(key: str) -> bool:
    """Whether the facts of `key` are held out from training, which the hash of the key decides."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def _fact(rng: random.Random, key: str, language: str, question: str, answer: str, *prefixes: str) -> Fact:
    """The fact whose statement is one of `prefixes`, or the question, followed by the answer."""
    prefix = rng.choice([*prefixes, f"{question}\n"])
    return Fact(key, language, question, answer, prefix + answer)


def sums(rng: random.Random) -> Fact:
    """A sum of a number under 90 and a digit."""
    a, b = rng.randint(10, 89), rng.randint(1, 9)
    key, total = f"sum {a} {b}", str(a + b)
    if rng.random() < 0.5:
        return _fact(rng, key, "en", f"What is {a}+{b}?", total, f"{a}+{b}=", f"{a}+{b} is\n")
    return _fact(rng, key, "zh", f"{a}加{b}等于多少？", total, f"{a}加{b}等于", f"{a}加{b}是\n")


def _phrase(rng: random.Random) -> tuple[str, str, str]:
    """A number of coloured things: its key, the same for all tasks, and the phrase in English and in Chinese."""
    number, colour = rng.choice(list(NUMBERS)), rng.choice(list(COLOURS))
    noun, measure, name = rng.choice(NOUNS)
    english = f"{number} {colour} {noun}"
    return f"phrase {english}", english, f"{NUMBERS[number]}{measure}{COLOURS[colour]}{name}"


def translations(rng: random.Random) -> Fact:
    """A phrase translated into the other language."""
    key, english, chinese = _phrase(rng)
    if rng.random() < 0.5:
        question = f"Translate into Chinese:\n{english}"
        return _fact(rng, key, "en", question, chinese, f"{english}:\n", f"Chinese for\n{english}:\n")
    return _fact(rng, key, "zh", f"翻译成英文：\n{chinese}", english, f"{chinese}：\n", f"英文：\n{chinese}\n")


def copies(rng: random.Random) -> Fact:
    """A phrase repeated."""
    key, english, chinese = _phrase(rng)
    if rng.random() < 0.5:
        return _fact(rng, key, "en", f"Repeat:\n{english}", english, f"{english}, again:\n", f"{english}\n")
    return _fact(rng, key, "zh", f"请重复：\n{chinese}", chinese, f"{chinese}，再来：\n", f"{chinese}\n")


Task = Callable[[random.Random], Fact]
TASKS: tuple[Task, ...] = (sums, translations, copies)
# Sums take the longest to learn.
LESSONS: tuple[Task, ...] = (sums, translations, sums, sums, copies)


def facts(seed: int, tasks: tuple[Task, ...], *, held: bool) -> Iterator[Fact]:
    """An endless sequence of facts of `tasks` in turn, either only held-out ones or only those for training."""
    rng = random.Random(seed)
    while True:
        for task in tasks:
            fact = task(rng)
            while held_out(fact.key) != held:
                fact = task(rng)
            yield fact


def questions(seed: int) -> list[Fact]:
    """NUM_QUESTIONS different held-out facts."""
    different: dict[str, Fact] = {}
    for fact in facts(seed, TASKS, held=True):
        different.setdefault(fact.question, fact)
        if len(different) == NUM_QUESTIONS:
            break
    return list(different.values())


def pretrain_rows(seed: int, num_rows: int) -> Iterator[dict[str, str]]:
    """Rows with one statement each; several in a row would take the model longer to learn."""
    for fact in islice(facts(seed, LESSONS, held=False), num_rows):
        yield {"text": fact.statement}


def sft_rows(seed: int, num_rows: int) -> Iterator[dict[str, str]]:
    """Rows with one question and its answer each."""
    yield from map(_row, islice(facts(seed, LESSONS, held=False), num_rows))


def question_rows(seed: int) -> Iterator[dict[str, str]]:
    """The held-out questions, as rows in the format of the training data."""
    yield from map(_row, questions(seed))


def _row(fact: Fact) -> dict[str, str]:
    return {"instruction": SYSTEM[fact.language], "input": fact.question, "output": fact.answer}


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Writes one row per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
