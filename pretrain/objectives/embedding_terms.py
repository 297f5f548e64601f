"""From the named vectors of an encoder to a weighted sum of losses.

Which losses apply follows from the heads a model has: those of Spectra are known by their names (`semantic_WIDTH`,
`entity_`, `anchor_`, `retrieval_`, `ranking_`); any other encoder is trained by symmetric InfoNCE on its default head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pretrain.config.contrastive import ContrastiveConfig
from pretrain.models.base import EncoderOutput
from pretrain.objectives.embedding_losses import (
    Blocked,
    TripletIds,
    angular,
    bridge,
    entropy_reward,
    nce_of_queries,
    symmetric_nce,
    triplet,
)
from pretrain.ops.precision import wide
from pretrain.ops.unit import unit

ROLES = ("semantic", "entity", "anchor", "retrieval", "ranking")
DEFAULT, SPECTRAL = "default", "spectral"


@dataclass(frozen=True, slots=True)
class Layout:
    """How the vectors that losses need stand side by side in one row, so that they travel as one tensor."""

    columns: Mapping[str, tuple[int, int]]
    """Role -> first column and the one after the last."""
    heads: Mapping[str, str]
    """Role -> name of the head, of which a role has the widest."""
    prefixes: Mapping[str, tuple[int, ...]]
    """Role -> widths of its heads, falling."""

    @classmethod
    def of(cls, output: EncoderOutput) -> Layout:
        """The layout for a model with this output: all vectors of Spectra, or the default one."""
        assert output.heads is not None and output.default is not None and output.aux is not None
        widths: dict[str, dict[int, str]] = {}
        for name, vectors in output.heads.items():
            role, _, width = name.rpartition("_")
            if role in ROLES and width.isdigit() and vectors.shape[1] == int(width):
                widths.setdefault(role, {})[int(width)] = name
        if not {"retrieval", "ranking"} <= set(widths):
            widths = {DEFAULT: {output.heads[output.default].shape[1]: output.default}}
        prefixes = {role: tuple(sorted(found, reverse=True)) for role, found in widths.items()}
        sizes = {role: found[0] for role, found in prefixes.items()}
        # Without the spectral branch its regulariser is out, although the ranking head keeps its spectral vector.
        if DEFAULT not in widths and "attn_entropy" in output.aux:
            sizes[SPECTRAL] = output.aux[SPECTRAL].shape[1]
        columns, at = {}, 0
        for role, size in sizes.items():
            columns[role] = (at, at + size)
            at += size
        return cls(columns, {role: widths[role][found[0]] for role, found in prefixes.items()}, prefixes)

    def pack(self, output: EncoderOutput) -> Tensor:
        """[n, D] in fp32: a text's vectors in a row. The default head of other models is brought to length 1."""
        assert output.heads is not None and output.aux is not None
        parts = [wide(output.aux[SPECTRAL] if role == SPECTRAL else output.heads[self.heads[role]])
                 for role in self.columns]
        return torch.cat([unit(part) if role == DEFAULT else part
                          for role, part in zip(self.columns, parts, strict=True)], 1)


