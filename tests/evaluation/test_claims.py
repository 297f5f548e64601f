"""The ledger of claims: what it accepts, what it is held to, and that the repository's own keeps to both."""

import json
from pathlib import Path

import pytest
import yaml

from evaluation.claims import PLACES, Ledger, keep, problems, read_ledger, render
from pretrain.errors import ConfigErrors

ROOT = Path(__file__).parents[2]
FIGURE = {"name": "hit rate", "value": 0.5, "ci": [0.4, 0.6], "n": 32, "seeds": [41],
          "file": "docs/results/x.json", "at": ["metrics", "test/hit"]}
CLAIM = {"id": "ten-percent", "system": "S", "claim": "it finds | things", "figure": "0.105", "source": "its page",
         "metric": "hit rate", "status": "measured", "verdict": "not supported", "reason": "It does not.",
         "commands": "pretrain train x\n", "measured": [FIGURE]}
UNTRIED = {key: CLAIM[key] for key in ("system", "claim", "figure", "source", "metric", "reason")} | {
    "id": "other", "status": "not tried", "verdict": "not tried"}


def ledger(*claims: dict) -> Ledger:
    return Ledger.model_validate({"about": "Two cores.", "claims": list(claims)})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs/results").mkdir(parents=True)
    stored = {"metrics": {"test/hit": {"value": 0.50004, "ci": [0.4, 0.6], "n": 32}}, "bare": 0.25}
    (tmp_path / "docs/results/x.json").write_text(json.dumps(stored))
    return tmp_path


def test_the_page_is_what_the_ledger_makes_and_every_figure_is_in_its_file():
    own = read_ledger(ROOT / "docs/claims.yaml")
    assert (ROOT / "docs/claims.md").read_text() == render(own), "run python -m evaluation.claims"
    assert problems(own, ROOT) == []


def test_kept_files_name_no_machine():
    for place in PLACES:
        for path in (ROOT / place).rglob("*.json"):
            text = path.read_text()
            assert '"platform"' not in text and "/tmp/" not in text and "working_directory" not in text, path


def test_figures_are_held_to_their_files(root: Path):
    assert problems(ledger(CLAIM), root) == []
    bare = FIGURE | {"value": 0.25, "ci": None, "n": None, "at": ["bare"]}
    assert problems(ledger(CLAIM | {"controls": [bare]}), root) == []


@pytest.mark.parametrize("change, told", [
    ({"value": 0.51}, "value 0.51 is 0.50004"),
    ({"ci": [0.45, 0.6]}, "ci (0.45, 0.6) is [0.4, 0.6]"),
    ({"n": 33}, "n 33 is 32"),
    ({"at": ["metrics", "test/other"]}, "KeyError"),
    ({"at": ["bare", "value"]}, "TypeError"),
    ({"at": ["metrics"]}, "value 0.5 is None"),
    ({"at": ["bare"], "value": 0.25}, "ci (0.4, 0.6) is None"),
    ({"file": "docs/results/y.json"}, "FileNotFoundError"),
    ({"file": "docs/x.json"}, "lies neither in"),
    ({"file": "docs/results/../../x.json"}, "lies neither in")])
def test_what_a_file_does_not_say_is_told(root: Path, change: dict, told: str):
    for part in ("measured", "controls"):
        found = problems(ledger(CLAIM | {"measured": [FIGURE]} | {part: [FIGURE | change]}), root)
        assert found and found[0].startswith("ten-percent, hit rate: ")
        assert told in found[0]


@pytest.mark.parametrize("claim", [
    CLAIM | {"measured": []}, CLAIM | {"commands": " "}, UNTRIED | {"measured": [FIGURE]}, UNTRIED | {"commands": "x"},
    UNTRIED | {"controls": [FIGURE]}])
def test_measured_means_figures_and_not_tried_means_none(claim: dict):
    with pytest.raises(ValueError, match=claim["id"]):
        ledger(claim)


def test_ids_are_distinct_and_a_file_tells_all_that_is_wrong(tmp_path: Path):
    with pytest.raises(ValueError, match="one id"):
        ledger(CLAIM, CLAIM)
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"about": "x", "claims": [CLAIM | {"status": "guessed"}, UNTRIED | {"metrc": 1}]}))
    with pytest.raises(ConfigErrors) as caught:
        read_ledger(path)
    assert "status" in str(caught.value)
    assert "metrc" in str(caught.value)


def test_a_page_has_a_table_of_all_and_the_details_of_each():
    page = render(ledger(CLAIM, UNTRIED))
    number = "0.5 (0.4 to 0.6), n 32"
    assert f"| [it finds \\| things](#ten-percent) | 0.105 | hit rate {number} | **not supported** |" in page
    assert "| [it finds \\| things](#other) | 0.105 | - | **not tried** |" in page
    assert f"| hit rate | {number} | 41 | [x.json](results/x.json) |" in page
    assert "**Not supported.** It does not." in page
    assert "```\npretrain train x\n```" in page


def test_what_is_kept_names_no_machine(tmp_path: Path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"task": "needle", "host": {"host": "h", "platform": "p", "python": "3.11"}}))
    keep(path, tmp_path / "docs/results/x.json")
    assert json.loads((tmp_path / "docs/results/x.json").read_text()) == {"task": "needle", "host": {"python": "3.11"}}


def test_of_a_run_its_evaluations_are_kept(tmp_path: Path):
    run = tmp_path / "runs/x"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("name: x\n")
    rows = [{"fence": 1, "step": 0, "val/a": 0.5, "val/a/low": 0.4, "val/a/high": 0.6},
            {"fence": 1, "step": 1, "loss": 2.0, "time/step": 0.1}, {"fence": 1, "step": 2, "val/a": 0.75}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep(run / "metrics.jsonl", tmp_path / "y.json")
    assert json.loads((tmp_path / "y.json").read_text()) == {"run": "x", "evaluations": {
        "0": {"val/a": {"value": 0.5, "ci": [0.4, 0.6]}}, "2": {"val/a": {"value": 0.75}}}}
