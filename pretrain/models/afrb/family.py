"""The record of the AFRB family: groups, what happens before and during training, what is looked at."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pretrain.config.needle import NeedleConfig
from pretrain.config.run import OptimConfig, RunConfig
from pretrain.models.afrb.calibration import fit_readout, set_readout, set_scale, whiten_tables
from pretrain.models.afrb.model import AFRBForCausalLM, hf_config
from pretrain.models.afrb.ridge import RidgeFit
from pretrain.models.afrb.schema import AFRBConfig
from pretrain.models.afrb.weights import load_backbone
from pretrain.models.base import BuildContext, Diagnosis, EngineStartContext, Family, Hooks, ParamGroup
from pretrain.models.build import build_seeded
from pretrain.models.groups import decay_groups

_NO_CALIBRATION = 0.01
_STILL = 1e-6
_HALF_ULP = 2.0**-24
_log = logging.getLogger("pretrain")


def build(cfg: AFRBConfig, ctx: BuildContext) -> PreTrainedModel:
    """A model with fresh weights; those of `backbone.weights` are read before the first step (`AFRBHooks`)."""
    return build_seeded(AFRBForCausalLM, hf_config(cfg, document_masking=ctx.document_masking), ctx)


def parameter_groups(model: PreTrainedModel, optim: OptimConfig) -> list[ParamGroup]:
    """Matrices decay; vectors, scalars, frequencies and the readout map, which may be frozen, do not.

    Frequencies have no momentum, which would move them in the steps between their updates too. A backbone that is
    trained has its own matrices and embeddings.
    """
    assert isinstance(model, AFRBForCausalLM)
    cfg = model.schema
    groups = {
        "matrices": ParamGroup("matrices", [], weight_decay=optim.weight_decay),
        "vectors": ParamGroup("vectors", []),
        "readout": ParamGroup("readout", []),
        "scalars": ParamGroup("scalars", [], lr_scale=cfg.scalar_lr_scale),
        "omega": ParamGroup("omega", [], lr_scale=cfg.adaptive_omega_lr / optim.lr, betas=(0.0, optim.betas[1])),
    }
    of_backbone = {"decay": "matrices", "no_decay": "vectors"}
    for group in decay_groups(model.backbone, optim.weight_decay):
        groups[of_backbone[group.name]].params.extend(group.params)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("backbone."):
            groups[_group(name, parameter)].params.append(parameter)
    return [group for group in groups.values() if group.params]


def _group(name: str, parameter: torch.nn.Parameter) -> str:
    if name.endswith("omega.change"):
        return "omega"
    if name.endswith(".change"):
        return "scalars"
    if name.endswith(".project"):
        return "readout"
    return "matrices" if len(getattr(parameter, "ds_shape", parameter.shape)) >= 2 else "vectors"


class AFRBHooks(Hooks):
    """Weights of the backbone, whitened tables and calibration before the first step; ramps and freezing during it."""

    def __init__(self, config: RunConfig) -> None:
        assert isinstance(config.model, AFRBConfig)
        self.cfg = config.model
        self.fresh = config.train.init_from is None
        self.fit: RidgeFit | None = None
        for note in self.cfg.notes():
            _log.warning("%s", note)
        source = config.data.source
        if self.cfg.vector_pvm and isinstance(source, NeedleConfig):
            kept = self.cfg.pvm_beta ** source.min_distance
            if kept < _HALF_ULP:
                _log.warning("model.pvm_beta %g: of the nearest needle, %d tokens back, a state keeps %.1g, less than "
                             "fp32 can tell; a state holds the last %d tokens", self.cfg.pvm_beta, source.min_distance,
                             kept, math.floor(math.log(_HALF_ULP) / math.log(self.cfg.pvm_beta)))

    def before_engine(self, ctx: EngineStartContext) -> None:
        """Everything of a model that comes neither from a seed nor from training."""
        model = ctx.model
        assert isinstance(model, AFRBForCausalLM)
        if self.cfg.backbone.weights and (self.fresh or ctx.missing):
            count = load_backbone(model, Path(self.cfg.backbone.weights), ctx.full_parameter,
                                  only=None if self.fresh else ctx.missing)
            _log.info("backbone: %d tensors from %s", count, self.cfg.backbone.weights)
        if self.cfg.readout_from == "none":
            return
        was_training = model.training
        model.eval()
        with ctx.gathered_in_use():
            whiten_tables(model)
            if model.memory is not None and self.cfg.pvm_scale is None and self.fresh:
                _log.info("pvm: logits start at scale %.3g", set_scale(model, ctx))
            if self.cfg.kiss_ridge_calib and (self.cfg.kiss_ridge_force or not bool(model.calibrated)):
                self.fit = fit_readout(model, ctx)
        if self.fit is not None:
            set_readout(model, ctx, self.fit)
            if not self.fit.r2_heldout >= _NO_CALIBRATION:
                _log.warning("[DIAG:K1] R2 of %.4f on held-out pairs | calibration carries no information",
                             self.fit.r2_heldout)
        model.train(was_training)

    def supplies(self, name: str) -> bool:
        """Attention that the run of `train.init_from` was trained without comes from the backbone's own weights."""
        return self.cfg.backbone.weights is not None and name.startswith("backbone.")

    def measured(self) -> dict[str, float]:
        """The fit of the readout map."""
        if self.fit is None:
            return {}
        return {"ridge/pairs": self.fit.pairs, "ridge/lambda": self.cfg.kiss_ridge_l2, "ridge/rank": self.fit.rank,
                "ridge/r2_train": self.fit.r2_train, "ridge/r2_heldout": self.fit.r2_heldout}

    def controls(self, step: int) -> dict[str, float]:
        """Ramps of the blocks, and which late parts are trained at this step."""
        cfg = self.cfg
        found = {f"rho_{i + 1}": _ramp(step - i * cfg.block_warm_delta, cfg.block_ramp) for i in range(cfg.n_afrb)}
        if cfg.phase_delta:
            found["phase_ramp"] = _ramp(step, cfg.phase_ramp)
        if cfg.kiss_ridge_calib:
            found["pvm2emb_trained"] = float(0 < cfg.kiss_ridge_unfreeze_step <= step)
        if cfg.freeze_readout_steps:
            found["query_trained"] = float(step >= cfg.freeze_readout_steps)
        if cfg.adaptive_omega:
            found["omega_trained"] = float(step % cfg.adaptive_omega_interval == 0)
        return found


