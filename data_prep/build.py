"""The stages of preparation, each of which leaves complete files and does not do again what is there.

    work/plan.jsonl         the sources cut into pieces
    work/evaluation/        index of the evaluation sets
    work/read/              units of cleaned text with their hashes, a mark a piece
    work/decide/            verdicts about every item, decisions.json
    work/tokens/            units of tokens
    tokenizer.json ...      and shards: part of the dataset already
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import TRAIN, PrepConfig
from data_prep.corpus import KEPT, Corpus
from data_prep.crew import Stage, available_cores, run_stage
from data_prep.decide import CONTAMINATION, decide, open_corpus
from data_prep.encode_stage import Encoder
from data_prep.evaluation_sets import ITEMS, build_index
from data_prep.files import canonical_json, publish, temporary_name
from data_prep.item import split_rule
from data_prep.manifest import TOKENIZER, Manifest, write_manifest
from data_prep.ngrams import NgramIndex
from data_prep.pack import Packer
from data_prep.plan import Listing, Piece, load_plan, make_plan, save_plan
from data_prep.progress import Reporter
from data_prep.read_stage import CHUNK_BYTES, Reader, is_read, units_of
from data_prep.shards import token_dtype
from data_prep.summary import write_summary
from data_prep.tally import Tally
from data_prep.texts import unit_texts
from data_prep.tokenizer import (
    TOKEN_BYTES,
    Given,
    eos_id,
    given_tokenizer,
    load_tokenizer,
    pad_id,
    save_tokenizer,
    special_ids,
    tokenizer_of,
    vocab_size,
)
from data_prep.tokenizer_training import train_tokenizer
from data_prep.unit import Unit
from data_prep.workfolder import WORK
from pretrain.runfolder.publish import fsync

QUARANTINE = "quarantine.jsonl"
WORKER_BYTES = 250_000_000
"""Memory of a worker process: interpreter and libraries, a unit of text and what the tokenizer makes of it."""
_TRAINING_ITEMS = 256


class Build:
    """One dataset in the making."""

    def __init__(self, config: PrepConfig, folder: Path, listing: Listing, reporter: Reporter) -> None:
        """Cut the sources into pieces and index the evaluation sets, unless that is done.

        Raises ConfigError for evaluation sets that are not there.
        """
        self.config, self.folder, self.listing, self.reporter = config, folder, listing, reporter
        work = folder / WORK
        self._evaluation, self._read, self._decide, self._tokens = (
            work / name for name in ("evaluation", "read", "decide", "tokens"))
        for made in (self._read, self._decide, self._tokens):
            made.mkdir(exist_ok=True)
        with self._alone():
            plan = work / "plan.jsonl"
            if not plan.exists():
                reporter.stage("plan", None)
                save_plan(plan, make_plan(config, listing))
            if config.decontaminate is not None and not (self._evaluation / ITEMS).exists():
                reporter.stage("index evaluation sets", None)
                build_index(config.decontaminate, self._evaluation, config.max_document_bytes)
        self.pieces = load_plan(plan)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other shares out for a while: what one does, the next one finds done."""
        with (self.folder / WORK / "alone").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @property
    def _workers(self) -> int:
        wanted = self.config.workers or available_cores()
        return max(1, min(wanted, self.config.memory_bytes // WORKER_BYTES))

    def read(self, pieces: list[Piece]) -> None:
        """Read and clean pieces."""
        sizes = [piece.size for piece in pieces]
        self.reporter.stage("read", sum(sizes) if all(sizes) else None)
        index = None if self.config.decontaminate is None else self._evaluation
        make = functools.partial(_make_reader, self.config, self._read, index, CHUNK_BYTES)
        for _ in run_stage(make, pieces, min(self._workers, max(1, len(pieces))), self.reporter.advance):
            pass

    def unread(self) -> int:
        """Pieces that are not read yet."""
        return sum(not is_read(self._read, piece.number) for piece in self.pieces)

    def encode(self, chosen: Callable[[int], bool]) -> Iterator[int]:
        """Encode the units whose number is chosen; their numbers, in order, as they are done. Everything is read."""
        decisions, units = self.settle()
        numbers = [number for number in range(len(units)) if chosen(number)]
        kept = sum(entry.get("kept", {}).get("bytes", 0) for entry in decisions["tally"]["counts"].values())
        self.reporter.stage("tokenize", kept if len(numbers) == len(units) else None)
        ends, exact = self._ends(), self.config.tokenizer.path is None and (self.folder / TOKEN_BYTES).exists()
        make = functools.partial(_make_encoder, self.config, units, self._decide, self._tokens,
                                 self.folder / TOKENIZER, ends, exact)
        workers = min(self._workers, max(1, len(numbers)))
        for number, _ in zip(numbers, run_stage(make, numbers, workers, self.reporter.advance), strict=True):
            yield number

    def _ends(self) -> int | None:
        """Id that ends each text; None for pairs, which get what the tokenizer puts around a text."""
        tokenizer = load_tokenizer(self.folder / TOKENIZER)
        return eos_id(tokenizer, self.config.tokenizer) if self.config.kind == "documents" else None

    def settle(self) -> tuple[dict[str, Any], list[Path]]:
        """Decide what is kept and make the tokenizer. Returns the decisions and all units. Everything is read."""
        with self._alone():
            decisions, units = self._decided()
            self._make_tokenizer(decisions, units)
        return decisions, units

    def _decided(self) -> tuple[dict[str, Any], list[Path]]:
        units = units_of(self._read, len(self.pieces))
        index = None if self.config.decontaminate is None else self._evaluation
        found = decide(self.config, units, self._decide, index, self.folder / CONTAMINATION,
                       lambda name: self.reporter.stage(name, None))
        return found, units

    def _make_tokenizer(self, decisions: dict[str, Any], units: list[Path]) -> None:
        """The tokenizer that was given, or one trained on the train split, in the dataset's folder."""
        config = self.config.tokenizer
        if (self.folder / TOKENIZER).exists():
            return
        if config.path is None:
            self.reporter.stage("train tokenizer", None)
            corpus = open_corpus(self.config, units, self._decide)
            trained = train_tokenizer(lambda: self._sample(corpus, decisions["sample_limit"]), config)
            found = Given(trained.to_str(pretty=True).encode(), None)
        else:
            found = given_tokenizer(config)
            eos_id(tokenizer_of(found.content, config.path), config)
        save_tokenizer(found.content, found.beside, self.folder, config)

    def _sample(self, corpus: Corpus, limit: int) -> Iterator[str]:
        """Texts of the train split whose rank is below `limit`."""
        train = self.config.split_names.index(TRAIN)
        for number, (_, unit, verdict) in enumerate(corpus):
            chosen = (verdict == KEPT) & (unit["split"] == train)
            if limit < 1 << 64:
                chosen &= unit["rank"] < np.uint64(limit)
            for _, items in unit_texts(corpus.units[number], np.flatnonzero(chosen), _TRAINING_ITEMS):
                yield from (b"\n".join(texts).decode() for texts in items)

    def finish(self, recipe: dict[str, Any], paths: dict[str, str]) -> None:
        """Do everything that is not done yet and write the whole dataset, the manifest last."""
        self.read(self.pieces)
        decisions, units = self.settle()
        tokenizer = load_tokenizer(self.folder / TOKENIZER)
        eos, vocabulary = eos_id(tokenizer, self.config.tokenizer), vocab_size(tokenizer)
        content = (self.folder / TOKENIZER).read_bytes()
        blocks: dict[str, Any] = {"kind": "documents", "block_tokens": self.config.block_tokens}
        if self.config.kind == "pairs":
            prefix, suffix = special_ids(tokenizer, eos)
            blocks = {"kind": "pairs", "block_tokens": 0, "pairs": {
                "block_pairs": self.config.block_pairs, "prefix_ids": prefix, "suffix_ids": suffix,
                "pad_id": pad_id(tokenizer, self.config.tokenizer, content)}}
        dtype = token_dtype(vocabulary)
        check = {"texts": 0, "exact": 0, "unknown_tokens": 0}
        with Packer(self.config, self.folder, dtype) as packer:
            for number in self.encode(lambda _: True):
                unit = Unit(self._tokens / units[number].name)
                packer.add(unit)
                check = {name: count + unit.meta["check"][name] for name, count in check.items()}
        tally = Tally()
        tally.merge(decisions["tally"])
        for source, (pairs, size) in packer.no_tokens.items():
            tally.move(self.config.sources[source].name, "kept", "no_tokens", size, pairs)
        self._write_quarantine(units)
        manifest = Manifest.model_validate({
            "tokenizer_sha256": hashlib.sha256(content).hexdigest(), "dtype": dtype.str, "eos_id": eos,
            "vocab_size": vocabulary, "splits": packer.records, **blocks,
            "provenance": {"config": recipe, "paths": paths, "counts": tally.counts, "examples": tally.examples,
                           "changes": decisions["changes"], "copies": decisions["copies"],
                           "decontamination": decisions["decontamination"], "roundtrip": check,
                           "split_rule": split_rule(self.config)}})
        write_summary(self.folder, manifest)
        write_manifest(self.folder, manifest)

    def _write_quarantine(self, units: list[Path]) -> None:
        with temporary_name(self.folder / QUARANTINE).open("wb") as file:
            for path in units:
                for line in Unit(path).meta["set_aside"]:
                    file.write(canonical_json(line) + b"\n")
            publish(file, self.folder / QUARANTINE)
        fsync(self.folder)


def _make_reader(config: PrepConfig, folder: Path, index: Path | None,
                 chunk_bytes: int) -> Stage[None]:
    return Reader(config, folder, None if index is None else NgramIndex.load(index), chunk_bytes).read


def _make_encoder(config: PrepConfig, units: list[Path], decided: Path, folder: Path, tokenizer: Path, eos: int | None,
                  exact: bool) -> Stage[None]:
    loaded = load_tokenizer(tokenizer)
    return Encoder(open_corpus(config, units, decided), folder, loaded, eos, token_dtype(vocab_size(loaded)), exact,
                   int(config.tokenizer.roundtrip_share * (1 << 64))).encode
