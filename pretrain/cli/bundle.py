"""What a bug report needs of a run, in one file: no data, no weights, no secrets."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

from pretrain.errors import UserError
from pretrain.runfolder.layout import RunFolder, is_run_folder

_LOG_LINES = 500
_METRICS_LINES = 1000
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}|(?<=://)[^/\s:@]+:[^/\s:@]+(?=@)"
    r"|(?i:(?<=token=)|(?<=secret=)|(?<=password=)|(?<=api_key=))[^\s&\"']+")
_MASK = "[removed]"


def write_bundle(run: Path, output: Path, doctor: str) -> list[str]:
    """Write `output` (.tar.gz) and return the names in it.

    Raises UserError where `run` is no run folder or `output` cannot be written.
    """
    if not is_run_folder(run):
        raise UserError(f"{run}: no run folder (a run has a config.yaml); name the folder under runs/")
    names = []
    try:
        with tarfile.open(output, "w:gz") as tar:
            for name, text in _contents(RunFolder.open(run), doctor):
                data = redact(text, os.environ).encode()
                member = tarfile.TarInfo(f"{run.resolve().name}/{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                names.append(name)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None
    return names


def redact(text: str, environ: Mapping[str, str]) -> str:
    """`text` without the values of variables named like secrets and without what looks like a token or password."""
    for name, value in environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 6:
            text = text.replace(value, _MASK)
    return _SECRET_TEXT.sub(_MASK, text)


def _contents(folder: RunFolder, doctor: str) -> Iterator[tuple[str, str]]:
    yield "doctor.txt", doctor + "\n"
    for path in (folder.config_file, folder.environment_file, folder.status_file):
        if path.is_file():
            yield path.name, path.read_text(encoding="utf-8", errors="replace")
    for path, lines in ((folder.log_file, _LOG_LINES), (folder.metrics_jsonl, _METRICS_LINES)):
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as handle:
                yield path.name, "".join(deque(handle, maxlen=lines))
    yield "files.json", json.dumps(_listing(folder.root), indent=1) + "\n"


def _listing(root: Path) -> dict[str, int]:
    """Every file of the run and its bytes: what was saved and what is missing, without its content."""
    return {path.relative_to(root).as_posix(): path.lstat().st_size for path in sorted(root.rglob("*"))
            if path.is_file() and not path.is_symlink()}
