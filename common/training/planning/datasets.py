"""What a run trains on and is validated with: the datasets of DATASET_PATH, each fit for the model and the mode."""

import hashlib
from pathlib import Path

from common.data.dataset.blended_dataset import Blend, blend_datasets, read_blend
from common.data.dataset.builder import build_dataset, check_mask, split_documents
from common.data.dataset.file_hash import DATA_SAMPLES, hash_samples
from common.data.dataset.id_range import check_ids
from common.data.dataset.indexed_dataset import bin_path, idx_path, open_mask, open_tokens
from common.data.dataset.manifest import DataFiles
from common.data.dataset.sample_dataset import SampleDataset
from common.data.dataset.shuffle import order_name
from common.errors import KitError
from common.log import logger
from common.training.settings import TrainSettings


def open_data(
    settings: TrainSettings, model_folder: Path, vocab_size: int, check: bool = True, order: str | None = None
) -> tuple[SampleDataset, SampleDataset | None]:
    """The samples of training and of validation; None where a split holds none.

    check: hold the data against itself and its ids against `vocab_size`, which reads each index once and data without
    a manifest too; one process of a node does. order: that of the training samples of the run which is resumed; None:
    by their number. Raises KitError for data that is damaged, of another kind, tokenizer or vocabulary, or too little.
    """
    assert settings.dataset_path
    blend = read_blend(settings.dataset_path)
    apart = read_blend(settings.valid_dataset_path, "VALID_DATASET_PATH") if settings.valid_dataset_path else []
    for each in (blend, apart):
        check_tokenizer(each, model_folder)
        if check:
            check_data(each, vocab_size, model_folder / "config.json")
    listed = listed_of(order, len(blend))
    if apart:
        whole = [
            (weight, files.tokens.name, _open(settings, files, None, each))
            for (weight, files), each in zip(blend, listed, strict=True)
        ]
        return blend_datasets(whole), blend_datasets(
            [(weight, files.tokens.name, _open(settings, files, None, None)) for weight, files in apart]
        )
    train, valid = [], []
    for (weight, files), each_listed in zip(blend, listed, strict=True):
        name = files.tokens.name
        train_range, valid_range = split_documents(len(open_tokens(files.tokens, check=False)), settings.split)
        if settings.eval_interval and len(valid_range):
            try:
                valid.append((weight, name, _open(settings, files, valid_range, each_listed)))
            except KitError as error:
                logger.info("no validation on %s: the split's second part is too small (%s)", name, error)
        train.append((weight, name, _open(settings, files, train_range, each_listed)))
    return blend_datasets(train), blend_datasets(valid) if valid else None


def listed_of(order: str | None, num_datasets: int) -> list[bool | None]:
    """For each dataset whether its order is listed, as `order` tells: one name for all, or a name each, by commas."""
    names = order.split(", ") if order else [""]
    names = names * num_datasets if len(names) == 1 else names
    if len(names) != num_datasets:
        return [None] * num_datasets
    return [{order_name(True): True, order_name(False): False}.get(name) for name in names]


def check_data(blend: Blend, vocab_size: int, source: Path) -> None:
    """Raises KitError for files that are damaged, and for ids beyond `vocab_size`."""
    for files in {files.tokens: files for _, files in blend}.values():
        tokens = open_tokens(files.tokens)
        if files.loss_mask:
            check_mask(tokens, open_mask(files.loss_mask))
        check_ids(files, tokens, vocab_size, source)


def check_tokenizer(blend: Blend, model_folder: Path) -> None:
    """Raises KitError when the data was made with another tokenizer than the model folder's."""
    path = model_folder / "tokenizer.json"
    own = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    for _, files in blend:
        made_with = (files.manifest or {}).get("tokenizer", {}).get("tokenizer_sha256")
        if own is None or made_with is None:
            missing = f"{path} is not there" if own is None else f"{files.tokens} has no manifest"
            logger.info("whether the data is of the model's tokenizer is not known: %s", missing)
        elif made_with != own:
            raise KitError(
                f"{files.tokens} was made with another tokenizer than {path}: its ids would mean other words to the"
                " model; run step 1 with TOKENIZER_PATH set to that folder, or train the model that the data is for"
            )


def _open(settings: TrainSettings, files: DataFiles, documents: range | None, listed: bool | None) -> SampleDataset:
    return build_dataset(
        files,
        train_mode=settings.train_mode,
        seq_length=settings.seq_length,
        seed=settings.seed,
        documents=documents,
        packing=settings.packing,
        truncate=settings.truncate,
        reset_attention=settings.reset_attention,
        pad_id=0,
        check=False,
        listed=listed,
    )


def content_hash(dataset_path: str) -> str:
    """A hash of what DATASET_PATH holds, wherever it lies: by its manifests, else by samples of its files.

    A manifest's identity is made of the contents of the inputs, the tokenizer and the settings.
    """
    digest = hashlib.sha256()
    for weight, files in read_blend(dataset_path):
        digest.update(str(weight).encode())
        if identity := (files.manifest or {}).get("identity"):
            digest.update(identity.encode())
            continue
        for prefix in filter(None, (files.tokens, files.loss_mask)):
            for path in (idx_path(prefix), bin_path(prefix)):
                digest.update(hash_samples(path, DATA_SAMPLES).encode())
    return digest.hexdigest()[:16]
