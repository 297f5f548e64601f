"""docs/afrb.md maps every option of the original to ours: the table is complete, and every key in it exists."""

import functools
import re
import shlex
from pathlib import Path

import pytest

from data_prep.config import PrepConfig
from pretrain.config.load import dump_yaml, load_run_config, load_yaml_model
from pretrain.config.presets import list_presets
from pretrain.config.sweep import SweepConfig
from pretrain.models.afrb.family import CSV_COLUMNS
from tests.config import pages
from tests.config.pages import DOCS

PAGE = (DOCS / "afrb.md").read_text()
OPTIONS = """\
save preset model task n-afrb alpha gamma omega omega-delta phase-delta cascade-lambda cascade-kappa phase-mode
layerscale-init mixer adaptive-omega adaptive-omega-lr adaptive-omega-interval omega-min omega-max block-warm-delta
block-ramp phase-ramp stillness-ema enable-pvm pvm-alpha pvm-beta pvm-gate-init pvm-order pvm-omega-mode
pvm-write-gate t2-enable t2-steps t2-mode t2-k t2-alpha t2-omega t2-phi readout-from readout-mode readout-tau
readout-topk readout-scale readout-window needle-query-mode readout-head kiss-ridge-calib kiss-ridge-max-pairs
kiss-ridge-l2 kiss-ridge-unfreeze-step pvm2emb-ridge-recalib infonce-weight infonce-negatives infonce-tau
lambda-retrieval disable-attn disable-attn-mode needle-query needle-len ctx-chunks ctx-chunk-len needle-marker
needle-train-size needle-eval-examples eval-soft-topk seq steps eval-only bs ga lr warmup-steps grad-clip seed
gradient-checkpointing skip-phase-metrics log-interval eval-interval num-workers prefetch pin-memory resume
resume-mode kiss-ridge-force kiss-ridge-l2-absolute auto-lr-backoff pvm-carry-state phase-curvature-metrics
log-readout-stats enable-rca curriculum-learning curriculum-steps-per-stage phase-alignment-weight
freeze-readout-steps stillness-warm stillness-floor phase-align phase-align-l2 sir-dim hard-pointer-scale
mem-acc-exact enable-plm pcm-enable deepspeed zero-stage controls legacy-parity"""
TAGS = {"model": {"family": "afrb"}, "data": {"source": {"kind": "needle"}}, "objective": {"name": "needle"}}


rows = functools.partial(pages.rows, PAGE)
exists = functools.partial(pages.exists, tags=TAGS)


def test_a_key_is_told_from_none():
    assert exists("model.pvm_alpha")
    assert exists("data.source.ctx_chunks")
    assert exists("optim.lr")
    assert not exists("model.pvm_alfa")
    assert not exists("optim.lr.x")
    assert not exists("data.source.path")


def test_the_table_has_every_option_once():
    given = [re.fullmatch(r"`--([a-z0-9-]+)`", cells[0])[1] for cells in rows("From the original's commands")]
    assert sorted(given) == sorted(set(OPTIONS.split()))


@pytest.mark.parametrize("cells", rows("From the original's commands"), ids=lambda cells: cells[0].strip("`"))
def test_its_key_exists_or_a_note_says_what_stands_for_it(cells):
    if cells[1] == "-":
        assert cells[2]
    else:
        assert exists(cells[1].strip("`"))


def test_every_key_and_preset_that_the_page_names_exists():
    configs = PAGE.split("\n## Python\n")[0].replace("train.log", "")
    for key in re.findall(r"`((?:model|data|objective|optim|engine|eval|train|batch)\.[a-z0-9_.]+)", configs):
        assert exists(key.rstrip(".")), key
    presets = set(list_presets())
    for name in re.findall(r"`(afrb-[a-z0-9-]+)`", PAGE):
        assert name in presets or any(preset.startswith(name) for preset in presets), name
    named = set(re.findall(r"`(afrb-[a-z0-9-]+|-[a-z]+)`", PAGE))
    for preset in presets:
        if preset.startswith("afrb-") and not preset.endswith("-small"):
            assert preset in named or f"-{preset.rsplit('-', 1)[1]}" in named, f"{preset} is not on the page"


COMMANDS = [(cells[0], command) for cells in rows("Whole commands") for command in re.findall(r"`([^`]+)`", cells[1])]
FILES = {"train.log", "config.yaml", "metrics_long.csv", "metrics.csv", "metrics.json"}


def test_what_is_done_with_the_original_is_done_here():
    """Presets, flags in full, both tasks, both kinds of resume, seeds, evaluation, and looking into the files."""
    originals = " ".join(cells[0] for cells in rows("Whole commands"))
    for asked in ("--preset", "--enable-pvm", "--n-afrb 0", "--task language", "--task language --disable-attn",
                  "--ctx-chunks 16", "--zero-stage 3", "--resume x/", "--resume-mode continue", "for seed in 41 42 43",
                  "--eval-only", "--controls all", "grep -- --enable-pvm", "--readout-from pvm", "grep KISS-RIDGE",
                  "Exact hit rate", "grep needle_hit_rate x/metrics.csv", "-f10", "grep DIAG", "grep Step",
                  "metrics.json"):
        assert asked in originals, asked
    flags = {f"--{option}" for option in OPTIONS.split()}
    assert {flag for flag in re.findall(r"--[a-z][a-z0-9-]+", originals)} <= flags


@pytest.mark.parametrize(("original", "command"), COMMANDS, ids=lambda text: text[:40])
def test_its_command_is_one_of_ours(original: str, command: str):
    words = shlex.split(command)
    if words[0] != "pretrain":
        program, file = words[0], words[-1]
        assert program in ("head", "grep", "cut", "jq") and file.startswith("runs/x/")
        assert file.removeprefix("runs/x/") in FILES
        return
    target = words[2].replace("afrb-NAME", "afrb-micro")
    if words[1] == "train":
        assert pages.settings_take_effect(target, words).model.family == "afrb"
        assert [flag for flag in words if flag.startswith("--") and flag not in ("--set", "--nproc")] == []
    elif words[1] == "eval":
        assert target.startswith("runs/x") or target in list_presets()
        assert pages.parsed(command)[0] == "eval"
    else:
        model = {"prep": PrepConfig, "sweep": SweepConfig}[words[1]]
        assert load_yaml_model(model, Path(__file__).parents[2] / target)[0]


def test_what_is_looked_for_in_files_stands_there():
    """Patterns of `grep`, `cut` and `jq` against what is written: each is a name or a literal of ours."""
    config = dump_yaml(load_run_config("afrb-reproduce-10pct"))
    root = Path(__file__).parents[2]
    emitted = "".join(file.read_text() for folder in ("pretrain", "evaluation") for file in
                      sorted((root / folder).rglob("*.py")))
    columns = [name.partition("=")[0] for name in CSV_COLUMNS]
    looked = 0
    for _, command in COMMANDS:
        words = shlex.split(command)
        place = words[-1].rpartition("/")[2]
        if words[0] == "grep":
            looked += 1
            found = {"config.yaml": config, "metrics_long.csv": "\n".join(columns), "train.log": emitted}[place]
            assert words[1] in found, command
        if words[0] == "cut":
            assert columns[int(words[2].removeprefix("-f")) - 1] == "phase_coherence"
        if words[0] == "jq":
            assert words[1].removeprefix(".") in columns
    assert looked >= 7