def _ramp(step: int, length: int) -> float:
    return min(1.0, max(0.0, step / length)) if length else float(step >= 0)


def diagnostics(model: PreTrainedModel, metrics: Mapping[str, float]) -> list[Diagnosis]:
    """Rules of the specification's section 17 that need a row of metrics only."""
    return list(_findings(metrics))


def _findings(metrics: Mapping[str, float]) -> Iterator[Diagnosis]:
    coherence, norm = metrics.get("val/phase_coherence"), metrics.get("val/pvm_memory_norm")
    gate, moved = metrics.get("val/pvm_gate_strength"), metrics.get("val/pvm_gate_delta")
    if coherence is not None and coherence < 0.7:
        yield Diagnosis("C1", f"phase coherence {coherence:.2f} is low (it is no measure of quality)",
                        "alpha 0.02, omega 6.5, lr 5e-5, grad_clip 0.5")
    if coherence is not None and coherence >= 0.99 and "val/gamma_saturation" in metrics:  # some block has a phase
        yield Diagnosis("C2", f"phase coherence {coherence:.3f}: hidden states have collapsed onto one direction",
                        "a lower learning rate, or a smaller layerscale_init")
    if norm is not None and norm > 1.5:
        yield Diagnosis("M1", f"memory norm {norm:.2f} of what is written", "pvm_beta 0.80, pvm_alpha 0.2, t2_enable "
                        "true, lr 5e-5")
    if norm is not None and abs(norm) < 0.02:
        yield Diagnosis("M2", f"memory norm {norm:.3f}: writes vanish", "look at the learned write strength and at the "
                        "padding mask")
    if moved is not None and metrics.get("step", 0) >= 200 and abs(moved) < _STILL:
        yield Diagnosis("G1", f"the memory's gate has moved by {abs(moved):.1g} in {metrics['step']:.0f} steps",
                        "it is frozen, or its updates are rounded away: train in fp32 or raise scalar_lr_scale")
    if gate is not None and gate > 0.5:
        yield Diagnosis("G2", f"the memory's gate is at {gate:.2f}: memory dominates the block",
                        "a lower pvm_gate_init")


CSV_COLUMNS = (
    "step", "train_loss=loss", "val_loss=val/loss", "lr", "grad_norm", "needle_hit_rate=val/needle_hit_rate",
    "needle_hit_rate_topk=val/needle_hit_rate_topk", "needle_exact_match=val/needle_exact_match",
    "avg_correct_tokens_per_needle=val/avg_correct_tokens_per_needle", "phase_coherence=val/phase_coherence",
    "pvm_gate_strength=val/pvm_gate_strength", "pvm_memory_norm=val/pvm_memory_norm", "entropy_flow=val/entropy_flow",
    "gamma_saturation=val/gamma_saturation", "lm_loss", "infonce_loss", "infonce_acc",
    "needle_hit_rate_tf=val/needle_hit_rate_tf", "needle_echo_rate=val/needle_echo_rate",
    "tokens_per_s=tokens_per_second", "max_mem_gb=device_memory_gb")
"""Columns of metrics.csv in the specification's order (section 12): `name=key` shows the row's `key` as `name`."""

FAMILY = Family(
    name="afrb",
    schema=AFRBConfig,
    build=build,
    parameter_groups=parameter_groups,
    objectives=frozenset({"causal_lm", "needle"}),
    hooks=AFRBHooks,
    diagnostics=diagnostics,
    csv_columns=CSV_COLUMNS,
)
