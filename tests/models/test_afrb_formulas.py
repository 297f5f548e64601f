"""Blocks, memories and readouts equal the specification's formulas, written out a token at a time."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.models.afrb.calibration import whiten_tables
from tests.models.afrb_small import MATRIX, VECTOR, T, V, build, open_up, tokens, whole_table


def turn(x, angle):
    """R(angle) x for one vector, by complex multiplication of its halves."""
    half = len(x) // 2
    z = torch.complex(x[:half], x[half:2 * half]) * cmath.exp(1j * angle)
    return torch.cat([z.real, z.imag, x[2 * half:]])


def theta(cfg, index, t):
    return (cfg.omega + index * cfg.omega_delta) * math.log(1 + t) + index * cfg.phase_delta


def pvm_by_hand(cfg, index, values, scale):
    """States of the vector memory for values [T, D]."""
    state, states = torch.zeros_like(values[0]), []
    for t, v in enumerate(values):
        beta, angle = cfg.pvm_beta, theta(cfg, index, t)
        if cfg.t2_enable and cfg.t2_mode == "exp":
            beta *= math.exp(-1 / cfg.t2_steps)
        elif cfg.t2_enable:
            now, before = (math.exp(-cfg.t2_k * s) * (1 + cfg.t2_alpha * math.sin(
                cfg.t2_omega * math.log1p(s) + cfg.t2_phi)) for s in (t, max(t - 1, 0)))
            beta *= min(1.0, max(0.0, now / before)) if t else 1.0
        early = cfg.pvm_order == "rotate_then_accumulate"
        state = beta * state + cfg.pvm_alpha * scale * (turn(v, angle) if early else v)
        states.append(state if early else turn(state, angle))
    return torch.stack(states)


def blocks_by_hand(model, x):
    """(output, traces) of all blocks for x [T, D]."""
    cfg, traces = model.schema, []
    for index, block in enumerate(model.afrb_adapters):
        out = []
        u = F.layer_norm(x, x.shape[1:], block.norm_in.weight, block.norm_in.bias, 1e-5)
        value, gate = (u @ block.mixer.weight.T + block.mixer.bias).chunk(2, -1)
        g = value * torch.sigmoid(gate)
        if block.pvm is not None:
            traces.append(pvm_by_hand(cfg, index, g, float(block.pvm.scale_in())))
            g = g + torch.sigmoid(block.kappa()) * traces[-1]
        alpha = cfg.alpha * math.exp(-cfg.cascade_lambda * index)
        for t in range(len(x)):
            angle = theta(cfg, index, t)
            if cfg.phase_mode == "rotate":
                e = (1 - alpha) * u[t] + alpha * turn(u[t], angle)
            else:
                p = block.embed.weight @ torch.tensor([math.cos(angle), math.sin(angle)]) + block.embed.bias
                e = (1 - alpha) * u[t] + alpha * p
            z = g[t] + torch.sigmoid(block.gamma()) * e
            y = F.layer_norm(z, z.shape, block.norm_out.weight, block.norm_out.bias, 1e-5)
            out.append(x[t] + block.scale * y)
        x = torch.stack(out)
    return x, traces


BLOCKS = {
    "rotate": {"n_afrb": 2, "omega_delta": 0.5, "phase_delta": 0.3, "cascade_lambda": 0.4, **VECTOR},
    "embed, original order": {"phase_mode": "embed", "alpha": 0.9, "pvm_order": "accumulate_then_rotate", **VECTOR},
    "t2": {"t2_enable": True, "t2_steps": 6.0, **VECTOR},
    "resonant t2": {"t2_enable": True, "t2_mode": "resonant", "t2_k": 0.05, "t2_alpha": 0.5, **VECTOR},
}


@pytest.mark.parametrize("mode", BLOCKS)
@torch.no_grad()
def test_blocks_and_vector_memory(mode):
    model = open_up(build(BLOCKS[mode]))
    found = model(tokens(), diagnostics=True).diagnostics
    for row in range(2):
        hidden, traces = blocks_by_hand(model, found["embeddings"][row])
        torch.testing.assert_close(found["adapted"][row], hidden, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["traces"][:, row], torch.stack(traces), rtol=1e-4, atol=1e-6)


def query_by_hand(model, hidden, t):
    window = range(max(0, t - model.schema.readout_window + 1), t + 1)
    weights = torch.full((len(window),), 1 / len(window))
    if model.schema.needle_query_mode == "phase_weighted":
        moves = [(hidden[s] - hidden[s - 1]).norm() if s else torch.tensor(0.0) for s in window]
        weights = (torch.stack(moves) / 0.5).softmax(0)
    mean = (weights[:, None] * hidden[list(window)]).sum(0)
    if model.readout.query is not None:
        mean = model.readout.query(mean, 1.0)
    return F.normalize(mean, dim=0)


READOUTS = {
    "trace": {"n_afrb": 2, **VECTOR},
    "top 3": {"readout_topk": 3, "needle_query_mode": "phase_weighted", "readout_window": 5, **VECTOR},
    "window": {"readout_mode": "window:7", "needle_query_mode": "learned", **VECTOR},
    "state": {"readout_mode": "state", "n_afrb": 2, "phase_delta": 0.3, **VECTOR},
}


@pytest.mark.parametrize("mode", READOUTS)
@torch.no_grad()
def test_vector_readouts(mode):
    """q, softmax over the visible states, mean over blocks, norm sqrt(D), logits W_out (h + scale P r)."""
    model = open_up(build(READOUTS[mode], readout_scale=2.0))
    cfg, ids = model.schema, tokens()
    out = model(ids, diagnostics=True, return_logits=True)
    found = out.diagnostics
    table = whole_table(model.get_output_embeddings())
    for row in range(2):
        hidden, traces = found["hidden"][row], found["traces"][:, row]
        for t in range(T):
            parts = []
            for index, states in enumerate(traces):
                if cfg.readout_mode == "state":
                    parts.append(turn(states[t], -(theta(cfg, index, t) + float(model.readout.turn_back()))))
                    continue
                first = max(0, t - cfg.history + 1) if cfg.history else 0
                seen = states[first:t + 1]
                scores = F.cosine_similarity(query_by_hand(model, hidden, t)[None], seen, dim=-1)
                scores = scores / model.readout.log_tau().exp()
                if cfg.readout_topk and len(scores) > cfg.readout_topk:
                    scores[scores < scores.topk(cfg.readout_topk).values[-1]] = -math.inf
                parts.append(scores.softmax(0) @ seen)
            r = torch.stack(parts).mean(0)
            r = r / r.norm() * math.sqrt(len(r))
            torch.testing.assert_close(found["readout"][row, t], r, rtol=2e-3, atol=2e-4)
            said = model.readout.project @ found["readout"][row, t]
            torch.testing.assert_close(out.logits[row, t], table @ (hidden[t] + 2 * said), rtol=1e-4, atol=1e-4)


MEMORIES = {
    "plain": {**MATRIX},
    "decay, log clock": {"pvm_beta": 0.9, "pvm_phase_clock": "log", "pvm_omega_mode": "scalar", **MATRIX},
    "delta": {"pvm_rule": "delta", "pvm_delta_rate": 0.4, "pvm_address_decay": 0.7, **MATRIX},
    "content": {"pvm_phase_clock": "content", "pvm_content_frequencies": 12, **MATRIX},
    "gated": {"pvm_write_gate": True, "pvm_gate_taps": 5, **MATRIX},
    "gated delta": {"pvm_rule": "delta", "pvm_write_gate": True, "pvm_gate_taps": 5, "pvm_gate_marks": 6,
                    **MATRIX},
    "gated linear attention": {"pvm_rule": "gated", "pvm_fade_init": 0.5, **MATRIX},
    "stepped": {"pvm_read": "step", "pvm_address_taps": 5, "pvm_query_taps": 2, **MATRIX},
}


def address_by_hand(cfg, embedded, t, taps, turns):
    total = torch.zeros(cfg.pvm_dk)
    for back in range(min(taps, t + 1)):
        angle = turns * back
        if cfg.pvm_phase_clock == "log":
            angle = turns * (math.log1p(t) - math.log1p(t - back))
        half = cfg.pvm_dk // 2
        z = torch.complex(embedded[t - back, :half], embedded[t - back, half:]) * torch.exp(1j * angle)
        total = total + cfg.pvm_address_decay ** back * torch.cat([z.real, z.imag])
    return F.normalize(total, dim=0)


def gate_by_hand(gate, u, t):
    """How much of token t is written."""
    if gate.marks is not None:
        u = F.gelu(u @ gate.marks.T)
    mixed = sum(gate.conv[back] * u[t - back] for back in range(min(gate.taps, t + 1)))
    return torch.sigmoid(gate.weight @ F.gelu(mixed) + gate.bias())


@pytest.mark.parametrize("mode", MEMORIES)
@torch.no_grad()
def test_matrix_memory(mode):
    """Addresses, writes and reads of the research note's section 1, logits with whitened rows and their norms."""
    model = open_up(build(MEMORIES[mode]))
    whiten_tables(model)
    cfg, memory, ids = model.schema, model.memory, tokens()
    out = model(ids, return_logits=True)
    base = model(ids, return_logits=True, controls={"readout_off": 1.0}).logits
    inputs = whole_table(model.get_input_embeddings())
    outputs = whole_table(model.get_output_embeddings())
    white_in, white_out = memory.input_rows(inputs), memory.output_rows(outputs)
    features = (lambda a: a) if memory.phases is None else memory.phases
    for row in range(2):
        u = F.normalize(white_in[ids[row]], dim=-1) * math.sqrt(32)
        embedded = u @ memory.key.T
        state = torch.zeros(len(features(torch.zeros(16))), cfg.pvm_dv)
        for t in range(T):
            value = memory.value @ (F.normalize(white_out[ids[row, t]], dim=0) * math.sqrt(32))
            kept = cfg.pvm_beta
            if memory.fade is not None:
                fade = memory.fade
                kept = torch.sigmoid(fade.up @ fade.down @ u[t] + fade.bias)[:, None] ** (1 / 16)
            state = kept * state
            if t:
                written_at = features(address_by_hand(cfg, embedded, t - 1, cfg.pvm_address_taps, memory.turn))
                if cfg.pvm_rule == "delta":
                    value = cfg.pvm_delta_rate * (value - state.T @ written_at)
                if memory.gate is not None:
                    value = value * gate_by_hand(memory.gate, u, t)
                state = state + torch.outer(written_at, value)
            asked = address_by_hand(cfg, embedded, t, cfg.query_taps, memory.turn)
            if cfg.pvm_read == "step":
                first = address_by_hand(cfg, embedded, 0, cfg.query_taps, memory.turn)
                z = torch.complex(first[:8], first[8:]) * torch.exp(1j * memory.turn * t)
                asked = torch.cat([z.real, z.imag])
            read = F.normalize(state.T @ features(asked), dim=0)
            own = memory.log_scale().exp() * (white_out @ memory.project @ read) / white_out.norm(dim=-1)
            torch.testing.assert_close(out.logits[row, t] - base[row, t], own, rtol=1e-3, atol=2e-3)


