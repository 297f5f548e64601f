"""docs/spectra.md maps every option of the original to ours: the table is complete, and every key in it exists."""

import functools
import json
import re
from pathlib import Path

import pytest

from data_prep.config import PrepConfig
from pretrain.config.load import load_run_config, load_yaml_model
from pretrain.config.presets import list_presets
from tests.config import pages
from tests.config.pages import DOCS

PAGE = (DOCS / "spectra.md").read_text()
OPTIONS = """\
profile size vocab_file max_positions hidden_size num_layers num_heads ffn_inner spectral_dim max_length dropout
norm_position pooling trunk_init spectral_norm spectral_entropy_gate learnable_spectral_fusion fusion_init fusion_max
fractal_depth learnable_fractal fractal_init attention_impl enable_semantic_nce sem_dims ent_dims anchor_dim
retrieval_dim ranking_dim anomaly_basis nested_ranking loss_weight_sem loss_weight_anchor loss_weight_bridge
loss_weight_fast loss_weight_ranking loss_weight_matryoshka spectral_reg_weight spectral_reg ent_nce_weight
triplet_margin bridge_metric bridge_stopgrad temperature_start temperature_end temperature_hold_ratio
gather_negatives nce_hard_negatives mask_false_negatives grad_cache max_train_samples val_samples
negatives_per_query train_shards val_shards sts_dev sts_test num_workers batch_train grad_accum batch_eval epochs lr
weight_decay warmup_ratio max_grad_norm betas adam_eps decay_exclude precision zero_stage gradient_checkpointing
seed log_every eval_every save_every quick_sts_n select_sts_n early_stop_patience early_stop_delta
early_stop_warmup target_sts health_warmup health_sample grad_warn_abs grad_warn_rel collapse_warn rank_warn
nan_max_consecutive nan_max_per_1000 nan_dump_dir nan_rollback save_dir keep_last backup_dir backup_every
backup_retries eval_pool_size eval_bootstrap use_wandb project_name run_name no_spectral no_anchor no_bridge
no_matryoshka"""
TAGS = {"model": {"family": "spectra"}, "data": {"source": {"kind": "pairs"}}, "objective": {"name": "contrastive"},
        "checkpoint": {"mirror": {"path": "there"}}}


rows = functools.partial(pages.rows, PAGE)
exists = functools.partial(pages.exists, tags=TAGS)
FLAGS = """\
--mode --size --epochs --seed --resume --reschedule --checkpoint --gradient-checkpointing --no-spectral --no-anchor
--no-anchor64 --no-bridge --no-matryoshka --no-matry --no-angular --texts --texts-file --head --dim --output --quick
--test --backup-dir --save-dir --profile --config --set --use_wandb"""
COMMANDS = [(cells[0], command) for cells in rows("From the original's commands")
            for command in re.findall(r"`(pretrain [^`]+)`", cells[1])]


def test_a_key_is_told_from_none():
    assert exists("objective.grad_cache")
    assert exists("checkpoint.mirror.every")
    assert not exists("model.spectral_dims")


def test_the_table_has_every_option_once():
    given = [cells[0].strip("`") for cells in rows("Options")]
    assert sorted(given) == sorted(set(OPTIONS.split()))


@pytest.mark.parametrize("cells", rows("Options"), ids=lambda cells: cells[0].strip("`"))
def test_its_key_exists_or_a_note_says_what_stands_for_it(cells):
    if cells[1] == "-":
        assert cells[2]
    else:
        assert exists(cells[1].strip("`"))


def test_sizes_on_the_page_are_those_of_the_presets():
    for preset, _, count, _, target in rows("Sizes"):
        config = load_run_config(preset.strip("`")).config
        assert config.model.parameter_count().total == int(count.replace(",", ""))
        assert config.eval.embedding.target_sts == float(target)


def test_every_preset_and_file_that_the_page_names_exists():
    presets = set(list_presets())
    for name in re.findall(r"(?<!sweeps/)\b(spectra-[a-z0-9-]+)", PAGE):
        assert name in presets, name
    for path in re.findall(r"configs/[a-z/-]+\.yaml", PAGE):
        assert (Path(__file__).parents[2] / path).is_file(), path


def test_every_flag_and_mode_of_the_original_is_on_the_page():
    originals = " ".join(cells[0] for cells in rows("From the original's commands"))
    assert set(re.findall(r"--[a-z0-9_-]+", originals)) == set(FLAGS.split())
    assert set(re.findall(r"--mode ([a-z_]+)", originals)) == {"train", "eval", "extract", "param_estimate"}
    for cells in rows("From the original's commands"):
        assert "`pretrain " in cells[1] or (cells[1] == "-" and cells[2]), cells


@pytest.mark.parametrize(("original", "command"), COMMANDS, ids=lambda text: text[:40])
def test_a_command_of_the_table_is_one_of_ours(original: str, command: str):
    name, words = pages.parsed(command)
    if name == "train" and words[0] != "FILE":
        assert pages.settings_take_effect(words[0], words).model.family == "spectra"
    if name == "embed" and "--head" in words:
        model = load_run_config("spectra-m456").config.model
        heads = [f"semantic_{d}" for d in model.sem_dims] + [f"ranking_{model.ranking_dim}"]
        assert words[words.index("--head") + 1] in heads