@dataclass(frozen=True, slots=True)
class Triplets:
    """A contrastive batch: packed vectors of queries and positives [B, D], of negatives [B, N, D], and their ids."""

    layout: Layout
    anchor: Tensor
    positive: Tensor
    negative: Tensor
    ids: TripletIds

    def of(self, role: str, width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(anchor, positive, negative) of a role; of its first `width` coordinates, at length 1 again."""
        start, stop = self.layout.columns[role]
        whole = tuple(side[..., start:stop] for side in (self.anchor, self.positive, self.negative))
        if width is None or width == stop - start:
            return whole[0], whole[1], whole[2]
        return unit(whole[0][..., :width]), unit(whole[1][..., :width]), unit(whole[2][..., :width])


@dataclass(frozen=True, slots=True)
class Scene:
    """What every loss of a batch is given."""

    texts: Triplets
    temperature: float
    blocked: Blocked


Loss = Callable[[Scene], Tensor]


@dataclass(frozen=True, slots=True)
class Term:
    """One member of the sum."""

    name: str
    weight: float
    loss: Loss


def scene(config: ContrastiveConfig, texts: Triplets, temperature: float) -> Scene:
    """The candidates of a batch, with those taken out that the config says."""
    return Scene(texts, temperature, Blocked(texts.ids, config.nce_hard_negatives, config.mask_false_negatives))


def terms(config: ContrastiveConfig, layout: Layout) -> list[Term]:
    """The losses that apply to a layout, each with its weight. Raises ValueError where weights and prefixes differ."""
    if DEFAULT in layout.columns:
        return [Term("nce", 1.0, partial(_nce, role=DEFAULT))]
    return [term for term in _spectra_terms(config, layout) if term.weight > 0]


def _spectra_terms(config: ContrastiveConfig, layout: Layout) -> Iterator[Term]:
    """Section 5 of the specification, in its order."""
    has = layout.columns
    if "semantic" in has and config.enable_semantic_nce:
        widths = layout.prefixes["semantic"]
        if len(widths) != len(config.loss_weight_sem):
            raise ValueError(f"objective.loss_weight_sem has {len(config.loss_weight_sem)} weights for the semantic "
                             f"widths {widths}")
        yield Term("semantic", 1.0, partial(_prefix_nce, role="semantic", widths=widths,
                                            weights=config.loss_weight_sem))
    if "anchor" in has:
        yield Term("anchor", config.loss_weight_anchor, partial(_nce, role="anchor"))
    if {"semantic", "entity"} <= set(has) and config.enable_bridge:
        yield Term("bridge", config.loss_weight_bridge, partial(_bridge, metric=config.bridge_metric,
                                                                stopgrad=config.bridge_stopgrad))
    nested = partial(_prefix_nce, role="ranking", widths=config.nested_dims, weights=config.nested_weights)
    ranking: Loss = nested if config.nested_ranking else partial(_nce, role="ranking")
    for name, role, weight, nce in (("fast", "retrieval", config.loss_weight_fast, partial(_nce, role="retrieval")),
                                    ("ranking", "ranking", config.loss_weight_ranking, ranking)):
        yield Term(name, weight, partial(_with_triplet, nce=nce, role=role, margin=config.triplet_margin))
    if config.enable_matry_angular:
        yield Term("angular", config.loss_weight_matryoshka, _angular)
    if SPECTRAL in has and config.spectral_reg != "off":
        yield Term("spectral", config.spectral_reg_weight, partial(_entropy, kind=config.spectral_reg))
    if "entity" in has:
        yield Term("entity", config.ent_nce_weight, partial(_nce, role="entity"))


def temperature(config: ContrastiveConfig, step: int, total_steps: int) -> float:
    """Temperature of the update after `step` applied ones of `total_steps`: held, then a cosine to its end."""
    hold = config.temperature_hold_ratio * total_steps
    if step < hold:
        return config.temperature_start
    done = min(1.0, (step - hold) / (total_steps - hold)) if total_steps > hold else 1.0
    fall = config.temperature_start - config.temperature_end
    return config.temperature_end + fall / 2 * (1 + math.cos(math.pi * done))


def accuracy(where: Scene) -> Tensor:
    """Share of queries whose own positive comes first among all candidates, by the vector that stands for a text."""
    role = next(role for role in (DEFAULT, "semantic", "ranking") if role in where.texts.layout.columns)
    with torch.no_grad():
        return nce_of_queries(*where.texts.of(role), where.temperature, where.blocked)[1]


def _nce(where: Scene, *, role: str, width: int | None = None) -> Tensor:
    return symmetric_nce(*where.texts.of(role, width), where.temperature, where.blocked)


def _prefix_nce(where: Scene, *, role: str, widths: tuple[int, ...], weights: tuple[float, ...]) -> Tensor:
    parts = [weight * _nce(where, role=role, width=width) for width, weight in zip(widths, weights, strict=True)]
    return torch.stack(parts).sum()


def _with_triplet(where: Scene, *, nce: Loss, role: str, margin: float) -> Tensor:
    return nce(where) + triplet(*where.texts.of(role), where.texts.ids.has_negative, margin)


def _angular(where: Scene) -> Tensor:
    texts = where.texts
    return angular(texts.of("retrieval"), texts.of("ranking"), texts.ids.has_negative)


def _bridge(where: Scene, *, metric: str, stopgrad: bool) -> Tensor:
    """The shortest prefixes of both, of queries and of positives."""
    prefixes = where.texts.layout.prefixes
    semantic = where.texts.of("semantic", prefixes["semantic"][-1])
    entity = where.texts.of("entity", prefixes["entity"][-1])
    sides = [bridge(semantic[side], entity[side], metric=metric, stopgrad=stopgrad) for side in (0, 1)]
    return torch.stack(sides).mean()


def _entropy(where: Scene, *, kind: str) -> Tensor:
    return entropy_reward(where.texts.of(SPECTRAL)[0], kind)
