"""Spectra against a slow reference of its own, and the properties that the published code lacks."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from pretrain.config.run import OptimConfig
from pretrain.errors import UserError
from pretrain.gates import run_gates
from pretrain.models.base import BuildContext, EncoderOutput, LMOutput
from pretrain.models.spectra.family import FAMILY, SpectraHooks
from pretrain.models.spectra.model import SpectraForMaskedLM, SpectraModel
from pretrain.models.spectra.schema import SpectraConfig
from tests.models.spectra_slow import text_vectors

V, T = 61, 24
CASES = {
    "default": {}, "explicit": {"attention_impl": "explicit"}, "two rounds": {"fractal_depth": 2},
    "no rounds": {"fractal_depth": 0}, "fixed gates": {"learnable_fractal": False, "learnable_spectral_fusion": False},
    "pre-norm": {"norm_position": "pre"}, "first token": {"pooling": "cls"}, "mean norm": {"spectral_norm": "mean"},
    "entropy gate": {"spectral_entropy_gate": True}, "no spectral branch": {"use_spectral": False},
    "three heads": {"enable_semantic": False, "enable_entity": False}, "no anchor": {"enable_anchor64": False},
}


def config(**changes):
    sizes = {"size": None, "vocab_size": V, "hidden_size": 32, "num_layers": 3, "num_heads": 2, "ffn_inner": 40,
             "spectral_dim": 12, "max_length": 64, "max_positions": 80, "dropout": 0.0, "sem_dims": (48, 32, 16),
             "ent_dims": (24, 12), "anchor_dim": 8, "retrieval_dim": 16, "ranking_dim": 64, "anomaly_basis": 4}
    return SpectraConfig.model_validate({**sizes, **changes})


def build(ctx=None, *, spread=True, **changes):
    """A model in eval mode whose weights are large enough for every part to matter, gates included."""
    model = FAMILY.build(config(**changes), ctx or BuildContext(seed=1)).eval()
    if spread:
        g = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = torch.randn(p.shape, generator=g)
                if "w_frac" in name:
                    p.copy_(0.8 * noise.abs())
                elif "theta" in name:
                    p.copy_(0.2 + 0.1 * noise.clamp(-1, 1))
                else:
                    p.add_(noise * (0.15 if p.ndim == 2 else 0.05))
    return model


def tokens(rows=3, length=T, seed=0):
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def everything(out):
    """All outputs that belong to a text, by name."""
    return {**out.heads, **{k: v for k, v in out.aux.items() if k not in ("w_frac", "fusion", "last_hidden_state")}}


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("name", CASES)
def test_every_output_is_that_of_the_formulas(name):
    model = build(**CASES[name]).double()
    ids, lengths = tokens(), [T, 15, 1]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    out = model(ids, attention_mask=mask.long())
    assert isinstance(out, EncoderOutput)
    for row, length in enumerate(lengths):
        want = text_vectors(model.state_dict(), config(**CASES[name]), ids[row, :length])
        close(out.aux["last_hidden_state"][row, :length], want.pop("last_hidden_state"), 1e-10)
        found = everything(out)
        assert set(found) == set(want)
        for key, value in want.items():
            close(found[key][row], value, 1e-10)


@pytest.mark.parametrize("changes", [{}, {"pooling": "cls"}, {"fractal_depth": 2}])
def test_compat_is_the_published_arithmetic_padding_included(changes):
    model = build(profile="compat", **changes).double()
    cfg = config(profile="compat", **changes)
    assert (cfg.spectral_norm, cfg.attention_impl, cfg.decay_exclude) == ("sum", "explicit", False)
    ids = tokens()
    mask = torch.arange(T) < torch.tensor([[T], [15], [4]])
    out = model(ids, attention_mask=mask)
    for row in range(3):
        want = text_vectors(model.state_dict(), cfg, ids[row], mask[row])
        for key, value in want.items():
            if key != "last_hidden_state":
                close(everything(out)[key][row], value, 1e-10)


def test_unpadded_corrected_with_sum_norm_is_compat_at_equal_fusion():
    """Attention fused against explicit, too. Compat clamps its parameter, corrected squashes it."""
    compat, corrected = build(profile="compat").double(), build(spectral_norm="sum").double()
    corrected.load_state_dict(compat.state_dict())
    with torch.no_grad():
        for one, other in zip(compat.trunk.blocks, corrected.trunk.blocks, strict=True):
            f = one.spectral.theta.clamp(0, 0.5)
            other.spectral.theta.copy_(torch.log(f / (0.5 - f)))
    ids = tokens()
    one, other = compat(ids), corrected(ids)
    assert one.aux["fusion"] == pytest.approx(float(other.aux["fusion"]))
    for key, value in everything(one).items():
        close(everything(other)[key], value, 1e-10)


@pytest.mark.parametrize("pads", [1, 20, 148])
@pytest.mark.parametrize("changes", [{}, {"attention_impl": "explicit"}, {"norm_position": "pre"}])
def test_padding_changes_no_vector(changes, pads):
    """Acceptance test 2: every head within 1e-5 in fp32."""
    model = build(max_length=160, max_positions=160, **changes)
    text = tokens(2, 12)
    padded = torch.cat([text, tokens(2, pads, seed=9)], 1)
    mask = (torch.arange(12 + pads) < 12).long().expand(2, -1)
    alone, beside = everything(model(text)), everything(model(padded, attention_mask=mask))
    assert set(alone) == set(beside)
    for key, value in alone.items():
        close(beside[key], value)


def drift(pads, **changes):
    """Cosine of a 12-token text's semantic vector with that of the same text and `pads` padded tokens."""
    torch.manual_seed(0)
    cfg = {"hidden_size": 256, "num_layers": 6, "num_heads": 4, "ffn_inner": 256, "spectral_dim": 64,
           "max_length": 160, "max_positions": 160, "sem_dims": (256, 128)}
    model = build(spread=False, **{**cfg, **changes})
    text = tokens(1, 12)
    mask = (torch.arange(12 + pads) < 12).long()[None]
    with torch.no_grad():
        padded = model(torch.cat([text, torch.zeros(1, pads, dtype=torch.long)], 1), attention_mask=mask)
        return float((padded.heads["semantic_256"] * model(text).heads["semantic_256"]).sum())


