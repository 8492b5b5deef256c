"""What an old run means otherwise here, beyond single flags: its data, what is learned, and the loss."""

import re
import shlex

from common.adopt.draft import CHANGED, PROBLEM, Draft
from common.adopt.lengths import as_number

FAMILIES = r"qwen|gpt"
OTHERS = r"moe|_vl|bert|t5|llama|mixtral|deepseek|chatglm|baichuan|mamba|retro|vision|vlm|ict|multimodal"
# Of Pai-Megatron-Patch's one program for all Qwen models; a dense one has no --num-experts.
DENSE_TOO = "pretrain_qwen2_moe.py"


def explain(draft: Draft) -> None:
    """Adds the remarks on the meaning of a step."""
    kind = draft.step.kind
    if kind == "train":
        _explain_program(draft)
        _explain_tied(draft)
        if draft.get("TRAIN_OR_CONVERT_CKPT") == "train":
            (_explain_finetuning if draft.get("TRAIN_MODE") == "finetune" else _explain_pretraining)(draft)
    elif kind == "preprocess_sft":
        for text in (ROLES, HEADERS):
            draft.say(CHANGED, text)
        draft.say(
            CHANGED, "data that the old kit has made need not be made again: python -m common.preprocess import-legacy"
        )
    elif kind == "preprocess_pretrain":
        draft.say(CHANGED, "a special token spelled in a document is text here (SPECIAL_TOKENS); the old program"
                  " dropped the document, or parsed the token")  # fmt: skip


ROLES = (
    "instruction is the system's turn and input the user's; the old program joined both to the user's turn under the"
    " template's own system turn: ROLES=alpaca in step 1 keeps that"
)
HEADERS = (
    "an answer's header (<|im_start|>assistant) and the newline after <|im_end|> are not learned here: LOSS_ON=turn in"
    " step 1 learns the header too"
)


def is_patched(draft: Draft) -> bool:
    """Whether the program is Pai-Megatron-Patch's or the old kit's, rather than Megatron-LM's own."""
    return "--patch-tokenizer-type" in draft.step.flags or "qwen" in draft.step.program.rsplit("/", 1)[-1]


def _explain_program(draft: Draft) -> None:
    name = draft.step.program.rsplit("/", 1)[-1]
    if name == DENSE_TOO and "--num-experts" not in draft.step.flags:
        return
    if re.search(OTHERS, name) or not re.search(FAMILIES, name):
        draft.say(
            PROBLEM,
            f"{name}: only dense Qwen2, Qwen2.5 and Qwen3 are trained here; another family is refused at the start",
        )


def _explain_tied(draft: Draft) -> None:
    tied = "--untie-embeddings-and-output-weights" not in draft.step.flags
    if is_patched(draft) and tied and (draft.number("PP") or 1) > 1:
        draft.say(CHANGED, "tied embeddings with PP above 1: the old kit's checkpoints of such a model could not be"
                  " loaded; step 2 writes ones that can")  # fmt: skip


def _explain_finetuning(draft: Draft) -> None:
    for text in (ROLES, HEADERS):
        draft.say(CHANGED, text)
    draft.say(CHANGED, "the loss is the mean over the supervised tokens of the global batch; Pai-Megatron-Patch and the"
              " old kit averaged each sample first (and the old kit divided its gradients by tokens once more, so that"
              " CLIP_GRAD never acted): losses and gradient norms are not comparable")  # fmt: skip
    draft.say(
        CHANGED,
        "a sample longer than SEQ_LENGTH is an error here (TRUNCATE); the old program cut it, with its <|im_end|>",
    )
    if not is_patched(draft):
        draft.say(PROBLEM, "Megatron-LM's fine-tuning reads rows: run step 1 on them (1_preprocess_sft.sh), and set"
                  " DATASET_PATH to its OUTPUT_PREFIX")  # fmt: skip
    elif "--data-path" in draft.step.flags:
        _import_data(draft)


def _import_data(draft: Draft) -> None:
    """DATASET_PATH as import-legacy writes it, and the commands."""
    if "DATASET_PATH" not in draft.settings:
        return
    value, why = draft.settings["DATASET_PATH"]
    words = value.split(" ")
    for word in words:
        if as_number(word) is None:
            command = ["--input", word, "--output-prefix", f"{word}_imported"]
            draft.say(PROBLEM, "fine-tuning data of the old kit holds tokens and labels in one row; once, before"
                      f" training: python -m common.preprocess import-legacy {shlex.join(command)}"
                      " --tokenizer-path MODEL")  # fmt: skip
    imported = " ".join(word if as_number(word) is not None else f"{word}_imported" for word in words)
    draft.settings["DATASET_PATH"] = (imported, f"{why}, imported")


def _explain_pretraining(draft: Draft) -> None:
    if is_patched(draft):
        draft.say(CHANGED, "the loss is the mean over all tokens of the global batch; in the old kit gradients were of"
                  " a sum, so that CLIP_GRAD always acted")  # fmt: skip
    draft.say(CHANGED, "data of Megatron-LM's preprocess_data.py (.bin, .idx) is read as it is; without step 1's"
              " manifest its tokenizer is not compared with the model's")  # fmt: skip
