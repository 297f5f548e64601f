"""What a person sees while data is prepared."""

import re
import time
from io import StringIO

from rich.console import Console

from data_prep.progress import RichReporter


def test_each_stage_shows_its_rate_and_the_time_to_go():
    said = StringIO()
    with RichReporter(Console(file=said, force_terminal=True, width=140, color_system=None)) as reporter:
        reporter.stage("read", 4_000_000)
        for _ in range(5):  # a rate needs more than one moment
            reporter.advance(200_000)
            time.sleep(0.05)
        reporter._progress.refresh()
        reporter.stage("tokenize", None)
        reporter.advance(500_000)
    text = said.getvalue()
    assert "read" in text and "tokenize" in text
    assert "1.0/4.0 MB" in text
    assert " MB/s" in text
    last = next(line for line in reversed(text.splitlines()) if "1.0/4.0 MB" in line)
    elapsed, to_go = (int(seconds) for seconds in re.findall(r"0:00:(\d\d)", last))
    assert to_go >= max(1, elapsed)  # three times as much is left as was done