def test_padding_moves_the_published_embedding_and_not_the_corrected_one():
    """W1: there an embedding depends on the length of its neighbours in the batch, more so the more it is padded."""
    published = [drift(pads, profile="compat") for pads in (20, 148)]
    assert published[0] < 0.9 and published[1] < published[0] - 0.1
    assert all(drift(pads) > 1 - 1e-6 for pads in (20, 148))


def test_enrichment_is_inert_on_padded_text_in_the_published_form_only():
    """W2: the weight of the rounds changes the vector of a text alone, and of a padded one only as corrected."""
    moved: dict[str, float] = {}
    for profile in ("compat", "corrected"):
        results = []
        for w in (0.0, 2.0):
            model = build(profile=profile, spectral_norm="gate", attention_impl="explicit")
            with torch.no_grad():
                for b in model.trunk.blocks:
                    b.attention.w_frac.fill_(w)
            mask = (torch.arange(T) < 12).long().expand(3, -1)
            results.append(model(tokens(), attention_mask=mask).heads["semantic_48"].detach())
        moved[profile] = float((results[0] - results[1]).abs().max())
    assert moved["compat"] < 1e-3 < 0.02 < moved["corrected"]


def test_outer_vectors_have_length_one_and_the_score_its_range():
    model = build()
    out = model(tokens())
    assert list(out.heads) == ["semantic_48", "semantic_32", "semantic_16", "entity_24", "entity_12", "anchor_8",
                               "retrieval_16", "ranking_64"]
    assert out.default == "semantic_48"
    for name, vectors in out.heads.items():
        assert vectors.shape == (3, int(name.rpartition("_")[2])) and vectors.dtype == torch.float32
        close(vectors.norm(dim=1), torch.ones(3))
    assert (out.aux["anomaly_score"] > 0).all() and (out.aux["anomaly_score"] <= 0.5).all()
    assert build(enable_semantic=False).default_head == "ranking_64"


def test_fusion_begins_at_its_weight_and_stays_in_its_range():
    for profile in ("corrected", "compat"):
        model = build(spread=False, profile=profile)
        assert float(model(tokens()).aux["fusion"]) == pytest.approx(0.1, abs=1e-7)
    for theta, f in ((-100.0, 0.0), (100.0, 0.5)):
        for block in model.trunk.blocks:
            torch.nn.init.constant_(block.spectral.theta, theta)
        assert float(model(tokens()).aux["fusion"]) == pytest.approx(f)
    assert build(spread=False).trunk.blocks[0].spectral.theta.item() == pytest.approx(-1.386294, abs=1e-6)
    assert float(model(tokens()).aux["w_frac"]) == pytest.approx(0.02)


