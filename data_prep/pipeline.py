"""The way from raw text to a published dataset: read, clean, decide what is kept, train the tokenizer, encode, write.

Each stage leaves complete files in a work folder (see build.py), so that a killed run goes on where it was, and
several processes on several machines can share the work (`prepare_share`).
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.build import Build
from data_prep.config import PrepConfig
from data_prep.manifest import MANIFEST, Manifest
from data_prep.plan import Listing, folder_of, list_files
from data_prep.progress import Reporter, Silent
from data_prep.source_config import PythonPairsSource, PythonSource, StdlibSource
from data_prep.tokenizer import given_tokenizer
from data_prep.words import unicode_version
from data_prep.workfolder import WorkKept, is_finished, open_work, publish_dataset
from pretrain.errors import UserError

_FOREIGN = {"documents": "block_pairs", "pairs": "block_tokens"}
"""The field that says nothing about a kind of dataset, and is no part of its recipe."""
_SILENT = ("out", "workers", "memory", "max_bad_fraction")
"""Fields that do not show in the bytes."""


def prepare(config: PrepConfig, *, overwrite: bool = False, reporter: Reporter | None = None) -> Manifest:
    """Make the dataset that `config` describes, or open it where it is complete.

    Everything is written in a folder beside `config.out` that no reader takes for a dataset, and renamed when done. A
    killed run leaves its finished work there, and the next one goes on with it.

    Args:
        config: what to prepare.
        overwrite: replace a dataset made by another config. Folders that are no dataset are never touched.
        reporter: told of stages and bytes.

    Raises:
        UserError: sources that do not exist or hold no text, an output folder in use or made by another config.
        DataCorruption: too much of a source cannot be read; the complete dataset that is there has faults.
    """
    out = Path(config.out).resolve()
    recipe, paths = _recipe(config)
    if not overwrite and is_complete(config):
        return Manifest.load(out)
    with _work(config, recipe, paths, shared=False) as (folder, listing):
        if not is_finished(folder):
            Build(config, folder, listing, reporter or Silent()).finish(recipe, paths)
        publish_dataset(folder, out)
    return Manifest.load(out)


@dataclass(frozen=True, slots=True)
class Share:
    """How far a share of the work has come."""

    pieces: int
    """Pieces of the sources it has read: all of its own."""
    missing: int
    """Pieces that other shares have not read yet; nothing can be encoded before."""
    units: int
    """Units it has encoded: all of its own, or 0 while pieces are missing."""


def prepare_share(config: PrepConfig, rank: int, of: int, *, reporter: Reporter | None = None) -> Share:
    """Do all of share `rank` of `of` that can be done now, beside other shares, wherever the folder is seen.

    Call it for every rank; once more for those that ended with pieces missing, as what is kept depends on everything
    that is read; then `prepare`, which writes the dataset: the same one, byte for byte.

    Raises what `prepare` raises.
    """
    out = Path(config.out).resolve()
    if (out / MANIFEST).exists():
        raise UserError(f"{out}: a dataset is here already; give another `out`, or remove it")
    recipe, paths = _recipe(config)
    with _work(config, recipe, paths, shared=True) as (folder, listing):
        if is_finished(folder):
            return Share(0, 0, 0)
        build = Build(config, folder, listing, reporter or Silent())
        own = [piece for piece in build.pieces if piece.number % of == rank]
        build.read(own)
        missing = build.unread()
        if missing:
            return Share(len(own), missing, 0)
        units = list(build.encode(lambda number: number % of == rank))
        return Share(len(own), 0, len(units))


@contextmanager
def _work(config: PrepConfig, recipe: dict[str, Any], paths: dict[str, str], *,
          shared: bool) -> Iterator[tuple[Path, Listing]]:
    """The partial folder and the files of the sources."""
    out = Path(config.out).resolve()
    _check_replaceable(out)
    listing = list_files(config)
    try:
        with open_work(out, recipe, {"paths": paths, "listing": listing.digest}, shared=shared) as folder:
            yield folder, listing
    except OSError as error:
        raise WorkKept(f"{error.filename or out}: cannot be written ({error.strerror}); finished work is kept, run "
                       "again to go on") from error


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
    recipe = config.model_dump(mode="json", exclude={*_SILENT, _FOREIGN[config.kind]})
    paths = {}
    against = [] if config.decontaminate is None else config.decontaminate.against
    sources = [*zip(recipe["sources"], config.sources, strict=True)]
    if config.decontaminate is not None:
        sources += zip(recipe["decontaminate"]["against"], against, strict=True)
    for stated, source in sources:
        path = folder_of(source)
        if path is not None:
            paths[source.name if source in config.sources else f"evaluation:{source.name}"] = str(path)
            stated.pop("path", None)
        if isinstance(source, StdlibSource | PythonSource | PythonPairsSource):
            stated["python"] = platform.python_version()
    recipe["split_order"] = list(config.splits)  # it has a meaning, which JSON objects do not keep
    if config.dedup.near is not None or config.decontaminate is not None or config.clean.normalize is not None:
        recipe["unicode"] = unicode_version()
    if config.tokenizer.path is not None:
        paths["tokenizer"] = str(Path(config.tokenizer.path).absolute())
        recipe["tokenizer"] = {"eos_token": config.tokenizer.eos_token, "pad_token": config.tokenizer.pad_token,
                               "sha256": hashlib.sha256(given_tokenizer(config.tokenizer).content).hexdigest()}
    return recipe, paths


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


def _check_replaceable(out: Path) -> None:
    empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not empty and not (out / MANIFEST).exists():
        raise UserError(f"{out}: exists and is no dataset (no {MANIFEST}); give another `out` or remove it")
