"""What a person sees while data is prepared."""

from io import StringIO

from rich.console import Console

from data_prep.progress import RichReporter


def test_each_stage_shows_its_rate_and_the_time_to_go():
    said = StringIO()
    with RichReporter(Console(file=said, force_terminal=True, width=140, color_system=None)) as reporter:
        reporter.stage("read", 4_000_000)
        reporter.advance(1_000_000)
        reporter._progress.refresh()
        reporter.stage("tokenize", None)
        reporter.advance(500_000)
    text = said.getvalue()
    assert "read" in text and "tokenize" in text
    assert "1.0/4.0 MB" in text
    assert " MB/s" in text
    assert "-:--:--" in text or "0:00:0" in text  # elapsed, and to go
