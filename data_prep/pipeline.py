"""The way from raw text to a published dataset: read, drop copies, split, train the tokenizer, encode, write."""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data_prep.config import TRAIN, AnySource, JsonlSource, PairSourceBase, PrepConfig, PythonPairsSource, StdlibSource
from data_prep.encode import Ids, available_cores, encode_items
from data_prep.files import canonical_json, publish, temporary_name
from data_prep.manifest import MANIFEST, TOKENIZER, Manifest, SplitRecord, write_manifest
from data_prep.pair_select import KeptPair, as_document, push_pair, select_pairs, split_rule
from data_prep.pair_sources import pair_files, pair_folder
from data_prep.pairs import PairWriter
from data_prep.progress import Reporter, Silent
from data_prep.select import Kept, Splitter, Tally, select
from data_prep.shards import ShardWriter, token_dtype
from data_prep.sources import SetAside, source_files, source_folder
from data_prep.tokenizer import (
    eos_id,
    load_tokenizer,
    pad_id,
    save_tokenizer,
    special_ids,
    train_tokenizer,
    training_sample,
    vocab_size,
)
from pretrain.errors import ConfigError, UserError
from pretrain.runfolder.publish import fsync, hash_file

QUARANTINE = "quarantine.jsonl"
_FOREIGN = {"documents": "block_pairs", "pairs": "block_tokens"}
"""The field that says nothing about a kind of dataset, and is no part of its recipe."""
log = logging.getLogger(__name__)


def prepare(config: PrepConfig, *, overwrite: bool = False, reporter: Reporter | None = None) -> Manifest:
    """Make the dataset that `config` describes, or open it where it is complete.

    Everything is written in a folder beside `config.out` that no reader takes for a dataset, and renamed when done: a
    killed run leaves nothing half-made, and the next one begins afresh.

    Args:
        config: what to prepare.
        overwrite: replace a dataset made by another config. Folders that are no dataset are never touched.
        reporter: told of stages and bytes.

    Raises:
        UserError: sources that do not exist or hold no text, an output folder in use or made by another config.
        DataCorruption: the complete dataset that is there has faults.
    """
    out = Path(config.out).resolve()
    recipe, paths = _recipe(config)
    if not overwrite and is_complete(config):
        return Manifest.load(out)
    _check_replaceable(out)
    with _building(out) as folder:
        try:
            _build(config, folder, recipe, paths, reporter or Silent())
            _publish(folder, out)
        except OSError as error:
            raise UserError(f"{error.filename or folder}: cannot be written ({error.strerror})") from error
        except BrokenProcessPool:
            raise UserError("a tokenizing process was killed, most likely for want of memory; use fewer workers or a "
                            "smaller max_document_bytes") from None
    return Manifest.load(out)


def is_complete(config: PrepConfig) -> bool:
    """Whether `config.out` is a dataset made by this config. Raises UserError where another config made it."""
    out = Path(config.out).resolve()
    if not (out / MANIFEST).exists():
        return False
    made = Manifest.read(out).provenance
    recipe, paths = _recipe(config)
    if made.get("config") == recipe and made.get("paths") == paths:
        return True
    changed = _difference(recipe | {"paths": paths}, made.get("config", {}) | {"paths": made.get("paths", {})})
    raise UserError(f"{out}: a dataset made by another config is here ({changed}); "
                    "give another `out`, or --overwrite to replace it")


