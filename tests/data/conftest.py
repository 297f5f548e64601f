"""Fixtures of the data tests."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from small_datasets import counting_documents, write_dataset

from data_prep.manifest import Manifest


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., Manifest]:
    """`dataset(lengths, ...)` writes documents of these lengths as split `train` and returns the manifest."""
    made = 0

    def make(lengths: Sequence[int], *, val: Sequence[int] = (), **options: int) -> Manifest:
        nonlocal made
        made += 1
        splits = {"train": counting_documents(lengths)}
        if val:
            splits["val"] = counting_documents(val)
        return write_dataset(tmp_path / f"dataset-{made}", splits, **options)
    return make
