"""The contrastive update against the loss of the whole batch in one process: gathering, caching, chunks, dropout."""

from __future__ import annotations

import copy
import math
import threading

import pytest
import torch
from torch import nn

from pretrain.config.contrastive import ContrastiveConfig
from pretrain.config.run import OptimConfig
from pretrain.data.batch import Batch
from pretrain.errors import ConfigError
from pretrain.models.base import BuildContext, EncoderOutput
from pretrain.models.baseline.family import FAMILY as BASELINE
from pretrain.models.baseline.schema import BaselineConfig
from pretrain.models.spectra.family import FAMILY
from pretrain.models.spectra.schema import SpectraConfig
from pretrain.objectives.base import UpdateObjective
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.embedding_losses import TripletIds
from pretrain.objectives.embedding_terms import Layout, Triplets, scene, temperature, terms
from pretrain.objectives.text_chunks import Texts

V, TQ, TP = 97, 16, 24


class Together:
    """Collectives of `world` threads."""

    def __init__(self, world):
        self.world, self.slots, self.barrier = world, [None] * world, threading.Barrier(world, timeout=60)

    def gather(self, rank, tensor):
        self.slots[rank] = tensor.detach().clone()
        self.barrier.wait()
        parts = list(self.slots)
        self.barrier.wait()
        return parts


class Handle:
    """The engine as one thread sees it: gradients are averaged over ranks once the last backward is done."""

    def __init__(self, model, rank=0, together=None, step=3, total_steps=10):
        self.model, self.rank, self.step, self.total_steps = model, rank, step, total_steps
        self.together = together or Together(1)
        self.world = self.together.world
        self.vectors, self.widths, self.closed, self.alive = [], [], False, 0

    def forward(self, batch, *, grad, rng=None):
        if rng is not None:
            current = torch.get_rng_state()
            torch.set_rng_state(rng)
        with torch.set_grad_enabled(grad):
            out = self.model(**batch.tensors)
        if rng is not None:
            torch.set_rng_state(current)
        self.widths.append(tuple(batch["input_ids"].shape))
        self.vectors.append((grad, next(iter(out.heads.values())).detach().clone()))
        return out

    def rng_state(self):
        return torch.get_rng_state()

    def backward(self, loss, *, last):
        assert not self.closed
        loss.backward()
        self.closed = last

    def all_gather(self, tensor):
        return torch.cat(self.together.gather(self.rank, tensor))

    def all_reduce(self, tensor):
        return tensor.copy_(torch.stack(self.together.gather(self.rank, tensor)).sum(0))

    def agree(self, flag):
        return all(bool(t) for t in self.together.gather(self.rank, torch.tensor(flag)))

    def gradients(self):
        return {name: torch.stack(self.together.gather(self.rank, p.grad)).mean(0)
                for name, p in self.model.named_parameters() if p.grad is not None}


