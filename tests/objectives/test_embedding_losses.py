"""Every loss against loops over texts, the rules of false negatives one by one, the temperature at its known points."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.config.contrastive import ContrastiveConfig
from pretrain.models.base import EncoderOutput
from pretrain.objectives import embedding_losses
from pretrain.objectives.embedding_losses import (
    Blocked,
    TripletIds,
    angular,
    bridge,
    entropy_reward,
    symmetric_nce,
    triplet,
)
from pretrain.objectives.embedding_terms import Layout, Triplets, accuracy, scene, temperature, terms

B, N, D = 6, 2, 8
T = 0.07


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def sides(seed=0, b=B, n=N, d=D):
    g = torch.Generator().manual_seed(seed)
    shapes = ((b, d), (b, d), (b, n, d))
    return [unit(torch.randn(*shape, generator=g, dtype=torch.float64)) for shape in shapes]


def distinct(b=B, n=N):
    return TripletIds(torch.arange(b), torch.arange(b) + 100, torch.arange(b * n).view(b, n) + 1000,
                      torch.ones(b, n, dtype=torch.bool))


def slow_nce(a, p, n, ids, *, hard, mask):
    """Symmetric InfoNCE by the words of the specification."""
    b = len(a)
    there = back = 0.0
    for i in range(b):
        candidates = {("p", j): float(a[i] @ p[j]) / T for j in range(b)}
        reverse = {j: float(p[i] @ a[j]) / T for j in range(b)}
        for j in range(b):
            if mask and j != i and (ids.query[j] == ids.query[i] or ids.positive[j] == ids.positive[i]):
                del candidates["p", j], reverse[j]
            for m in range(n.shape[1]) if hard else ():
                own_passage = j != i and ids.negative[j, m] == ids.positive[i]
                if ids.has_negative[j, m] and not (mask and own_passage):
                    candidates["n", j, m] = float(a[i] @ n[j, m]) / T
        there -= candidates["p", i] - math.log(sum(math.exp(v) for v in candidates.values()))
        back -= reverse[i] - math.log(sum(math.exp(v) for v in reverse.values()))
    return (there / b + back / b) / 2


def colliding():
    """Triplets 0 and 3 share the query, 1 and 4 the positive, a negative of 2 is the positive of 5, one is missing."""
    ids = distinct()
    ids.query[3] = ids.query[0]
    ids.positive[4] = ids.positive[1]
    ids.negative[2, 1] = ids.positive[5]
    ids.negative[0, 0] = ids.positive[0]  # its own negative is never taken away
    ids.has_negative[1, 1] = False
    return ids


@pytest.mark.parametrize("similarities", [  # one row, two rows of candidates, all rows at once
    pytest.param(1, marks=pytest.mark.slow), 40, 2**20])
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_nce_is_that_of_the_words(hard, mask, similarities, monkeypatch):
    monkeypatch.setattr(embedding_losses, "SIMILARITIES", similarities)
    a, p, n = sides()
    for ids in (distinct(), colliding()):
        blocked = Blocked(ids, hard_negatives=hard, false_negatives=mask)
        found = symmetric_nce(a, p, n, T, blocked)
        assert float(found) == pytest.approx(slow_nce(a, p, n, ids, hard=hard, mask=mask), abs=1e-12)
        leaves = [side.clone().requires_grad_() for side in (a, p, n)]
        torch.autograd.gradcheck(lambda *of, blocked=blocked: symmetric_nce(*of, T, blocked), leaves)


@pytest.mark.parametrize("n", [0, 1])
def test_a_copy_of_a_triplet_leaves_its_loss_unchanged_in_both_directions(n):
    """Acceptance test 5, without hard negatives; and that it is the mask which does it."""
    a, p, negatives = sides(n=n)
    p = unit(a + 0.5 * p)  # as trained: the positive is near
    ids = distinct(n=n)

    def row_losses(order, mask):
        at = TripletIds(*(t[order] for t in (ids.query, ids.positive, ids.negative, ids.has_negative)))
        blocked, every = Blocked(at, hard_negatives=False, false_negatives=mask), slice(None)
        forward = (a[order] @ p[order].T / T).masked_fill(blocked.forward(every), -math.inf).log_softmax(1).diagonal()
        reverse = (p[order] @ a[order].T / T).masked_fill(blocked.reverse(every), -math.inf).log_softmax(1).diagonal()
        mean = symmetric_nce(a[order], p[order], negatives[order], T, blocked)
        assert float(mean) == pytest.approx(float(-(forward + reverse).mean() / 2), abs=1e-12)
        return forward[2], reverse[2]

    order = list(range(B))
    for before, after in zip(row_losses(order, True), row_losses([*order, 2], True), strict=True):
        assert float(before) == pytest.approx(float(after), abs=1e-12)
    for before, after in zip(row_losses(order, False), row_losses([*order, 2], False), strict=True):
        assert abs(float(before) - float(after)) > 0.3


def test_triplet_is_torchs_and_skips_what_is_not_there():
    a, p, n = sides(n=1)
    own = torch.nn.TripletMarginLoss(margin=0.3, eps=1e-6)(a, p, n[:, 0])
    assert float(triplet(a, p, n, torch.ones(B, 1, dtype=torch.bool), 0.3)) == pytest.approx(float(own), abs=1e-12)
    a, p, n = sides()
    there = colliding().has_negative
    slow = [max(0.0, float((a[i] - p[i] + 1e-6).norm() - (a[i] - n[i, m] + 1e-6).norm()) + 0.3)
            for i in range(B) for m in range(N) if there[i, m]]
    assert float(triplet(a, p, n, there, 0.3)) == pytest.approx(sum(slow) / len(slow), abs=1e-12)
    empty = [t.requires_grad_() for t in sides(n=0)]
    loss = triplet(*empty, torch.ones(B, 0, dtype=torch.bool), 0.3)
    loss.backward()
    assert loss.item() == 0 and not empty[0].grad.any()


def test_angular_follows_the_ranking_vector_and_does_not_pull_it():
    student, teacher = sides(1), [t.requires_grad_() for t in sides(2, d=16)]
    there = colliding().has_negative
    own = sum((student[0][i] @ student[1][i] - teacher[0][i] @ teacher[1][i]).item()**2 for i in range(B)) / B
    other = [(student[0][i] @ student[2][i, m] - teacher[0][i] @ teacher[2][i, m]).item()**2
             for i in range(B) for m in range(N) if there[i, m]]
    loss = angular(tuple(t.requires_grad_() for t in student), tuple(teacher), there)
    assert loss.item() == pytest.approx((own + sum(other) / len(other)) / 2, abs=1e-12)
    loss.backward()
    assert student[0].grad.any() and all(t.grad is None for t in teacher)


def test_bridge():
    semantic, entity = (t.requires_grad_() for t in (sides(1, d=12)[0], sides(2, d=5)[0]))
    short = unit(semantic[:, :5])
    cosine = bridge(semantic, entity, metric="cosine", stopgrad=True)
    assert cosine.item() == pytest.approx((1 - (short * entity).sum(1).mean()).item(), abs=1e-12)
    cosine.backward()
    assert semantic.grad is None and entity.grad.any()
    published = bridge(semantic, entity, metric="mse", stopgrad=False)
    assert published.item() == pytest.approx((short - entity).square().mean().item(), abs=1e-12)
    published.backward()
    assert semantic.grad.any()
    # W12: bounded by 4 / width, so that at weight 0.02 and width 96 it adds at most 0.00083.
    assert bridge(entity, -entity, metric="mse", stopgrad=False).item() == pytest.approx(4 / 5)


def test_the_marginal_reward_wants_texts_apart_and_the_published_one_a_constant():
    """W13: the published term is best where every text has the same, even vector."""
    even, apart = torch.zeros(4, 4, dtype=torch.float64), 50 * torch.eye(4, dtype=torch.float64)
    same = 50 * torch.tensor([1.0, 0, 0, 0]).double().expand(4, 4)
    assert float(entropy_reward(even, "sample")) == pytest.approx(-math.log(4))
    assert float(entropy_reward(apart, "sample")) == pytest.approx(0, abs=1e-9)
    assert float(entropy_reward(apart, "marginal")) == pytest.approx(-math.log(4))
    assert float(entropy_reward(same, "marginal")) == pytest.approx(0, abs=1e-9)
    x = sides(3)[0]
    p = [[math.exp(v) for v in row] for row in x.tolist()]
    p = [[v / sum(row) for v in row] for row in p]
    slow = sum(v * math.log(v) for row in p for v in row) / B
    assert float(entropy_reward(x, "sample")) == pytest.approx(slow, abs=1e-12)


def test_temperature_at_the_points_of_the_specification():
    """Acceptance test 6; t and N count the same unit."""
    config = ContrastiveConfig()
    found = [temperature(config, step, 36_750) for step in (0, 500, 7350, 20_000, 36_750)]
    assert found[:3] == [0.07, 0.07, 0.07]
    assert found[3] == pytest.approx(0.0622, abs=5e-5) and found[4] == pytest.approx(0.05, abs=1e-12)
    assert temperature(config, 40_000, 36_750) == pytest.approx(0.05) and temperature(config, 0, 1) == 0.07
    assert all(temperature(config, s, 100) >= temperature(config, s + 1, 100) for s in range(120))


WIDTHS = {"semantic": (8, 6, 4), "entity": (6, 4), "anchor": (4,), "retrieval": (6,), "ranking": (10,)}


def spectra_output(seed=0, b=B, spectral=True, without=()):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    heads = {}
    for role, widths in WIDTHS.items():
        whole = unit(draw(b, widths[0]))
        if role not in without:
            heads |= {f"{role}_{w}": unit(whole[:, :w]) for w in widths}
    aux = {"spectral": draw(b, 5), **({"attn_entropy": torch.ones(b)} if spectral else {})}
    return EncoderOutput(heads=heads, default="semantic_8", aux=aux)


def batch_of(outputs, ids):
    layout = Layout.of(outputs[0])
    packed = [layout.pack(out) for out in outputs]
    negatives = [packed[2 + m] for m in range(ids.negative.shape[1])]
    empty = packed[0].new_empty(len(packed[0]), 0, packed[0].shape[1])
    return Triplets(layout, packed[0], packed[1], torch.stack(negatives, 1) if negatives else empty, ids)


def test_terms_and_weights_are_those_of_the_specification():
    outputs = [spectra_output(seed) for seed in range(2 + N)]
    ids, config = colliding(), ContrastiveConfig()
    texts = batch_of(outputs, ids)
    where = scene(config, texts, T)
    found = {term.name: (term.weight, float(term.loss(where))) for term in terms(config, texts.layout)}
    a, p, *n = outputs

    def of(name):
        return a.heads[name], p.heads[name], torch.stack([o.heads[name] for o in n], 1)

    def nce(name):
        return slow_nce(*of(name), ids, hard=True, mask=True)

    def trip(name):
        return float(triplet(*of(name), ids.has_negative, 0.3))
    mean = torch.softmax(a.aux["spectral"], 1).mean(0)
    want = {
        "semantic": (1.0, 0.35 * nce("semantic_8") + 0.30 * nce("semantic_6") + 0.25 * nce("semantic_4")),
        "anchor": (0.15, nce("anchor_4")),
        "bridge": (0.02, sum(1 - float((unit(o.heads["semantic_4"][:, :4]) * o.heads["entity_4"]).sum(1).mean())
                             for o in (a, p)) / 2),
        "fast": (0.25, nce("retrieval_6") + trip("retrieval_6")),
        "ranking": (1.0, nce("ranking_10") + trip("ranking_10")),
        "angular": (0.08, found["angular"][1]),
        "spectral": (0.005, float((mean * mean.log()).sum())),
        "entity": (0.10, nce("entity_6"))}
    assert list(found) == list(want)
    for name, (weight, value) in want.items():
        assert found[name] == (weight, pytest.approx(value, abs=1e-12)), name


@pytest.mark.parametrize(("output", "config", "gone"), [
    ({"spectral": False}, {}, {"spectral"}), ({"without": ("anchor",)}, {}, {"anchor"}),
    ({}, {"enable_bridge": False}, {"bridge"}), ({}, {"enable_matry_angular": False}, {"angular"}),
    ({"without": ("entity",)}, {}, {"entity", "bridge"}), ({"without": ("semantic",)}, {}, {"semantic", "bridge"}),
    ({}, {"spectral_reg": "off"}, {"spectral"}), ({}, {"profile": "compat"}, {"entity"}),
    ({}, {"enable_semantic_nce": False}, {"semantic"})])
def test_toggles_take_their_terms_away(output, config, gone):
    every = {term.name for term in terms(ContrastiveConfig(), Layout.of(spectra_output()))}
    left = {term.name for term in terms(ContrastiveConfig.model_validate(config), Layout.of(spectra_output(**output)))}
    assert every - left == gone


def test_nested_ranking_takes_prefixes_in_place_of_the_whole():
    config = ContrastiveConfig(nested_ranking=True, nested_dims=(4, 10), nested_weights=(0.25, 0.75))
    outputs = [spectra_output(seed) for seed in range(2 + N)]
    texts = batch_of(outputs, distinct())
    (term,) = (t for t in terms(config, texts.layout) if t.name == "ranking")
    a, p, n = (torch.stack([o.heads["ranking_10"] for o in side]) for side in (outputs[:1], outputs[1:2], outputs[2:]))
    a, p, n = a[0], p[0], n.transpose(0, 1)
    parts = [weight * slow_nce(*(unit(t[..., :w]) for t in (a, p, n)), distinct(), hard=True, mask=True)
             for w, weight in ((4, 0.25), (10, 0.75))]
    want = sum(parts) + float(triplet(a, p, n, distinct().has_negative, 0.3))
    assert float(term.loss(scene(config, texts, T))) == pytest.approx(want, abs=1e-12)


def test_an_encoder_without_these_heads_is_trained_on_its_default_one():
    def output(seed):
        g = torch.Generator().manual_seed(seed)
        heads = {"cls": torch.randn(B, D, generator=g), "mean": 5 * torch.randn(B, D, generator=g)}
        return EncoderOutput(heads=heads, default="mean", aux={"token_states": torch.zeros(1)})
    outputs = [output(seed) for seed in range(2)]
    texts = batch_of(outputs, distinct(n=0))
    config = ContrastiveConfig()
    (term,) = terms(config, texts.layout)
    where = scene(config, texts, T)
    a, p = (unit(o.heads["mean"].double()) for o in outputs)
    empty = a.new_empty(B, 0, D)
    assert (term.name, term.weight) == ("nce", 1.0)
    want = slow_nce(a, p, empty, distinct(n=0), hard=True, mask=True)
    assert float(term.loss(where)) == pytest.approx(want, rel=1e-5)
    firsts = [(a[i] @ p.T).argmax() == i for i in range(B)]
    assert float(accuracy(where)) == pytest.approx(sum(map(float, firsts)) / B)


def test_sane_at_the_start():
    """With 8 candidates InfoNCE of unrelated vectors is about ln 8, and the margin is what the triplet term is."""
    g = torch.Generator().manual_seed(0)
    common = torch.randn(1, 768, generator=g, dtype=torch.float64)
    a, p, n = (unit(common + torch.randn(256, 768, generator=g, dtype=torch.float64)) for _ in range(3))
    values = []
    for start in range(0, 256, 8):
        rows = slice(start, start + 8)
        blocked = Blocked(distinct(8, 1), hard_negatives=False, false_negatives=False)
        values.append([float(symmetric_nce(a[rows], p[rows], n[rows, None], T, blocked)),
                       float(triplet(a[rows], p[rows], n[rows, None], torch.ones(8, 1, dtype=torch.bool), 0.3))])
    nce, margin = torch.tensor(values).mean(0).tolist()
    assert 2.0 < nce < 2.4 and margin == pytest.approx(0.3, abs=0.03)
