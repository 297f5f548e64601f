"""Spectra written out from the formulas, one text at a time, in fp64: the reference of its tests.

It reads a state dict by the names of weights and shares no code with the model.
"""

from __future__ import annotations

import math

import torch


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w, name, x):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def unit(x):
    return x / max(float(x.norm()), 1e-6)


def softmax(x):
    e = (x - x.max()).exp()
    return e / e.sum()


def attention(w, cfg, at, x, real):
    """x [S, H], real [S] bools -> [S, H] before the output projection's input dropout."""
    heads, s = cfg.num_heads, len(x)
    hd = cfg.hidden_size // heads
    q, k, v = (linear(w, f"{at}.attention.{n}", x) for n in ("query", "key", "value"))
    out = torch.zeros_like(q)
    for h in range(heads):
        cols = slice(h * hd, (h + 1) * hd)
        a = q[:, cols] @ k[:, cols].T / math.sqrt(hd)
        if cfg.profile == "compat":
            a = a + torch.where(real, 0.0, -10000.0)[None, :]
        for d in range(cfg.fractal_depth):
            weight = w[f"{at}.attention.w_frac"][d]
            seen = a if cfg.profile == "compat" else a * real[:, None] * real[None, :]
            gram = seen @ seen.T
            a = a + weight * torch.stack([row / max(float(row.norm()), 1e-6) for row in gram])
        for i in range(s):
            if cfg.profile == "compat":
                p = softmax(a[i])
            else:
                p = torch.zeros(s, dtype=x.dtype)
                p[real] = softmax(a[i][real])
            out[i, cols] = p @ v[:, cols]
    return linear(w, f"{at}.attention.output", out)


def spectral(w, cfg, at, x, real):
    """(f sy, mean row entropy over real tokens)."""
    q, k, v = (linear(w, f"{at}.spectral.{n}", x) for n in ("query", "key", "value"))
    g = torch.sigmoid(q @ k.T / math.sqrt(cfg.spectral_dim)) ** 2
    seen = g * real[None, :]
    weights = {"gate": seen / seen.sum(1, keepdim=True), "mean": seen / real.sum(), "sum": g}[cfg.spectral_norm]
    shares = weights * real[None, :]
    shares = shares / shares.sum(1, keepdim=True)
    logs = torch.where(shares > 0, shares.clamp_min(1e-300).log(), 0.0)
    entropy = -(shares * logs).sum(1) / math.log(max(int(real.sum()), 2))
    y = linear(w, f"{at}.spectral.output", weights @ v)
    if cfg.spectral_entropy_gate:
        y = y * (1 - entropy)[:, None]
    theta = w[f"{at}.spectral.theta"]
    f = theta.clamp(0, cfg.fusion_max) if cfg.profile == "compat" else cfg.fusion_max / (1 + (-theta).exp())
    return f * y, entropy[real].mean()


def block(w, cfg, number, x, real):
    at = f"trunk.blocks.{number}"
    pre = cfg.norm_position == "pre"
    inside = norm(w, f"{at}.attention_norm", x) if pre else x
    z = attention(w, cfg, at, inside, real)
    entropy = None
    if cfg.use_spectral:
        sy, entropy = spectral(w, cfg, at, inside, real)
        z = z + sy
    x = x + z if pre else norm(w, f"{at}.attention_norm", x + z)
    inside = norm(w, f"{at}.ffn_norm", x) if pre else x
    gate = linear(w, f"{at}.ffn.gate", inside)
    y = linear(w, f"{at}.ffn.down", gate * torch.sigmoid(gate) * linear(w, f"{at}.ffn.up", inside))
    return (x + y if pre else norm(w, f"{at}.ffn_norm", x + y)), entropy


def trunk(w, cfg, ids, real):
    """[S, H] states of one text, padded or not, and the mean entropy over layers."""
    x = w["trunk.tokens.weight"][ids] + w["trunk.positions.weight"][:len(ids)]
    entropies = []
    for number in range(cfg.num_layers):
        x, entropy = block(w, cfg, number, x, real)
        entropies.append(entropy)
    mean = torch.stack(entropies).mean() if cfg.use_spectral else None
    return norm(w, "trunk.norm", x), mean


def text_vectors(state, cfg, ids, real=None):
    """Every head and auxiliary tensor of one text: ids [S], real [S] bool (None: all)."""
    w = {name: value.double() for name, value in state.items()}
    real = torch.ones(len(ids), dtype=torch.bool) if real is None else real
    states, entropy = trunk(w, cfg, ids, real)
    mean = states[real].mean(0)
    pooled = mean if cfg.pooling == "mean" else states[0]
    found = {"pooled": pooled, "last_hidden_state": states}
    if entropy is not None:
        found["attn_entropy"] = entropy
    for name, wanted, widths in (("semantic", cfg.enable_semantic, cfg.sem_dims),
                                 ("entity", cfg.enable_entity, cfg.ent_dims)):
        if wanted:
            whole = unit(norm(w, f"heads.{name}.norm", linear(w, f"heads.{name}.project", pooled)))
            found |= {f"{name}_{d}": unit(whole[:d]) for d in widths}
    if cfg.enable_anchor64:
        anchor = norm(w, "heads.anchor.norm", linear(w, "heads.anchor.project", pooled))
        found[f"anchor_{cfg.anchor_dim}"] = unit(anchor)
    inner = gelu(linear(w, "heads.retrieval.inner", pooled))
    found[f"retrieval_{cfg.retrieval_dim}"] = unit(linear(w, "heads.retrieval.outer", inner))
    return found | ranking(w, cfg, mean if cfg.profile == "compat" else pooled)


def ranking(w, cfg, pooled):
    at = "heads.ranking"
    wide = norm(w, f"{at}.widen_norm", gelu(linear(w, f"{at}.widen", pooled)))
    a = norm(w, f"{at}.inner_norm", gelu(linear(w, f"{at}.inner", wide)))
    sp = norm(w, f"{at}.spectral_norm", linear(w, f"{at}.spectral", torch.tanh(linear(w, f"{at}.narrow", a))))
    score = 1 - torch.sigmoid((w[f"{at}.basis"] @ a).abs().max())
    joined = linear(w, f"{at}.output", torch.cat([score * a, sp]))
    return {f"ranking_{cfg.ranking_dim}": unit(norm(w, f"{at}.output_norm", joined)), "anomalous": a, "spectral": sp,
            "anomaly_score": score}
