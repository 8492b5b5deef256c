"""The sample data: small facts in Chinese and English, some of which no training row holds.

Each fact has a key; the key's hash alone decides whether the fact is for training or for the questions, in whatever
language, direction or order it is put. So no question's answer can be looked up, only worked out.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

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
    """A question and its answer, and the same as a plain statement."""

    key: str
    language: str
    question: str
    answer: str
    statement: str


def held_out(key: str) -> bool:
    """Whether the facts of `key` are kept from training: by the hash of the key and nothing else."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def sums(random: random.Random) -> Fact:
    """A sum of a number under 90 and a digit; one key for a + b and b + a."""
    a, b = random.randint(10, 89), random.randint(1, 9)
    key = f"sum {a} {b}"
    if random.random() < 0.5:
        return Fact(key, "en", f"What is {a} + {b}?", f"{a + b}", f"{a} + {b} = {a + b}")
    return Fact(key, "zh", f"{a} 加 {b} 等于多少？", f"{a + b}", f"{a} 加 {b} 等于 {a + b}")


def translations(random: random.Random) -> Fact:
    """A number of coloured things, put into the other language; one key for both directions."""
    number, colour = random.choice(list(NUMBERS)), random.choice(list(COLOURS))
    noun, measure, name = random.choice(NOUNS)
    english = f"{number} {colour} {noun}"
    chinese = f"{NUMBERS[number]}{measure}{COLOURS[colour]}{name}"
    key = f"translation {english}"
    if random.random() < 0.5:
        return Fact(key, "en", f"Translate: {english}", chinese, f"{english} is {chinese}")
    return Fact(key, "zh", f"翻译：{chinese}", english, f"{chinese} 是 {english}")


def copies(random: random.Random) -> Fact:
    """Three or four different words to be said again; one key for all orders of the same words."""
    chosen = random.sample(NOUNS, random.randint(3, 4))
    key = "copy " + " ".join(sorted(noun for noun, _, _ in chosen))
    if random.random() < 0.5:
        words = " ".join(noun for noun, _, _ in chosen)
        return Fact(key, "en", f"Repeat: {words}", words, f"Again: {words} = {words}")
    words = " ".join(name for _, _, name in chosen)
    return Fact(key, "zh", f"重复：{words}", words, f"再来：{words} = {words}")


TASKS: tuple[Callable[[random.Random], Fact], ...] = (sums, translations, copies)


def facts(seed: int, *, held: bool) -> Iterator[Fact]:
    """Endless facts of all tasks in turn, either only held-out ones or only those for training."""
    chance = random.Random(seed)
    while True:
        for task in TASKS:
            fact = task(chance)
            while held_out(fact.key) != held:
                fact = task(chance)
            yield fact


def questions(seed: int) -> list[Fact]:
    """NUM_QUESTIONS different held-out facts."""
    different: dict[str, Fact] = {}
    for fact in facts(seed, held=True):
        different.setdefault(fact.question, fact)
        if len(different) == NUM_QUESTIONS:
            break
    return list(different.values())


def pretrain_rows(seed: int, num_rows: int, num_statements: int) -> Iterator[dict[str, str]]:
    """Rows of `num_statements` plain statements, one a line."""
    chosen = facts(seed, held=False)
    for _ in range(num_rows):
        yield {"text": "\n".join(fact.statement for fact in islice(chosen, num_statements))}


def sft_rows(seed: int, num_rows: int) -> Iterator[dict[str, str]]:
    """Rows of one question and its answer."""
    for fact in islice(facts(seed, held=False), num_rows):
        yield {"instruction": SYSTEM[fact.language], "input": fact.question, "output": fact.answer}


def question_rows(seed: int) -> Iterator[dict[str, str]]:
    """The held-out questions as rows that hold what is expected."""
    for fact in questions(seed):
        yield {"instruction": SYSTEM[fact.language], "input": fact.question, "expected": fact.answer}


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Writes one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