class Toy(nn.Module):
    """An encoder in fp64 with the heads of Spectra, small enough for exact comparisons."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.table, self.inner = nn.Embedding(V, 12).double(), nn.Linear(12, 12).double()
        self.out = nn.Linear(12, 12 + 6 + 4 + 6 + 10 + 5).double()
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids, attention_mask):
        weights = attention_mask.double()[..., None]
        x = self.dropout(torch.tanh(self.inner(self.table(input_ids))))
        mean = (x * weights).sum(1) / weights.sum(1).clamp_min(1)
        parts = self.out(mean).split([12, 6, 4, 6, 10, 5], 1)
        whole = [p / p.norm(dim=1, keepdim=True) for p in parts[:5]]
        heads = {"semantic_12": whole[0], "entity_6": whole[1], "anchor_4": whole[2], "retrieval_6": whole[3],
                 "ranking_10": whole[4]}
        heads |= {f"semantic_{w}": whole[0][:, :w] / whole[0][:, :w].norm(dim=1, keepdim=True) for w in (8, 6)}
        return EncoderOutput(heads=heads, default="semantic_12",
                             aux={"spectral": parts[5], "attn_entropy": torch.ones(len(mean), dtype=torch.float64)})


def pairs(count, n=1, seed=0, missing=True):
    """A batch of the `pairs` source; two triplets share a query, a third lacks a negative."""
    g = torch.Generator().manual_seed(seed)

    def side(width, *shape):
        ids = torch.randint(1, V, (*shape, width), generator=g)
        lengths = torch.randint(2, width + 1, (*shape, 1), generator=g)
        mask = torch.arange(width) < lengths
        return ids * mask, mask
    (q, qm), (p, pm), (x, xm) = side(TQ, count), side(TP, count), side(TP, count, n)
    if missing and n:
        x[2, -1], xm[2, -1] = 0, False
    query_ids = torch.arange(count) + 2**40
    query_ids[-1] = query_ids[0]
    tensors = {"query_input_ids": q, "query_attention_mask": qm, "positive_input_ids": p, "positive_attention_mask": pm,
               "query_ids": query_ids, "passage_ids": torch.arange(count) - 2**50}
    if n:
        tensors |= {"negative_input_ids": x, "negative_attention_mask": xm, "negative_mask": xm.any(-1),
                    "negative_ids": torch.arange(count * n).view(count, n) + 10**6}
    return Batch(torch.arange(count), tensors)


def direct(model, batch, config, at):
    """Loss of the whole batch by one forward of all texts, and its gradients: no cache, no gathering, no chunks."""
    model = copy.deepcopy(model)
    n = batch.tensors["negative_ids"].shape[1] if "negative_ids" in batch.tensors else 0
    outputs = [model(batch["query_input_ids"], batch["query_attention_mask"]),
               model(batch["positive_input_ids"], batch["positive_attention_mask"])]
    outputs += [model(batch["negative_input_ids"][:, m], batch["negative_attention_mask"][:, m]) for m in range(n)]
    layout = Layout.of(outputs[0])
    packed = [layout.pack(out) for out in outputs]
    negatives = torch.stack(packed[2:], 1) if n else packed[0].new_empty(len(batch), 0, packed[0].shape[1])
    none = torch.zeros(len(batch), 0, dtype=torch.long)
    ids = TripletIds(batch["query_ids"], batch["passage_ids"], batch.tensors.get("negative_ids", none),
                     batch.tensors.get("negative_mask", none.bool()))
    where = scene(config, Triplets(layout, packed[0], packed[1], negatives, ids), at)
    loss = sum(term.weight * term.loss(where) for term in terms(config, layout))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def on_ranks(model, batch, config, world, micro):
    """The update on `world` threads that share the batch as the loader would; (result, gradients) of each rank."""
    share, results = len(batch) // world, [None] * world
    together = Together(world)

    def rank(number):
        handle = Handle(copy.deepcopy(model), number, together)
        own = batch.rows(number * share, (number + 1) * share)
        micro_batches = [own.rows(at, at + micro) for at in range(0, share, micro)]
        result = Contrastive(config).run(handle, micro_batches, {})
        results[number] = (result, handle.gradients(), handle)
    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def largest_difference(found, want):
    assert found.keys() == want.keys()
    return max(float((found[name] - want[name]).abs().max()) for name in want)


@pytest.mark.parametrize("changes", [{}, {"grad_cache": False}, {"nce_hard_negatives": False},
                                     {"mask_false_negatives": False}, {"nested_ranking": True, "nested_dims": (4, 10),
                                                                       "nested_weights": (0.5, 0.5)}])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_gathered_and_cached_gradients_are_those_of_the_whole_batch(world, n, changes):
    """fp64, 1e-12. A rank that took its own rows for the first ones, or a factor W too few, would be far off."""
    model, batch, config = Toy(), pairs(8, n), ContrastiveConfig.model_validate(changes)
    want_loss, want = direct(model, batch, config, temperature(config, 3, 10))
    for result, gradients, handle in on_ranks(model, batch, config, world, micro=2 if world < 4 else 1):
        assert result.finite and result.loss == pytest.approx(want_loss, abs=1e-12)
        assert largest_difference(gradients, want) < 1e-12
        assert result.metrics["temperature"] == temperature(config, 3, 10) and handle.closed


def test_without_gathering_each_rank_contrasts_its_own():
    model, batch = Toy(), pairs(8)
    config = ContrastiveConfig(gather_negatives=False)
    halves = [direct(model, batch.rows(at, at + 4), config, temperature(config, 3, 10)) for at in (0, 4)]
    want = {name: (halves[0][1][name] + halves[1][1][name]) / 2 for name in halves[0][1]}
    for result, gradients, _ in on_ranks(model, batch, config, 2, micro=2):
        assert result.loss == pytest.approx((halves[0][0] + halves[1][0]) / 2, abs=1e-12)
        assert largest_difference(gradients, want) < 1e-12


@pytest.mark.parametrize("changes", [{"profile": "compat"}, {"contrastive_batch": "micro_batch"}])
def test_micro_batches_by_themselves_are_averaged(changes):
    """The compat way: accumulation adds no negatives. Cached or not, the mean over micro-batches is the loss."""
    model, batch, config = Toy(), pairs(8), ContrastiveConfig.model_validate(changes)
    parts = [direct(model, batch.rows(at, at + 2), config, temperature(config, 3, 10)) for at in range(0, 8, 2)]
    (result, gradients, _), = on_ranks(model, batch, config, 1, micro=2)
    assert result.loss == pytest.approx(sum(p[0] for p in parts) / 4, abs=1e-12)
    want = {name: sum(p[1][name] for p in parts) / 4 for name in parts[0][1]}
    assert largest_difference(gradients, want) < 1e-12
    whole = direct(model, batch, ContrastiveConfig(), temperature(config, 3, 10))[0]
    assert abs(whole - result.loss) > 0.1


def test_the_second_pass_draws_the_dropout_of_the_first():
    model = Toy(dropout=0.5)
    torch.manual_seed(7)
    handle = Handle(model)
    result = Contrastive(ContrastiveConfig()).run(handle, [pairs(8).rows(at, at + 2) for at in range(0, 8, 2)], {})
    first, second = ([v for grad, v in handle.vectors if grad is which] for which in (False, True))
    assert len(first) == len(second) == 4 + 8 and result.finite
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(8)
    again = Handle(model)
    Contrastive(ContrastiveConfig()).run(again, [pairs(8)], {})
    assert not torch.equal(again.vectors[0][1][:2], handle.vectors[0][1])  # and other draws give other vectors


def test_chunks_hold_texts_of_like_length_and_nothing_is_wider_than_they_need():
    batch = pairs(16, n=2)
    texts = Texts.of([batch.rows(0, 8), batch.rows(8, 16)])
    chunks = texts.chunks(4)
    assert len(chunks) == 16 // 4 + 16 * 3 // 4
    assert sorted(torch.cat([c.rows for c in chunks]).tolist()) == list(range(16 * 4))
    whole = [*batch["query_input_ids"], *batch["positive_input_ids"], *batch["negative_input_ids"][:, 0],
             *batch["negative_input_ids"][:, 1]]
    for chunk in chunks:
        ids, mask = chunk.batch["input_ids"], chunk.batch["attention_mask"]
        longest = int(mask.sum(1).max())
        assert ids.shape[1] == min(max(8, -(-longest // 8) * 8), whole[int(chunk.rows[0])].shape[0])
        for row, number in enumerate(chunk.rows.tolist()):
            width = ids.shape[1]
            assert torch.equal(ids[row], whole[number][:width]) and not whole[number][width:].any()
    lengths = [[int(c.batch["attention_mask"].sum(1).max()) for c in part] for part in (chunks[:4], chunks[4:])]
    assert all(part == sorted(part) for part in lengths)
    stacked = texts.stacked().batch
    assert stacked["input_ids"].shape == (64, TP)
    assert torch.equal(stacked["attention_mask"].sum(1)[:16], batch["query_attention_mask"].sum(1))


@pytest.mark.parametrize("bad", ["vector", "loss", "one rank"])
def test_what_is_not_finite_is_agreed_before_any_backward(bad):
    class Broken(Toy):
        def forward(self, input_ids, attention_mask):
            out = super().forward(input_ids, attention_mask)
            first = bool((input_ids[:, 0] == marked).any())
            if bad == "loss":
                out.aux["spectral"] = out.aux["spectral"] * math.inf
            elif first:
                out.heads["entity_6"] = out.heads["entity_6"] * math.nan
            return out
    batch = pairs(8)
    marked = int(batch["query_input_ids"][0, 0])
    config = ContrastiveConfig(ent_nce_weight=0.0, enable_bridge=False)  # no loss sees the vector that is broken
    for result, gradients, handle in on_ranks(Broken(), batch, config, 2, micro=2):
        assert not result.finite and not gradients and not handle.closed
        assert not any(grad for grad, _ in handle.vectors)


def model_and_batch(family):
    if family == "spectra":
        cfg = SpectraConfig(dropout=0.0).tiny().with_vocab_size(V)
        return FAMILY.build(cfg, BuildContext(seed=1)), pairs(8, 1)
    cfg = BaselineConfig(body="bert", vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48,
                         max_position_embeddings=64)
    return BASELINE.build(cfg, BuildContext(seed=1)), pairs(8, 1)


@pytest.mark.parametrize("family", ["spectra", "baseline"])
def test_real_encoders_in_fp32(family):
    """1e-5: chunks have other widths than the whole, so products round otherwise."""
    model, batch = model_and_batch(family)
    config = ContrastiveConfig()
    want_loss, want = direct(model, batch, config, temperature(config, 3, 10))
    scale = max(float(g.abs().max()) for g in want.values())
    for world in (1, 2):
        for result, gradients, _ in on_ranks(model, batch, config, world, micro=2):
            assert result.loss == pytest.approx(want_loss, rel=1e-5)
            assert largest_difference(gradients, want) < 1e-5 * scale
    names = set(result.metrics)
    assert {"accuracy", "temperature"} < names
    spectra = {"loss/semantic", "loss/anchor", "loss/bridge", "loss/fast", "loss/ranking", "loss/angular",
               "loss/spectral", "loss/entity", "spectral/attn_entropy", "spectral/fusion", "fractal/w_abs"}
    assert spectra <= names if family == "spectra" else names == {"accuracy", "temperature", "loss/nce"}


def test_only_one_chunk_is_alive_in_the_second_pass():
    """Memory is that of a chunk: what a forward keeps is let go by its backward before the next forward."""
    class Counted(Handle):
        peak = 0

        def forward(self, batch, *, grad, rng=None):
            self.alive += grad
            self.peak = max(self.peak, self.alive)
            return super().forward(batch, grad=grad, rng=rng)

        def backward(self, loss, *, last):
            super().backward(loss, last=last)
            self.alive -= 1
    handle = Counted(Toy())
    Contrastive(ContrastiveConfig()).run(handle, [pairs(8).rows(at, at + 2) for at in range(0, 8, 2)], {})
    assert handle.peak == 1 and handle.alive == 0
    assert max(rows for rows, _ in handle.widths) == 2


def test_it_is_an_update_objective_and_other_sources_are_refused():
    objective = Contrastive(ContrastiveConfig())
    assert isinstance(objective, UpdateObjective)
    inputs = objective.probe_inputs(pairs(4))
    assert inputs["input_ids"].shape[0] == 4 and inputs["input_ids"].shape[1] % 8 == 0
    windows = Batch(torch.arange(2), {"input_ids": torch.zeros(2, 5), "labels": torch.zeros(2, 5)})
    with pytest.raises(ConfigError, match="contrastive needs pairs; this source gives input_ids, labels"):
        objective.probe_inputs(windows)


@pytest.mark.parametrize(("model", "objective"), [
    ({}, {}), ({"use_spectral": False}, {}), ({"enable_anchor64": False}, {}), ({}, {"enable_bridge": False}),
    ({"enable_entity": False}, {"enable_bridge": False, "ent_nce_weight": 0.0}), ({}, {"enable_matry_angular": False}),
    ({"use_spectral": False, "enable_anchor64": False}, {"enable_bridge": False, "enable_matry_angular": False}),
    ({"enable_semantic": False}, {"enable_semantic_nce": False}), ({"fractal_depth": 0}, {}),
    ({}, {"nested_ranking": True, "nested_dims": (8, 32), "nested_weights": (0.4, 0.6)}), ({}, {"grad_cache": False}),
    ({"profile": "compat"}, {"profile": "compat"})])
def test_every_parameter_that_a_toggle_leaves_gets_a_gradient(model, objective):
    """Acceptance test 12, under the objective itself."""
    cfg = SpectraConfig.model_validate({
        "size": None, "vocab_size": V, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "ffn_inner": 96,
        "spectral_dim": 16, "max_length": 24, "max_positions": 24, "sem_dims": (48, 32, 24), "ent_dims": (32, 24),
        "anchor_dim": 16, "retrieval_dim": 32, "ranking_dim": 64, "dropout": 0.0, **model})
    terms_of = ContrastiveConfig.model_validate(objective)
    assert not list(cfg.objective_problems(terms_of))
    built = FAMILY.build(cfg, BuildContext(seed=1)).train()
    handle = Handle(built)
    Contrastive(terms_of).run(handle, [pairs(V, seed=seed) for seed in range(2)], {})
    without = [name for name, p in built.named_parameters()
               if (p.grad is None or not p.grad.any()) and not name.endswith("key.bias")]  # softmax does not see those
    assert without == []


def test_a_tiny_model_learns_64_triplets_by_heart():
    """Acceptance test 13: in-batch accuracy of 0.95 within 200 updates, dropout on; half of the candidates are hard."""
    cfg = SpectraConfig.model_validate({
        "size": None, "vocab_size": V, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "ffn_inner": 128,
        "spectral_dim": 16, "max_length": 24, "max_positions": 24, "sem_dims": (64, 48, 32), "ent_dims": (32, 24),
        "anchor_dim": 16, "retrieval_dim": 32, "ranking_dim": 64})
    model, batch = FAMILY.build(cfg, BuildContext(seed=1)).train(), pairs(64, missing=False)
    groups = FAMILY.parameter_groups(model, OptimConfig(weight_decay=0.05))
    optimizer = torch.optim.AdamW([{"params": g.params, "weight_decay": g.weight_decay} for g in groups], lr=1e-3)
    torch.manual_seed(0)
    reached = []
    while len(reached) < 200 and (not reached or reached[-1] < 0.95):
        handle = Handle(model, step=len(reached), total_steps=200)
        result = Contrastive(ContrastiveConfig()).run(handle, [batch.rows(at, at + 16) for at in range(0, 64, 16)], {})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        reached.append(result.metrics["accuracy"])
    assert reached[0] < 0.1 and reached[-1] >= 0.95
