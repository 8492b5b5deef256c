"""Compares gigatoken with tokenizers: each code point beside others, then random texts of all kinds.

    python -m tests.bench.compare_engines FOLDER [TEXTS]    (some minutes)

FOLDER holds a tokenizer.json. For the code points its vocabulary is replaced by one that shows where the split pattern
splits: each byte merges with some neighbours. Differences are printed as ranges, which must be listed in
tokenizer/unicode_differences.py. The texts are encoded with the tokenizer unchanged; step 1's engine must not differ.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from common.data.tokenizer.gigatoken import Gigatoken
from common.data.tokenizer.text_tokenizer import EncodeBatchFlat, TextTokenizer, load_tokenizer
from common.data.tokenizer.unicode_differences import indices_of_differing_texts, with_exact_ids

FORMS = ("{}", "a{}", "{}\n", "!{}", " {}", "'{}a", "1{}", "{}\u0301", "\u0345{}", "{}\u0334")
BESIDE = ("a", "!", "'", "\u0120")  # a space, as byte-level BPE writes it
NEWLINE = "\u010a"
BATCH = 50_000


def show_splits(folder: Path, out: Path) -> None:
    """Writes the tokenizer of `folder` to `out` with a vocabulary that shows where its pattern parts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [pair for byte in alphabet for pair in ((byte, NEWLINE), (byte, "a"), *((each, byte) for each in BESIDE))]
    words = dict.fromkeys([*alphabet, *(first + second for first, second in merges)])
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.model = models.BPE({word: number for number, word in enumerate(words)}, merges)
    tokenizer.save(str(out / "tokenizer.json"))


def differing(tokenizer: TextTokenizer, encode_flat: EncodeBatchFlat, texts: list[str]) -> list[int]:
    """The numbers of the texts to which the engines give other ids."""
    expected = tokenizer.encode_batch(texts)
    ids, lengths = encode_flat(texts, False)
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    return [number for number, row in enumerate(rows) if row.tolist() != expected[number]]


def ranges(points: list[int]) -> list[str]:
    """First and last of each run of `points`, which rise."""
    found: list[list[int]] = []
    for point in points:
        if found and point == found[-1][1] + 1:
            found[-1][1] = point
        else:
            found.append([point, point])
    return [f"{first:04X}-{last:04X}" for first, last in found]


def compare_code_points(folder: Path) -> list[int]:
    """Those that differ in some form, and are not left to tokenizers; says what it finds."""
    points = [*range(0x80, 0xD800), *range(0xE000, 0x110000)]
    with tempfile.TemporaryDirectory() as name:
        show_splits(folder, Path(name))
        tokenizer = load_tokenizer(Path(name))
        engine = Gigatoken((Path(name) / "tokenizer.json").read_bytes()).encode_flat
        found: set[int] = set()
        for form in FORMS:
            for start in range(0, len(points), BATCH):
                part = points[start : start + BATCH]
                found |= {part[n] for n in differing(tokenizer, engine, [form.format(chr(p)) for p in part])}
            print(f"{form!r}: {len(found)} code points differ so far", flush=True)
    print("all:", *ranges(sorted(found)))
    return sorted(point for point in found if not indices_of_differing_texts([chr(point)]))


def random_text(chance: random.Random) -> str:
    """A short text of characters from all of Unicode, most of them common ones."""
    kinds = (range(0x20, 0x7F), range(0x80, 0x3000), range(0x4E00, 0x9FFF), range(0x10000, 0x110000), range(0, 0x20))
    lengths = chance.choices(kinds, (8, 4, 3, 2, 1), k=chance.randint(1, 20))
    return "".join(chr(chance.choice(kind)) for kind in lengths)


def main() -> None:
    folder, number = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200_000
    left = compare_code_points(folder)
    print("beyond unicode_differences:", *ranges(left) or ["none"])
    tokenizer, chance, wrong = load_tokenizer(folder), random.Random(0), 0
    encode = with_exact_ids(Gigatoken((folder / "tokenizer.json").read_bytes()).encode_flat, tokenizer)
    for start in range(0, number, BATCH):
        texts = [random_text(chance) for _ in range(min(BATCH, number - start))]
        wrong += len(differing(tokenizer, encode, texts))
    print(f"{wrong} of {number} texts differ")
    sys.exit(bool(left or wrong))


if __name__ == "__main__":
    main()
