"""docs/spectra.md maps every option of the original to ours: the table is complete, and every key in it exists."""

import re
from pathlib import Path

import pytest

from pretrain.config.load import load_run_config
from pretrain.config.presets import list_presets
from pretrain.config.run import RunConfig
from pretrain.config.sections import child_annotation, fields_of, section_class

PAGE = (Path(__file__).parents[2] / "docs" / "spectra.md").read_text()
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


def rows(section: str) -> list[list[str]]:
    """Cells of the first table of a section."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def exists(key: str) -> bool:
    """Whether a run config of Spectra on pairs has this key."""
    annotation, value = RunConfig, TAGS
    for part in key.split("."):
        section = section_class(annotation, value)
        if section is None or part not in fields_of(section):
            return False
        annotation, value = child_annotation(annotation, value, part), value.get(part, {}) if value else {}
    return True


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
    for preset, _, count, _ in rows("Sizes"):
        config = load_run_config(preset.strip("`")).config
        assert config.model.parameter_count().total == int(count.replace(",", ""))


def test_every_preset_and_file_that_the_page_names_exists():
    presets = set(list_presets())
    for name in re.findall(r"\b(spectra-[a-z0-9-]+)", PAGE):
        assert name in presets, name
    for path in re.findall(r"configs/[a-z/-]+\.yaml", PAGE):
        assert (Path(__file__).parents[2] / path).is_file(), path
