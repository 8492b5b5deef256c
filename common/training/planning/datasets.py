"""The training and validation datasets of a run, checked against the model's vocabulary and tokenizer."""

import hashlib
from fractions import Fraction
from pathlib import Path

from common.data.dataset.blended_dataset import Blend, blend_datasets, read_blend
from common.data.dataset.builder import build_dataset, check_mask, split_documents
from common.data.dataset.file_hash import DATA_SAMPLES, hash_samples
from common.data.dataset.id_range import check_ids
from common.data.dataset.indexed_dataset import bin_path, idx_path, open_mask, open_tokens
from common.data.dataset.manifest import DataFiles
from common.data.dataset.named_datasets import NamedDatasets, read_named
from common.data.dataset.preference_dataset import number_datasets
from common.data.dataset.sample_dataset import SampleDataset
from common.data.dataset.shuffle import order_name
from common.errors import KitError
from common.log import logger
from common.training.settings import TrainSettings


def open_data(
    settings: TrainSettings, model_folder: Path, vocab_size: int, check: bool = True, order: str | None = None
) -> tuple[SampleDataset, SampleDataset | None]:
    """The training and validation samples; None for an empty validation split.

    check: verify the files, and the token ids against `vocab_size`; reads every index, and the tokens of data without
    a manifest, so only one process of each node does it. order: the sample order recorded by the run being resumed;
    None: derived from the number of samples. Raises KitError for data that is damaged, too small, in another format,
    or made with another tokenizer or vocabulary.
    """
    train, valid = _open_data(settings, model_folder, vocab_size, check, order)
    number_datasets([train, valid])
    return train, valid


def _open_data(
    settings: TrainSettings, model_folder: Path, vocab_size: int, check: bool, order: str | None
) -> tuple[SampleDataset, SampleDataset | None]:
    assert settings.dataset_path
    blend = read_blend(settings.dataset_path)
    named, separate_valid = read_validation(settings)
    for each in (blend, separate_valid, [(Fraction(1), files) for files in named.values()]):
        check_tokenizer(each, model_folder)
        if check:
            check_data(each, vocab_size, model_folder / "config.json")
    listed = parse_orders(order, len(blend))
    if named or separate_valid:
        whole = blend_datasets(
            [
                (weight, files.tokens.name, _open(settings, files, None, each))
                for (weight, files), each in zip(blend, listed, strict=True)
            ]
        )
        if named:
            members = {name: _open(settings, files, None, None) for name, files in named.items()}
            return whole, NamedDatasets(members, samples_at_once(settings))
        return whole, blend_datasets(
            [(weight, files.tokens.name, _open(settings, files, None, None)) for weight, files in separate_valid]
        )
    train, valid = [], []
    for (weight, files), each_listed in zip(blend, listed, strict=True):
        name = files.tokens.name
        number = len(open_tokens(files.tokens, check=False)) // files.documents_per_row
        train_range, valid_range = split_documents(number, settings.split)
        if settings.eval_interval and len(valid_range):
            try:
                valid.append((weight, name, _open(settings, files, valid_range, each_listed)))
            except KitError as error:
                logger.info("no validation on %s: the validation share of SPLIT is too small (%s)", name, error)
        train.append((weight, name, _open(settings, files, train_range, each_listed)))
    return blend_datasets(train), blend_datasets(valid) if valid else None


def read_validation(settings: TrainSettings) -> tuple[dict[str, DataFiles], Blend]:
    """(the sets of VALID_DATASET_PATH by name, or the blend without names that it is); both empty where it is unset."""
    text = settings.valid_dataset_path
    named = read_named(text) if text else {}
    return named, read_blend(text, "VALID_DATASET_PATH") if text and not named else []


def samples_at_once(settings: TrainSettings) -> int:
    """The samples that all replicas evaluate at once: a micro-batch each, with VPP one for each pipeline stage.

    Megatron-Core's interleaved schedule runs a multiple of PP micro-batches.
    """
    return settings.micro_batch_size * settings.sizes.dp * (settings.pp if settings.vpp > 1 else 1)


def parse_orders(order: str | None, num_datasets: int) -> list[bool | None]:
    """Whether each dataset's order is listed, from `order`: one name for all, or one per dataset (by commas)."""
    names = order.split(", ") if order else [""]
    names = names * num_datasets if len(names) == 1 else names
    if len(names) != num_datasets:
        return [None] * num_datasets
    return [{order_name(True): True, order_name(False): False}.get(name) for name in names]


def check_data(blend: Blend, vocab_size: int, source: Path) -> None:
    """Raises KitError for damaged files and for token ids beyond `vocab_size`."""
    for files in {files.tokens: files for _, files in blend}.values():
        tokens = open_tokens(files.tokens)
        if files.loss_mask:
            check_mask(tokens, open_mask(files.loss_mask))
        check_ids(files, tokens, vocab_size, source)


def check_tokenizer(blend: Blend, model_folder: Path) -> None:
    """Raises KitError if the data was not made with the model folder's tokenizer."""
    path = model_folder / "tokenizer.json"
    own = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    for _, files in blend:
        made_with = (files.manifest or {}).get("tokenizer", {}).get("tokenizer_sha256")
        if own is None or made_with is None:
            missing = f"{path} does not exist" if own is None else f"{files.tokens} has no manifest"
            logger.info("cannot check that the data was made with the model's tokenizer: %s", missing)
        elif made_with != own:
            raise KitError(
                f"{files.tokens} was made with another tokenizer than {path}: the model would read its ids as other"
                " tokens; run step 1 with TOKENIZER_PATH set to that folder, or train the model that the data is for"
            )


def _open(settings: TrainSettings, files: DataFiles, documents: range | None, listed: bool | None) -> SampleDataset:
    return build_dataset(
        files,
        train_mode=settings.train_mode,
        seq_length=settings.seq_length,
        seed=settings.seed,
        documents=documents,
        packing=bool(settings.packing),
        truncate=settings.truncate,
        reset_attention=settings.reset_attention,
        pad_id=0,
        check=False,
        listed=listed,
    )


def content_hash(dataset_path: str) -> str:
    """A hash of the contents of DATASET_PATH, independent of its location: of its manifests, else of sampled bytes.

    A manifest's identity covers the contents of the inputs, the tokenizer and the settings.
    """
    return _blend_hash(read_blend(dataset_path))


def _blend_hash(blend: Blend) -> str:
    digest = hashlib.sha256()
    for weight, files in blend:
        digest.update(str(weight).encode())
        if identity := (files.manifest or {}).get("identity"):
            digest.update(identity.encode())
            continue
        for prefix in filter(None, (files.tokens, files.loss_mask)):
            for path in (idx_path(prefix), bin_path(prefix)):
                digest.update(hash_samples(path, DATA_SAMPLES).encode())
    return digest.hexdigest()[:16]


def validation_hashes(settings: TrainSettings, data_hash: str) -> dict[str, str]:
    """A hash of each validation set's contents by its name, "" for the one without; losses compare where it is equal.

    data_hash: of DATASET_PATH, whose validation share is used without VALID_DATASET_PATH.
    """
    named, blend = read_validation(settings)
    if named:
        return {name: _blend_hash([(Fraction(1), files)]) for name, files in named.items()}
    return {"": _blend_hash(blend) if blend else f"{data_hash} SPLIT={settings.split}"}