@pytest.mark.parametrize("changes", [{}, {"fractal_depth": 2}, {"task": "masked_lm"}, {"norm_position": "pre"}])
def test_checkpointing_changes_no_gradient_with_dropout_on(changes):
    """Recomputed blocks draw the same dropout."""
    grads = []
    for checkpointing in (False, True):
        model = build(BuildContext(seed=1, activation_checkpointing=checkpointing), dropout=0.3, **changes).train()
        torch.manual_seed(11)
        out = model(tokens(), labels=tokens(seed=2)) if "task" in changes else model(tokens())
        loss = out.nll_sum if isinstance(out, LMOutput) else sum(h.sum() for h in out.heads.values())
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == checkpointing
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [*CASES.values(), {"profile": "compat"}, {"task": "masked_lm"}])
def test_every_parameter_is_used(changes):
    model = build(**changes).train()
    out = model(tokens(), labels=tokens(seed=2)) if "task" in changes else model(tokens())
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    heads = {} if isinstance(out, LMOutput) else out.heads
    loss = sum(((h * weights[:h.shape[1]]).sum() for h in heads.values()), start=out.nll_sum if not heads else 0)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if "key.bias" not in name:  # softmax does not see what all logits of a row share
            assert p.grad.any(), name


@pytest.mark.parametrize(("changes", "gone"), [
    ({"use_spectral": False}, ".spectral.theta"), ({"enable_anchor64": False}, "heads.anchor"),
    ({"enable_entity": False}, "heads.entity"), ({"enable_semantic": False}, "heads.semantic"),
    ({"learnable_fractal": False}, "w_frac"), ({"fractal_depth": 0}, "w_frac"),
    ({"learnable_spectral_fusion": False}, "theta")])
def test_what_is_switched_off_has_no_parameters(changes, gone):
    assert any(gone in name for name, _ in build().named_parameters())
    model = build(**changes)
    assert not any(gone in name for name, _ in model.named_parameters())
    assert sum(p.numel() for p in model.parameters()) == config(**changes).parameter_count().total
    if "use_spectral" in changes:
        out = model(tokens())
        assert "attn_entropy" not in out.aux and out.aux["spectral"].shape == (3, 12)


@pytest.mark.parametrize("profile", ["corrected", "compat"])
def test_initial_weights_are_as_the_profile_says(profile):
    cfg = {"hidden_size": 128, "num_layers": 8, "num_heads": 2, "ffn_inner": 256, "spectral_dim": 64, "vocab_size": 500,
           "profile": profile}
    model = build(spread=False, **cfg)
    for name, p in model.named_parameters():
        if "norm." in name:
            assert set(p.unique().tolist()) == {1.0 if name.endswith("weight") else 0.0}, name
        elif name.endswith(("tokens.weight", "positions.weight")) and profile == "compat":
            assert p.std().item() == pytest.approx(1, rel=0.05)
        elif name.endswith("basis"):
            assert p.std().item() == pytest.approx(0.02, rel=0.1)
        elif name.endswith("weight") and profile == "compat":
            assert p.std().item() == pytest.approx((3 * p.shape[1])**-0.5, rel=0.12), name
        elif name.endswith("weight"):
            residual = ("attention.output", "blocks", "spectral.output", "down")
            small = "blocks" in name and any(part in name for part in residual if part != "blocks")
            std = 0.02 / 4 if small else 0.02  # sqrt(2 x 8 layers)
            assert p.abs().max().item() <= 2 * std + 1e-7, name
            assert p.std().item() == pytest.approx(0.88 * std, rel=0.12), name  # what two sigma leave of it
        elif name.endswith("bias") and profile == "corrected":
            assert not p.any(), name
    assert model.trunk.blocks[0].attention.w_frac.tolist() == pytest.approx([0.02])


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = build(BuildContext(seed=4), spread=False).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    second = build(BuildContext(seed=4), spread=False).state_dict()
    third = build(BuildContext(seed=5), spread=False).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], third[k]) for k in first)


@pytest.mark.parametrize("changes", [{}, {"profile": "compat"}, {"learnable_fractal": False, "use_spectral": False},
                                     {"task": "masked_lm"}])