@torch.no_grad()
def test_stationary_norm_of_the_vector_memory():
    """alpha / sqrt(1 - beta^2) = 0.57 of what is written, for independent inputs (spec, section 3)."""
    from pretrain.models.afrb.phase import token_layout
    model = build({**VECTOR}, backbone="llama")
    memory = model.afrb_adapters[0].pvm
    values = torch.randn(64, 300, 32, generator=torch.Generator().manual_seed(0))
    layout = token_layout(torch.zeros(64, 300), None, None, 0)
    trace, _ = memory(values, layout, 6 * torch.log1p(layout.positions.double())[..., None], None)
    ratio = trace.states[:, -1].norm(dim=-1).mean() / values.norm(dim=-1).mean()
    assert float(ratio) == pytest.approx(0.3 / math.sqrt(1 - 0.85**2), rel=0.03)


@torch.no_grad()
def test_whitening_makes_the_covariance_one_and_norms_even():
    model = build({**MATRIX})
    table = model.get_output_embeddings().weight
    table.mul_(torch.logspace(-0.5, 0.5, 32)).add_(3.0)  # a common mean and a spectrum of two decades
    whiten_tables(model)
    rows = model.memory.output_rows(table)
    covariance = rows.T @ rows / len(rows)
    assert float((covariance - torch.eye(32)).abs().max()) < 0.05  # the ridge leaves the weakest directions short
    assert float(rows.mean(0).abs().max()) < 1e-3
    torch.testing.assert_close(rows.norm(dim=-1) * model.memory.inverse_norms, torch.ones(V))