def _recipe(config: PrepConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """What determines the bytes of a dataset, and the paths it was read from."""
    recipe = config.model_dump(mode="json", exclude={"out", "workers", _FOREIGN[config.kind]})
    paths = {}
    for stated, source in zip(recipe["sources"], config.sources, strict=True):
        paths[source.name] = str(_folder_of(source))
        stated.pop("path", None)
        if isinstance(source, StdlibSource | PythonPairsSource):
            stated["python"] = platform.python_version()
    recipe["split_order"] = list(config.splits)  # it has a meaning, which JSON objects do not keep
    if config.tokenizer.path is not None:
        tokenizer = Path(config.tokenizer.path).absolute()
        paths["tokenizer"] = str(tokenizer)
        try:
            recipe["tokenizer"] = {"eos_token": config.tokenizer.eos_token, "sha256": hash_file(tokenizer)}
        except OSError as error:
            raise ConfigError("tokenizer.path", f"{tokenizer}: cannot be read ({error.strerror})") from None
    return recipe, paths


def _folder_of(source: AnySource) -> Path:
    return pair_folder(source) if isinstance(source, PairSourceBase) else source_folder(source)


def _difference(wanted: Any, found: Any, key: str = "") -> str:
    """The first key in which two JSON values differ, with both values."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for name in [*wanted, *(n for n in found if n not in wanted)]:
            if wanted.get(name) != found.get(name):
                return _difference(wanted.get(name), found.get(name), f"{key}.{name}".lstrip("."))
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for index, (a, b) in enumerate(zip(wanted, found, strict=True)):
            if a != b:
                return _difference(a, b, f"{key}.{index}")
    return f"{key} was {found!r}, now {wanted!r}"


@contextmanager
def _building(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that this process alone writes to. Raises UserError where another one does."""
    folder = out.with_name(f".{out.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from None
    try:
        if not _locked(descriptor, folder):
            raise UserError(f"{out}: another process is preparing this dataset; wait for it or give another `out`")
        try:
            for left_behind in folder.iterdir():
                left_behind.unlink()
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _locked(descriptor: int, folder: Path) -> bool:
    """Lock an opened folder until it is closed or the process ends, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held the lock until now may have renamed the folder that we opened.
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _check_replaceable(out: Path) -> None:
    empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not empty and not (out / MANIFEST).exists():
        raise UserError(f"{out}: exists and is no dataset (no {MANIFEST}); give another `out` or remove it")


def _publish(folder: Path, out: Path) -> None:
    """Put the finished `folder` in the place of `out`. A reader sees the old dataset, none, or the new one."""
    replaced = out.with_name(f".{out.name}.replaced")
    if replaced.exists():
        shutil.rmtree(replaced)
    if (out / MANIFEST).exists():
        os.rename(out, replaced)
    os.rename(folder, out)
    fsync(out.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _build(config: PrepConfig, folder: Path, recipe: dict[str, Any], paths: dict[str, str],
           reporter: Reporter) -> None:
    """Write the whole dataset into `folder`, the manifest last."""
    total_bytes = _total_bytes(config)
    tokenizer = _tokenizer(config, total_bytes, reporter)
    eos, vocabulary = eos_id(tokenizer, config.tokenizer), vocab_size(tokenizer)
    dtype = token_dtype(vocabulary)
    blocks = _blocks(config, tokenizer, eos)
    tokenizer_sha256 = save_tokenizer(tokenizer, folder, config.tokenizer)
    tally = Tally()
    reporter.stage("tokenize", total_bytes)
    splits = _write_splits(config, folder, eos, dtype, tally, reporter)
    _require_train(splits[TRAIN].docs, tally)
    write_manifest(folder, Manifest.model_validate({
        "tokenizer_sha256": tokenizer_sha256, "dtype": dtype.str, "eos_id": eos, "vocab_size": vocabulary,
        "splits": splits, **blocks,
        "provenance": {"config": recipe, "paths": paths, "counts": tally.counts,
                       "split_rule": split_rule(config) if config.kind == "pairs"
                       else Splitter(config.splits, config.seed).rule}}))


def _blocks(config: PrepConfig, tokenizer: Tokenizer, eos: int) -> dict[str, Any]:
    """Fields of the manifest about the blocks of its kind."""
    if config.kind == "documents":
        return {"kind": "documents", "block_tokens": config.block_tokens}
    prefix, suffix = special_ids(tokenizer, eos)
    return {"kind": "pairs", "block_tokens": 0, "pairs": {
        "block_pairs": config.block_pairs, "prefix_ids": prefix, "suffix_ids": suffix,
        "pad_id": pad_id(tokenizer, config.tokenizer)}}


def _tokenizer(config: PrepConfig, total_bytes: int | None, reporter: Reporter) -> Tokenizer:
    """The tokenizer that was given, or one trained on the train split."""
    if config.tokenizer.path is not None:
        return load_tokenizer(Path(config.tokenizer.path))
    reporter.stage("read", total_bytes)
    tally = Tally()
    sample = training_sample(_train_documents(config, tally, reporter), config.seed, config.tokenizer.sample_bytes)
    _require_train(len(sample), tally)
    size = sum(map(len, sample))
    reporter.stage("train tokenizer", size)
    trained = train_tokenizer(sample, config.tokenizer)
    reporter.advance(size)
    return trained


def _train_documents(config: PrepConfig, tally: Tally, reporter: Reporter) -> Iterator[Kept]:
    for found in _selected(config, tally):
        item = as_document(found) if isinstance(found, KeptPair) else found
        if isinstance(item, Kept):
            reporter.advance(len(item.document.text))
            if item.split == TRAIN:
                yield item


def _selected(config: PrepConfig, tally: Tally) -> Iterator[Kept | KeptPair | SetAside]:
    return select_pairs(config, tally) if config.kind == "pairs" else select(config, tally)


def _require_train(documents: int, tally: Tally) -> None:
    if documents == 0:
        found = ", ".join(f"{source}: {reason} {count['documents']}" for source, reasons in tally.counts.items()
                          for reason, count in reasons.items())
        raise UserError(f"the sources hold no document for split {TRAIN} (found {found or 'nothing'})")


def _total_bytes(config: PrepConfig) -> int | None:
    """Bytes of text the sources hold at most; None where that shows only in reading.

    Raises ConfigError for a source without files, or one that would read the dataset about to be replaced.
    """
    out = Path(config.out).resolve()
    total: int | None = 0
    for number, source in enumerate(config.sources):
        files = [path for _, path in _files(source, f"sources.{number}")]
        inside = next((path for path in files if path.resolve().is_relative_to(out)), None)
        if inside is not None:
            raise ConfigError(f"sources.{number}", f"{inside} lies inside the dataset folder {out}")
        if source.max_documents is not None or isinstance(source, JsonlSource | PairSourceBase):
            total = None
        elif total is not None:
            size = sum(path.stat().st_size for path in files)
            total += min(size, source.max_bytes or size)
    return total


def _files(source: AnySource, key: str) -> list[tuple[str, Path]]:
    return pair_files(source, key) if isinstance(source, PairSourceBase) else source_files(source, key)


def _write_splits(config: PrepConfig, folder: Path, eos: int, dtype: Any, tally: Tally,
                  reporter: Reporter) -> dict[str, SplitRecord]:
    """Encode everything and write each document to the shards of its split."""
    quarantine = temporary_name(folder / QUARANTINE).open("wb")
    with quarantine, ExitStack() as stack:
        writers = {name: _writer(config, folder, name, dtype) for name in (TRAIN, *config.splits)}
        for writer in writers.values():
            stack.enter_context(writer)

        def kept() -> Iterator[Kept | KeptPair]:
            for item in _selected(config, tally):
                if isinstance(item, SetAside):
                    log.debug("set aside %s: %s, %s", item.provenance, item.reason, item.detail)
                    line = item.provenance | {"reason": item.reason, "detail": item.detail}
                    quarantine.write(canonical_json(line) + b"\n")
                else:
                    yield item

        workers = config.workers or available_cores()
        ends = eos if config.kind == "documents" else None
        encoded = stack.enter_context(closing(encode_items(kept(), folder / TOKENIZER, ends, workers)))
        for done, ids in encoded:
            _store(config, writers[done.split], done, ids, tally)
            reporter.advance(sum(map(len, done.texts)))
        publish(quarantine, folder / QUARANTINE)
    return {name: writer.record for name, writer in writers.items() if writer.record is not None}


def _writer(config: PrepConfig, folder: Path, split: str, dtype: Any) -> ShardWriter | PairWriter:
    if config.kind == "pairs":
        return PairWriter(folder, split, dtype=dtype, block_pairs=config.block_pairs,
                          blocks_per_shard=config.blocks_per_shard)
    return ShardWriter(folder, split, dtype=dtype, block_tokens=config.block_tokens,
                       blocks_per_shard=config.blocks_per_shard)


def _store(config: PrepConfig, writer: ShardWriter | PairWriter, item: Kept | KeptPair, ids: list[Ids],
           tally: Tally) -> None:
    if isinstance(item, KeptPair) and isinstance(writer, PairWriter):
        push_pair(writer, item, ids, config.sources[item.pair.source].name, tally)
    elif isinstance(item, Kept) and isinstance(writer, ShardWriter):
        document = item.document
        writer.push(ids[0], utf8_bytes=len(document.text), source=document.source, doc_hash=item.doc_hash,
                    provenance=document.provenance)
