"""The baselines see exactly the model's tokens."""

import numpy as np
import pytest

from evaluation.baselines import all_windows, ngram_baselines, read_predictions, trained_windows
from evaluation.ngram import NGramModel
from evaluation.perplexity import ValidationData
from pretrain.data.open import eval_batches, open_source, open_training

BATCH = 8


@pytest.fixture
def parts(run_config):
    batch = run_config.batch.resolve(1)
    data = ValidationData.open(run_config)
    return run_config, batch, list(eval_batches(data.source, rank=0, world=1, batch_size=4)), data


def test_records_stand_on_equal_and_on_all_tokens(parts):
    config, batch, validation, data = parts
    records = ngram_baselines(config, batch, validation, data.token_bytes, samples=10 * BATCH)
    by = {(r.scope, r.order): r for r in records}
    assert len(by) == 6
    labelled = sum(int((b["labels"] >= 0).sum()) for b in validation)
    source = open_source(config.data.source, config.data)
    for (scope, order), record in by.items():
        assert record.n == labelled
        assert record.train_tokens == (10 * BATCH if scope == "equal tokens" else len(source)) * 64
        assert by[scope, 1].loss >= record.loss or order == 1
        assert record.bits_per_byte == pytest.approx(
            record.loss * labelled / np.log(2) / sum(int(data.token_bytes[b["labels"][b["labels"] >= 0]].sum())
                                                      for b in validation))
    assert by["full split", 3].loss < by["equal tokens", 3].loss < by["equal tokens", 1].loss - 0.5


def test_equal_tokens_are_the_first_of_the_run(parts):
    config, batch, validation, _ = parts
    training = open_training(config, batch)
    wanted = training.samples(3 * BATCH)
    held, tokens = read_predictions(trained_windows(training, 3 * BATCH), 400, document_masking=True)
    assert tokens == 3 * BATCH * 64
    expected, _ = read_predictions([wanted], 400, document_masking=True)
    for order in (1, 2, 3):
        test, _ = read_predictions(validation, 400, document_masking=True)
        assert NGramModel.fit(held, order, 400).nll_sum(test) == pytest.approx(
            NGramModel.fit(expected, order, 400).nll_sum(test), rel=1e-12)


def test_texts_read_again_count_once(parts):
    config, batch, _, _ = parts
    training = open_training(config, batch)
    assert training.epoch_samples is not None
    size = len(training.source)
    ids = np.concatenate([b.sample_ids.numpy() for b in trained_windows(training, 3 * size)])
    assert len(ids) == len(set(ids.tolist())) == size
    every = np.concatenate([b.sample_ids.numpy() for b in all_windows(training.source)])
    assert sorted(ids.tolist()) == every.tolist()


def test_an_untrained_model_has_no_baseline_at_equal_tokens(parts, caplog):
    config, batch, validation, data = parts
    records = ngram_baselines(config, batch, validation, data.token_bytes, samples=0)
    assert {r.scope for r in records} == {"full split"} and "equal tokens" in caplog.text
