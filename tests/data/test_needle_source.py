"""Generated needles: what an example is made of, and that it depends on (seed, split, index) alone."""

import logging

import numpy as np
import pytest
import torch
from small_datasets import write_dataset

from pretrain.config.needle import NeedleConfig
from pretrain.config.run import ResolvedBatch, RunConfig
from pretrain.data.loader import UpdateLoader
from pretrain.data.needle import NeedleSource, skip
from pretrain.data.open import eval_batches, open_training, open_validation
from pretrain.errors import ConfigError, UserError

MODEL = {"family": "baseline", "body": "llama", "vocab_size": 32000, "hidden_size": 16, "num_layers": 1,
         "num_heads": 2, "intermediate_size": 32, "max_position_embeddings": 1024}
IDS = np.arange(500)


def needles(**fields) -> NeedleSource:
    return NeedleSource(NeedleConfig(**fields))


def run_config(batch=6, seed=1, **source) -> RunConfig:
    return RunConfig.model_validate({
        "model": MODEL, "objective": {"name": "causal_lm"}, "seed": seed, "batch": {"global_batch_size": batch},
        "data": {"source": {"kind": "needle", **source}}})


def updates(config: RunConfig, world: int, first: int, count: int) -> torch.Tensor:
    """input_ids of `count` global batches, put together from `world` ranks."""
    size = config.batch.global_batch_size
    batch = ResolvedBatch(global_batch_size=size, micro_batch_size=1, gradient_accumulation_steps=size // world,
                          data_parallel_size=world)
    data = open_training(config, batch)
    found = []
    for _ in range(count):
        for rank in range(world):
            with UpdateLoader(data.source, data.order, batch, rank=rank, start_k=first + len(found) // world) as loader:
                found.append(torch.cat([micro["input_ids"] for micro in next(loader).micro_batches]))
    return torch.cat(found)


@pytest.mark.parametrize("marker", ["none", "tag", "key", "tagkey"])
def test_an_example_is_context_query_needle(marker):
    source = needles(needle_marker=marker)
    config, rows = source.config, source.rows(IDS)
    assert rows.tokens.shape == (500, 534)
    assert (config.pool_size, config.retrieval_start, config.start_range) == (31800, 518, (128, 368))
    inside = np.take_along_axis(rows.tokens, rows.start[:, None] + np.arange(16), 1)
    assert (inside == rows.needle).all()
    assert (rows.tokens[:, 518:] == rows.needle).all()
    assert all(len(set(needle)) == 16 for needle in rows.needle.tolist())
    haystack = rows.tokens[:, :512].copy()
    for row, start in enumerate(rows.start):
        haystack[row, start - config.marker_len:start + 16] = 0
    assert not (haystack[:, :, None] == rows.needle[:, None, :]).any()
    drawn = haystack[haystack > 0]
    assert drawn.min() >= 100
    assert drawn.max() < 31900
    assert len(set(drawn.tolist())) > 30000, "the haystack covers its pool"
    query = rows.tokens[:, 512:518]
    assert (query[:, 0] == 2).all()
    reserved = set(range(31900, 31905))
    if config.has_key:
        before = np.take_along_axis(rows.tokens, rows.start[:, None] + np.arange(-4, 0), 1)
        assert (query[:, 2:] == before).all()
        assert len(np.unique(before, axis=0)) == 500
    else:
        assert set(query[0, 1:].tolist()) == reserved
        assert (query == query[0]).all()
    if "tag" in marker:
        tags = np.take_along_axis(rows.tokens, rows.start[:, None] - config.marker_len, 1)
        assert (tags == 31905).all()
        assert (rows.tokens == 31905).sum() == 500


def test_needles_start_everywhere_in_their_range_alike():
    starts = needles(ctx_chunks=4, ctx_chunk_len=24, needle_len=4).rows(np.arange(20000)).start
    counts = np.bincount(starts, minlength=96)
    assert set(np.flatnonzero(counts)) == set(range(24, 96 - 24 - 4 + 1))
    expected = 20000 / 45
    assert ((counts[24:69] - expected) ** 2 / expected).sum() < 90, "chi-square of 44 degrees of freedom"
    anywhere = needles(ctx_chunks=4, ctx_chunk_len=24, needle_len=4, placement="uniform", needle_marker="tag")
    assert set(anywhere.rows(np.arange(20000)).start) == set(range(1, 96 - 4 + 1))
    short = needles(ctx_chunks=1, ctx_chunk_len=24, needle_len=20)
    assert set(short.rows(np.arange(1000)).start) == set(range(5)), "no room inside: anywhere"


def test_labels_are_the_needle_at_the_rows_that_predict_it():
    source = needles(needle_marker="key")
    batch, rows = source.get(IDS[:7]), source.rows(IDS[:7])
    assert batch["input_ids"].shape == batch["labels"].shape == (7, 533)
    positions = batch["readout_positions"]
    assert positions[0].tolist() == list(range(517, 533))
    assert (batch["labels"].gather(1, positions).numpy() == rows.needle).all()
    assert int((batch["labels"] != -100).sum()) == 7 * 16
    assert (batch["input_ids"][:, 518:].numpy() == rows.needle[:, :-1]).all(), "teacher-forced, last token never input"
    assert batch["pool"].tolist() == [[100, 31900]] * 7


def test_without_a_query_every_position_has_a_label():
    batch = needles(needle_query=False).get(IDS[:3])
    assert batch["input_ids"].shape == (3, 511)
    assert (batch["labels"][:, :-1] == batch["input_ids"][:, 1:]).all()
    assert "readout_positions" not in batch.tensors


def test_several_needles_of_which_the_asked_one_has_the_key():
    source = needles(needle_marker="tagkey", needles=5)
    rows = source.rows(IDS)
    assert ((rows.tokens == source.config.tag_id).sum(axis=1) == 5).all()
    for tokens, start, needle in zip(rows.tokens[:50], rows.start, rows.needle, strict=False):
        tags = np.flatnonzero(tokens[:512] == source.config.tag_id)
        assert (np.diff(tags) >= 21).all()
        matching = [t for t in tags if (tokens[t + 1:t + 5] == tokens[514:518]).all()]
        assert matching == [start - 5]
        assert (tokens[start:start + 16] == needle).all()
        ids = np.concatenate([tokens[t + 5:t + 21] for t in tags])
        assert len(set(ids)) == 80
    order = ((rows.tokens == source.config.tag_id).cumsum(axis=1)[IDS, rows.start]).tolist()
    assert set(order) == {1, 2, 3, 4, 5}, "any of them is asked for"


def test_repeats_put_needle_ids_into_the_haystack():
    rows = needles(vocab_size=300, haystack_repeats=True).rows(IDS)
    hits = (rows.tokens[:, :512, None] == rows.needle[:, None, :]).any(2).sum(1)
    assert hits.mean() > 16 + 496 * 16 / 100 * 0.8


def test_an_example_depends_on_seed_split_and_index_alone():
    one, other = needles(), needles()
    assert torch.equal(one.get(IDS)["input_ids"][7:9], other.get(np.array([7, 8]))["input_ids"])
    assert torch.equal(one.get(IDS[::-1])["input_ids"].flip(0), one.get(IDS)["input_ids"])
    sources = {"train": needles(), "seed": needles(seed=1), "val": needles(split="val"), "test": needles(split="test")}
    rows = {name: source.rows(IDS).tokens for name, source in sources.items()}
    drawn = {tuple(row[:64].tolist()) for tokens in rows.values() for row in tokens}
    assert len(drawn) == 2000, "splits and seeds share no example"
    assert (needles(split="val", seed=9).rows(IDS).tokens == rows["val"]).all(), "evaluated on the same examples"
    far = needles().get(np.array([2**62]))
    assert far["input_ids"].shape == (1, 533)


def test_fingerprint_says_what_changes_an_example():
    base = needles().fingerprint
    assert base == needles(verify="off", needle_eval_examples=7, eval_soft_topk=3).fingerprint
    assert needles(split="val").fingerprint != needles(split="val", needle_eval_examples=7).fingerprint
    changes = [{"seed": 1}, {"split": "val"}, {"needle_len": 8}, {"ctx_chunks": 5}, {"needle_marker": "key"},
               {"vocab_size": 32001}, {"placement": "uniform"}, {"haystack_repeats": True}, {"needle_query": False},
               {"needle_train_size": 1000}, {"eos_id": 3}, {"pool_margin": 99}]
    assert len({base, *(needles(**change).fingerprint for change in changes)}) == len(changes) + 1


def test_the_stream_is_the_same_at_any_world_size_and_start():
    config = run_config(needle_marker="key")
    whole = updates(config, 1, 0, 4)
    assert torch.equal(updates(config, 2, 2, 2), whole[12:])
    assert torch.equal(updates(config, 3, 0, 4), whole)
    with pytest.raises(TypeError):
        len(open_training(config, config.batch.resolve(1)).source)


def test_a_fixed_training_set_comes_round_in_epochs():
    config = run_config(batch=6, needle_train_size=30)
    data = open_training(config, config.batch.resolve(1))
    assert data.epoch_samples == 30
    ids = torch.cat([data.samples(60)["source_ids"]])
    assert sorted(ids[:30].tolist()) == sorted(ids[30:].tolist()) == list(range(30))
    assert ids[:30].tolist() != ids[30:].tolist()


def test_validation_and_test_have_a_size():
    source = open_validation(run_config(needle_eval_examples=20))
    assert len(source) == 20
    assert source.config.split == "val"
    assert sum((batch.sample_ids >= 0).sum().item()
               for rank in (0, 1) for batch in eval_batches(source, rank=rank, world=2, batch_size=8)) == 20
    assert len(needles(split="test")) == 1000


def test_the_length_of_a_sample_is_the_task_s(caplog):
    assert run_config().data.seq_len == 533
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        config = RunConfig.model_validate({
            "model": MODEL, "objective": {"name": "causal_lm"},
            "data": {"seq_len": 256, "source": {"kind": "needle", "ctx_chunks": 2}}})
    assert config.data.seq_len == 256 + 6 + 15
    assert "256 is taken as 277" in caplog.text
    assert "6 of the query + 15 of the needle" in caplog.text
    with pytest.raises(ValueError, match=r"data\.seq_len: 2069 is above model\.max_seq_len 1024"):
        run_config(ctx_chunks=16)


@pytest.mark.parametrize("fields, message", [
    ({"ctx_chunks": 1, "ctx_chunk_len": 10}, "10 tokens of context do not hold 1 needle"),
    ({"vocab_size": 230}, "leaves 30 ids to draw from"),
    ({"eos_id": 100}, "eos_id: 100 must be below"),
    ({"haystack": "shards"}, "haystack_path: names the dataset"),
    ({"needles": 2}, "needles: 2 needles are told apart by their keys"),
    ({"needle_len": 65}, "needle_len"), ({"needle_marker": "kee"}, "needle_marker"), ({"split": "dev"}, "split")])
def test_what_does_not_fit_is_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        NeedleConfig(**fields)
    assert "data.source" in str(caught.value) or "validation error" in str(caught.value)


def test_numbers_above_the_model_s_vocabulary_are_refused():
    config = run_config(vocab_size=40000)
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 32000 is too small for data\.source"):
        open_training(config, config.batch.resolve(1))


def test_skip_leaves_out_the_excluded_and_keeps_order():
    excluded = np.array([[0, 3, 4, 9]])
    assert skip(np.arange(6)[None], excluded).tolist() == [[1, 2, 5, 6, 7, 8]]


def test_a_haystack_of_real_text(tmp_path):
    rng = np.random.default_rng(0)
    text = [rng.integers(0, 2000, 6000) for _ in range(3)]
    manifest = write_dataset(tmp_path / "set", {"train": text, "val": [rng.integers(0, 2000, 3000)]}, vocab_size=2000,
                             block_tokens=512)
    fields = {"vocab_size": 2000, "haystack": "shards", "haystack_path": str(manifest.folder), "needle_marker": "key"}
    source = needles(**fields)
    rows = source.rows(np.arange(35))
    stream = np.concatenate(text)[:35 * 512].reshape(35, 512)
    for tokens, start, needle in zip(rows.tokens, rows.start, rows.needle, strict=True):
        rest = np.r_[tokens[:start - 4], tokens[start + 16:512]]
        assert not np.isin(needle, rest).any()
        assert any((np.r_[window[:start - 4], window[start + 16:]] == rest).all() for window in stream)
    contexts = {tuple(tokens[:120]) for tokens in rows.tokens}
    assert len(contexts) == 35, "every window once before any comes twice"
    assert source.fingerprint != needles(**{**fields, "haystack_repeats": True}).fingerprint
    assert needles(**fields, split="val").rows(np.arange(4)).tokens.shape == (4, 534)
    with pytest.raises(ConfigError, match=r"leaves \d+ ids of the pool unused"):
        needles(**{**fields, "pool_margin": 985}, needle_len=8).rows(np.arange(35))
    with pytest.raises(UserError, match=r"none.*manifest"):
        needles(**{**fields, "haystack_path": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match=r"vocab_size: 1500 is too small"):
        needles(**{**fields, "vocab_size": 1500})
