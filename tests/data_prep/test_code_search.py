"""The pinned packages of the code search: every one in one split only, read by the preparation that names them."""

import re
from pathlib import Path

from data_prep.config import PrepConfig
from pretrain.config.load import load_yaml_model

PREP = Path(__file__).parents[2] / "configs" / "prep"


def names(split: str) -> list[str]:
    """Names of the packages of a split, as installers compare them; every line pins a version."""
    lines = [line for line in (PREP / f"code-search-{split}.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), split
    return [re.sub("[-_.]+", "-", line.split("==")[0]).lower() for line in lines]


def test_no_package_is_in_two_splits():
    every = [name for split in ("test", "val", "train") for name in names(split)]
    assert len(every) == len(set(every)) > 150


def test_the_preparation_reads_held_out_packages_first():
    config = load_yaml_model(PrepConfig, PREP / "code-search.yaml")[0]
    assert [(source.path, source.split) for source in config.sources] == [
        ("data/packages/test", "test"), ("data/packages/val", "val"), ("data/packages/train", None)]
    assert config.splits == {"val": 0.0, "test": 0.0}  # nothing of train is drawn into another split
