"""The report shows what the run folder says, asks nothing of the network, and escapes every text."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from evaluation.comparison import beats, comparison
from evaluation.demo_table import demo_outcome
from evaluation.report import write_report
from evaluation.report_data import collect
from evaluation.report_page import time_shares
from evaluation.results import MetricRecord, NGramRecord, Results, TextSample, leading
from pretrain.errors import UserError

EVIL = "<script>alert('x')</script><img src=x onerror=y>"


def figure(value, n=1000, ci=None):
    return MetricRecord(value=value, n=n, higher_is_better=False, ci=ci)


def results(loss=4.2, bigram=4.6, **changes):
    grams = [NGramRecord(order=o, scope=s, train_tokens=2048, loss=v, perplexity=math.exp(v), n=1000)
             for o, v in ((1, 6.5), (2, bigram), (3, 4.4)) for s in ("full split", "equal tokens")]
    values = dict(task="perplexity", task_version=1, baselines=grams, target="runs/x", step=20, dtype="fp32",
                  model={"parameters": 1234567}, metrics={"val/loss": figure(loss, ci=(loss - 0.1, loss + 0.1)),
                                                          "val/perplexity": figure(math.exp(loss))},
                  batch_size=8, seed=0, command="c", created="2026-01-01T00:00:00+00:00", train_tokens=2048,
                  samples=[TextSample(prompt="def f(", text=EVIL)])
    return Results(**{**values, **changes})


@pytest.fixture
def filled(run):
    folder, _ = run
    with folder.metrics_jsonl.open("w") as file:
        for step in range(1, 21):
            row = {"fence": 1, "step": step, "k": step, "tokens": step * 512, "loss": 9 - step / 5, "lr": 1e-3 * step,
                   "grad_norm": 1.0 + step % 3, "tokens_per_second": 5000.0 + step, "time/data": 0.1,
                   "time/forward": 0.3, "time/backward": 0.5, "time/step": 0.1}
            file.write(json.dumps(row) + "\n")
            if step % 10 == 0:
                val = {"val/loss": 9 - step / 5, "val/loss/low": 8 - step / 5, "val/loss/high": 10 - step / 5}
                file.write(json.dumps({"fence": 1, "step": step, **val}) + "\n")
    folder.config_file.write_text(folder.config_file.read_text() + f"# {EVIL} http://x.y/z\n")
    folder.environment_file.write_text(json.dumps({"python": "3.11", "host": EVIL, "packages": {"torch": "2.13"},
                                                   "link": "https://example.org/a.png"}))
    return folder


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of style and script."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.inside = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        if tag in self.inside:
            del self.inside[len(self.inside) - 1 - self.inside[::-1].index(tag):]

    def handle_data(self, data):
        if not {"style", "script"} & set(self.inside):
            self.text += data


def test_nothing_is_fetched_and_every_text_is_escaped(filled):
    results().write(filled.eval_dir / "a")
    html = write_report(filled.root).read_text()
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 1, "only our own script"
    assert not {"link", "img", "iframe", "object", "embed", "image", "use", "a"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {"src", "href", "xlink:href", "srcset", "onerror", "onload"} & attributes.keys(), tag
    style = re.search(r"<style>(.*?)</style>", html, re.S)[1]
    script = re.search(r"<script>(.*?)</script>", html, re.S)[1]
    assert not re.search(r"url\(|@import|https?:|//[a-z]+\.", style)
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|import\(|WebSocket|sendBeacon", script)
    assert "default-src 'none'" in html
    assert page.text.count(EVIL) == 3, "config, host and sample show the text itself"


def test_the_page_shows_what_was_recorded(filled):
    results().write(filled.eval_dir / "a")
    page = Page(write_report(filled.root).read_text())
    for part in ("4.200", "95%: 4.100 – 4.300", "bigram, equal tokens", "4.600", "1.235M", "10.24k", "Learning rate",
                 "Throughput", "Gradient norm", "backward 50.0%", "skipped updates", "1 not finite, batches 1",
                 "step-3.f1", "seq_len: 64"):
        assert part in page.text, part
    unigram = [a for t, a in page.tags if t == "svg" and "data-chart" in a]
    loss = json.loads(unigram[0]["data-chart"])
    by = {s["label"]: s for s in loss["series"]}
    assert by["validation"]["x"] == [10, 20] and by["validation"]["y"] == [7.0, 5.0]
    assert len(by["train, smoothed"]["x"]) == 20


def test_without_an_evaluation_the_last_validation_stands_in(filled):
    data = collect(filled)
    assert data.headline("val/loss") == (5.0, (4.0, 6.0)) and data.headline("val/perplexity") is None
    assert "5.000" in Page(write_report(filled.root).read_text()).text


def test_an_empty_run_has_a_report(run):
    page = Page(write_report(run[0].root).read_text())
    assert "no metrics yet" in page.text and "tiny" in page.text


def test_time_shares_sum_to_one(filled):
    shares = time_shares(collect(filled))
    assert sum(shares.values()) == pytest.approx(1) and next(iter(shares)) == "backward"
    assert shares["forward"] == pytest.approx(0.3)


def test_rows_of_a_superseded_process_do_not_show(filled):
    from pretrain.runfolder.holder import FRESH, Holder, ProcessId
    for fence, origin in ((1, FRESH), (2, {"step": 3, "fence": 1, "manifest_sha": "x"})):
        place = filled.lease_dir / str(fence)
        place.mkdir()
        Holder(fence, ProcessId.current(), None, 1e9 * fence, origin).write(place)
    data = collect(filled)
    assert data.column("loss")[0] == [1, 2, 3]
    assert [(s.fence, s.resumed_step) for s in data.starts] == [(1, None), (2, 3)]
    assert "went on from step 3" in Page(write_report(filled.root).read_text()).text


def test_the_leading_evaluation_is_of_the_newest_weights_with_baselines():
    old, bare = results(step=10), results(baselines=[], created="2027-01-01T00:00:00+00:00")
    full = results()
    test_split = results(step=99, metrics={"test/loss": figure(1.0)})
    assert leading([old, bare, full, test_split]) is full and leading([test_split]) is None


def test_comparison_puts_the_model_first_and_names_scopes():
    rows = comparison(results())
    assert [r.label for r in rows] == ["model", *(f"{n}, {s}" for s in ("equal tokens", "full split")
                                                  for n in ("unigram", "bigram", "trigram"))]
    assert rows[0].ours and rows[0].train_tokens == 2048
    assert comparison(results(metrics={})) == []


@pytest.mark.parametrize(("loss", "bigram", "verdict"), [(4.2, 4.6, True), (4.7, 4.6, False)])
def test_the_demo_fails_only_where_it_loses_to_the_bigram_at_equal_tokens(filled, loss, bigram, verdict):
    grams = results(loss, bigram)
    assert beats(grams) is verdict and beats(results(baselines=[])) is None
    filled.config_file.write_text(filled.config_file.read_text().rsplit("#", 1)[0])
    grams.write(filled.eval_dir / "a")
    outcome = demo_outcome(filled.root, filled.export_dir / "e")
    assert outcome.passed is verdict and f"{loss:.3f}" in outcome.message and f"{bigram:.3f}" in outcome.message
    from rich.console import Console
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(outcome.table)
    text = console.export_text()
    for part in ("tokens prepared", "parameters", "1,234,567", "tokens a second", "unigram, equal tokens",
                 "trigram, full split", str(filled.report_file), "step-3.f1", str(filled.export_dir / "e")):
        assert part in text, part


def test_a_demo_that_was_not_compared_says_so(filled):
    with pytest.raises(UserError, match="--baselines"):
        demo_outcome(filled.root, filled.export_dir)
