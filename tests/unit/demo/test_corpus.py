"""The sample data, and that no question's answer can be looked up in it."""

import json
import re
from itertools import islice
from pathlib import Path

import pytest

from common.demo.corpus import (
    COLOURS,
    NOUNS,
    NUM_QUESTIONS,
    NUMBERS,
    SYSTEM,
    TASKS,
    facts,
    held_out,
    pretrain_rows,
    question_rows,
    questions,
    sft_rows,
    write_jsonl,
)

MANY = 4000


def test_facts_of_both_kinds_are_many_and_share_no_key() -> None:
    training = {fact.key for fact in islice(facts(1, TASKS, held=False), MANY)}
    kept = {fact.key for fact in islice(facts(2, TASKS, held=True), MANY)}
    assert not training & kept
    assert len(training) > 500 and len(kept) > 50


def test_a_phrase_has_one_key_in_either_language_direction_and_task() -> None:
    phrases = {}
    for fact in islice(facts(3, TASKS, held=False), MANY):
        if fact.key.startswith("phrase "):
            english = fact.key.removeprefix("phrase ")
            number, colour, noun = english.split()
            measure, name = next((m, n) for plural, m, n in NOUNS if plural == noun)
            chinese = NUMBERS[number] + measure + COLOURS[colour] + name
            assert fact.answer in (english, chinese)
            assert (english in fact.question) != (chinese in fact.question)
            phrases.setdefault((fact.answer == english, english in fact.question), fact)
    assert len(phrases) == 4, "translations in both directions, and copies in both languages"


def test_sums_are_right() -> None:
    seen = 0
    for fact in islice(facts(4, TASKS, held=False), MANY):
        if found := re.fullmatch(r"(?:What is )?(\d+)(?:\+|加)(\d+)(?:\?|等于多少？)", fact.question):
            assert int(found[1]) + int(found[2]) == int(fact.answer)
            assert fact.key == f"sum {found[1]} {found[2]}"
            seen += 1
    assert seen == pytest.approx(MANY / len(TASKS), abs=1)


def test_no_row_for_training_holds_a_question_s_answer() -> None:
    rows = [row["text"] for row in pretrain_rows(1, 6000)]
    rows += ["\n".join(row.values()) for row in sft_rows(2, 4000)]
    text = "\n".join(rows)
    for fact in questions(3):
        assert held_out(fact.key)
        if fact.key.startswith("sum "):
            _, a, b = fact.key.split()
            assert not re.search(rf"(?<!\d){a}(\+|加){b}(?!\d)", text)
        else:
            assert fact.key.removeprefix("phrase ") not in text
            assert fact.question not in text and fact.question.split("\n")[1] not in text


@pytest.mark.parametrize("language", SYSTEM)
def test_questions_are_different_and_of_both_languages(language: str) -> None:
    facts = questions(5)
    assert len({fact.question for fact in facts}) == len(facts) == NUM_QUESTIONS
    assert NUM_QUESTIONS * 0.3 < sum(fact.language == language for fact in facts) < NUM_QUESTIONS * 0.7


def test_the_same_seed_gives_the_same_rows(tmp_path: Path) -> None:
    assert list(pretrain_rows(1, 5)) == list(pretrain_rows(1, 5)) != list(pretrain_rows(2, 5))
    assert list(sft_rows(1, 5)) == list(sft_rows(1, 5)) != list(sft_rows(2, 5))
    write_jsonl(tmp_path / "a" / "rows.jsonl", question_rows(1))
    rows = [json.loads(line) for line in (tmp_path / "a" / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == list(question_rows(1)) and set(rows[0]) == {"instruction", "input", "output"}
