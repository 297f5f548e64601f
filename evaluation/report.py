"""`report.html`: the whole run on one page that opens anywhere, without a network."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from evaluation.report_data import collect
from evaluation.report_page import page
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.publish import write_text_atomic


def write_report(run_folder: Path) -> Path:
    """Write RUN/report.html from what is in the run folder, and return its path.

    Raises UserError where there is no run folder, DataCorruption where one of its files is broken.
    """
    folder = RunFolder.open(run_folder)
    write_text_atomic(folder.report_file, page(collect(folder), datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")))
    return folder.report_file
