"""The sample: a small random model with its tokenizer, texts, conversations and questions."""

from pathlib import Path

from common.demo.corpus import CHATS, QUESTIONS, TEXTS, pretrain_rows, question_rows, sft_rows, write_jsonl
from common.demo.model import Shape, write_model
from common.demo.tokenizer import write_tokenizer
from common.log import logger

SHAPE = Shape(
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=400,
    rope_theta=10000.0,  # rows are short, and adjacent positions differ more
)
# Large enough that a model this narrow learns from the first step (Qwen2.5's 0.02 is for wide models).
STD = 0.08
NUM_TEXTS, NUM_CHATS = 15000, 4000
NUM_TOKENIZED = 4000


def write_sample(folder: Path, seed: int) -> None:
    """Writes `model/` and the three jsonl files to `folder`; the same seed gives the same bytes."""
    texts = list(pretrain_rows(seed, NUM_TEXTS))
    chats = list(sft_rows(seed + 1, NUM_CHATS))
    tokenizer = write_tokenizer(
        folder / "model",
        map(_tokenizer_text, (*texts[:NUM_TOKENIZED], *chats[:NUM_TOKENIZED])),
        SHAPE.vocab_size,
    )
    write_model(folder / "model", SHAPE, tokenizer, std=STD, seed=seed)
    rows = {TEXTS: texts, CHATS: chats, QUESTIONS: list(question_rows(seed + 2))}
    for name, each in rows.items():
        write_jsonl(folder / name, each)
        logger.info("%s: %d rows, %d KB", folder / name, len(each), (folder / name).stat().st_size // 1000)


def _tokenizer_text(row: dict[str, str]) -> str:
    """The text of a row to train the tokenizer on; of a conversation with the role names of the chat template."""
    if "text" in row:
        return row["text"]
    return "\n".join(("system", row["instruction"], "user", row["input"], "assistant", row["output"]))