def test_every_command_on_the_page_is_one_that_the_command_line_takes():
    found = [command.replace("PRESET", "spectra-m456") for command in pages.commands(PAGE)]
    assert len(found) > 30
    for command in found:
        name, words = pages.parsed(command)
        if name in ("train", "estimate") and words[0].startswith("spectra"):
            assert words[0] in list_presets()
            pages.settings_take_effect(words[0], words)
        if name == "prep" and words[0].startswith("configs/"):
            assert load_yaml_model(PrepConfig, Path(__file__).parents[2] / words[0])[0]


def test_a_command_with_a_flag_that_is_none_of_ours_is_told_from_one_of_ours():
    with pytest.raises(ValueError, match="No such option"):
        pages.parsed("pretrain train spectra-tiny --no-matryoshkas")
    with pytest.raises(ValueError, match="No such option"):
        pages.parsed("pretrain train spectra-tiny --no-launch")  # no abbreviations


def test_figures_of_the_machinery_are_those_of_the_benchmarks():
    root = Path(__file__).parents[2] / "benchmarks" / "results"
    step, scale = (json.loads((root / f"{name}.json").read_text())["results"]
                   for name in ("contrastive", "spectra_scale"))
    peaks = [peak / 2**20 for peak in step["peak bytes of a cached step by batch"].values()]
    losses = ", ".join(f"{loss:.2f}" for loss in scale["train spectra-m456"]["losses"])
    peer = [step[f"step over sentence-transformers, {texts}"]["seconds"]["ratio"]["median"]
            for texts in ("ragged", "one length")]
    spread = step["step over sentence-transformers, one length"]["seconds"]["ratio"]
    wanted = [f"{peer[0]:.2f} (texts of many lengths), {peer[1]:.2f} (of one length; {spread['low']:.2f} to "
              f"{spread['high']:.2f})",
              f"{step['cached step over uncached']['ratio']['median']:.2f}",
              f"{peaks[0]:.0f}, **{peaks[1]:.0f}** (1,024), **{peaks[2]:.0f} MiB** above the built model: activations "
              "do not grow, vectors and ids of all texts do",
              f"{scale['build spectra-m1b']['peak over share']:.2f}",
              f"3 updates, loss {losses}; estimate over peak {scale['train spectra-m456']['ratio']:.2f}"]
    assert [cells[1] for cells in rows("What was measured")][:5] == wanted


def results(name: str) -> dict:
    return json.loads((DOCS / "results" / "code-search" / f"{name}.json").read_text())


def test_figures_of_code_search_are_those_of_their_files():
    table = {cells[0]: cells[1:] for cells in rows("Searching code by what it does")}
    trained, once = results("two-parts"), results("long-42")["metrics"]
    for head in ("semantic_768", "anchor_64", "ranking_1536"):
        found = trained["test"][head]
        assert table[f"trained, `{head}`"] == [
            f"{found['value']:.3f} ({found['ci'][0]:.3f} to {found['ci'][1]:.3f})",
            ", ".join(f"{value:.3f}" for value in found["by_seed"].values())]
    for row, name in (("all-MiniLM-L6-v2, 256 tokens", "all-MiniLM-L6-v2"), ("untrained, `semantic_768`", "untrained"),
                      ("BM25, k1 1.2, b 0.75, identifiers parted", "BM25")):
        found = once[f"retrieval/{name}/ndcg@10"]
        assert table[row][0] == f"{found['value']:.3f} ({found['ci'][0]:.3f} to {found['ci'][1]:.3f})"
    runs = trained["training"].values()
    places = ("100", "500", "1000", "1100", "1500", "2000")

    def mean(part: str, kind: str, at: str, name: str) -> float:
        return sum(run[part][kind][at][name] for run in runs) / len(runs)

    assert table["training loss"] == [*(f"{mean('short', 'losses', at, 'loss'):.2f}" for at in places),
                                      f"{mean('long', 'losses', '200', 'loss'):.2f}"]
    for row, name, digits in (("validation loss", "val/loss", 2), ("NDCG@10", "val/ndcg@10", 3)):
        values = [mean("short", "evaluations", "1000", name), mean("short", "evaluations", "2000", name),
                  mean("long", "evaluations", "250", name)]
        told = [cell.strip("()") for cell in table[row] if cell]
        assert told == [f"{value:.{digits}f}" for value in values]


def test_ablations_on_the_page_are_those_of_the_sweep():
    cells = {(cell["row"], cell["metric"]): cell for cell in results("ablations")["cells"]}
    table = {row[0]: row[1:] for row in rows("What the claims are worth")}
    for name, label in (("no-spectral", "spectral branch"), ("no-anchor", "anchor head"), ("no-bridge", "bridge"),
                        ("no-matryoshka", "alignment of widths"), ("minimal", "all four")):
        for told, metric in zip(table[label], ("val/ndcg@10", "val/recall@10", "sts/semantic_768/spearman"),
                                strict=False):
            cell = cells[name, metric]
            low, high = cell["interval"]
            assert told == f"{100 * cell['difference']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