def test_save_and_load_keep_every_bit(changes, tmp_path):
    model = build(**changes)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(loaded) is type(model) is (SpectraForMaskedLM if "task" in changes else SpectraModel)
    assert AutoConfig.from_pretrained(tmp_path).sem_dims == (48, 32, 16)
    one, other = model(tokens()), loaded(tokens())
    assert all(torch.equal(one.heads[name], other.heads[name]) for name in one.heads)
    if "task" in changes:
        again = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_gates_pass():
    for changes in ({}, {"task": "masked_lm"}, {"norm_position": "pre"}):
        model = build(spread=False, **changes)
        results = run_gates(model, vocab_size=V, seq_len=32, seed=0, device=torch.device("cpu"))
        assert len(results) == (3 if "task" in changes else 2)
        assert all(r.passed for r in results), results


def test_texts_longer_than_trained_positions_are_refused():
    with pytest.raises(ValueError, match="input of 72 tokens, but max_length is 64"):
        build()(tokens(1, 72))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\)"):
        build()(tokens(), attention_mask=torch.ones(2, 3))


def test_bf16_follows_fp32():
    wide = build(spread=False)
    narrow = copy.deepcopy(wide).bfloat16()
    mask = torch.arange(T) < torch.tensor([[T], [15], [4]])
    a, b = (m(tokens(), attention_mask=mask) for m in (wide, narrow))
    for name in a.heads:
        assert b.heads[name].dtype == torch.float32
        assert ((a.heads[name] * b.heads[name]).sum(1) > 0.999).all(), name


def test_masked_lm_sums_and_documents():
    model = build(task="masked_lm")
    labels = tokens(seed=2)
    labels[:, ::3] = -100
    mask = (torch.arange(T) < 20).long().expand(3, -1)
    out = model(tokens(), labels=labels, attention_mask=mask, return_logits=True)
    want = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(out.nll_sum, want)
    assert out.n_tokens == (labels != -100).sum()
    documents = (torch.arange(T) > 9).long().expand(3, T)
    together = model(tokens(), document_ids=documents).aux["token_states"]
    close(together[:, 10:], model(tokens()[:, 10:]).aux["token_states"])
    close(together[:, :10], model(tokens()[:, :10]).aux["token_states"])


@pytest.mark.parametrize("task", ["embed", "masked_lm"])
def test_weights_of_linear_layers_decay_and_nothing_else(task):
    model = build(task=task)
    groups = {g.name: g for g in FAMILY.parameter_groups(model, OptimConfig(weight_decay=0.05))}
    assert groups["decay"].weight_decay == 0.05 and groups["no_decay"].weight_decay == 0
    decayed = {id(p) for p in groups["decay"].params}
    for name, p in model.named_parameters():
        spared = ("bias", "norm.", "w_frac", "theta", "basis", "tokens.weight", "positions.weight")
        assert (id(p) in decayed) != any(part in name for part in spared), name
    assert sum(len(g.params) for g in groups.values()) == len(list(model.parameters()))
    (all_of_them,) = FAMILY.parameter_groups(build(task=task, profile="compat"), OptimConfig(weight_decay=0.05))
    assert all_of_them.weight_decay == 0.05 and len(all_of_them.params) == len(list(model.parameters()))


class Start:
    """What a family's hook sees before the engine starts, without one."""

    def __init__(self, model, weights):
        self.model, self.held, self.asked = model, weights, []

    def weights(self, source, key):
        self.asked.append((str(source), key))
        return self.held

    def full_parameter(self, name, write=None):
        with torch.no_grad():
            self.model.get_parameter(name).copy_(write)


def test_a_trunk_is_taken_from_a_masked_lm_and_a_misfit_is_named():
    teacher, pupil = build(task="masked_lm"), build(spread=False)
    heads = {name: value.clone() for name, value in pupil.heads.state_dict().items()}
    held = {name: p.detach() for name, p in teacher.named_parameters()}
    start = Start(pupil, held)
    SpectraHooks("runs/teacher").before_engine(start)
    assert start.asked == [("runs/teacher", "model.trunk_init")]
    assert all(torch.equal(value, pupil.trunk.state_dict()[name]) for name, value in teacher.trunk.state_dict().items())
    assert all(torch.equal(value, pupil.heads.state_dict()[name]) for name, value in heads.items())
    del held["trunk.norm.bias"]
    with pytest.raises(UserError, match=r"model.trunk_init: runs/teacher holds no trunk.norm.bias: it is of another"):
        SpectraHooks("runs/teacher").before_engine(start)
    held["trunk.norm.bias"] = torch.zeros(7)
    with pytest.raises(UserError, match=r"trunk.norm.bias is \(7,\) in runs/teacher, the model's is \(32,\)"):
        SpectraHooks("runs/teacher").before_engine(start)
    SpectraHooks("scratch").before_engine(Start(pupil, {}))
