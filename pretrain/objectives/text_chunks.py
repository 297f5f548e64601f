"""The texts of an update, cut into chunks of equal number and similar length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.data.batch import Batch
from pretrain.data.pairs import WIDTH_MULTIPLE
from pretrain.errors import ConfigError
from pretrain.objectives.embedding_losses import TripletIds


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that go through the model together."""

    rows: Tensor
    """[n] places of its texts among all texts of the update."""
    batch: Batch
    """`input_ids` and `attention_mask` [n, T], T the longest of them, rounded up to a multiple of 8."""


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of b triplets with N negatives each, numbered: all queries, all positives, all first negatives, ..."""

    input_ids: list[Tensor]
    """Queries [b, Tq] and passages [b + N*b, Tp]."""
    attention_mask: list[Tensor]
    ids: TripletIds

    @classmethod
    def of(cls, micro_batches: Sequence[Batch]) -> Texts:
        """The texts of micro-batches of the `pairs` source. Raises ConfigError for batches of another source."""
        if "query_input_ids" not in micro_batches[0].tensors:
            raise ConfigError("data.source.kind", "the objective contrastive needs pairs; this source gives "
                              f"{', '.join(sorted(micro_batches[0].tensors))}; use kind: pairs")
        whole = {name: torch.cat([batch[name] for batch in micro_batches]) for name in micro_batches[0].tensors}
        queries, positives = whole["query_input_ids"], whole["positive_input_ids"]
        negatives = whole.get("negative_input_ids", positives.new_empty(len(positives), 0, positives.shape[1]))
        mask = whole.get("negative_attention_mask", negatives.bool())
        ids = TripletIds(whole["query_ids"], whole["passage_ids"],
                         whole.get("negative_ids", whole["query_ids"].new_empty(len(queries), 0)),
                         whole.get("negative_mask", mask.any(-1)))
        by_number, mask_by_number = (side.transpose(0, 1).flatten(0, 1) for side in (negatives, mask))
        return cls([queries, torch.cat([positives, by_number])],
                   [whole["query_attention_mask"], torch.cat([whole["positive_attention_mask"], mask_by_number])], ids)

    def chunks(self, size: int) -> list[Chunk]:
        """Queries and passages apart, each sorted by length and cut into chunks of `size`.

        Their number depends on b, N and `size` alone: all ranks run the model equally often.
        """
        found, before = [], 0
        for input_ids, mask in zip(self.input_ids, self.attention_mask, strict=True):
            lengths = self._lengths(mask)
            by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
            for start in range(0, len(by_length), size):
                chosen = torch.tensor(by_length[start:start + size])
                rows = chosen.to(input_ids.device)
                width = self._width(lengths[int(chosen[-1])], mask)
                found.append(Chunk(rows + before, Batch(chosen + before, {"input_ids": input_ids[rows, :width],
                                                                          "attention_mask": mask[rows, :width]})))
            before += len(lengths)
        return found

    def stacked(self) -> Chunk:
        """All texts as one chunk."""
        width = max(self._width(max(self._lengths(mask)), mask) for mask in self.attention_mask)

        def padded(parts: list[Tensor]) -> Tensor:
            fitted = [part[:, :width] for part in parts]
            return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in fitted])
        places = torch.arange(sum(len(part) for part in self.input_ids))
        return Chunk(places.to(self.input_ids[0].device), Batch(places, {
            "input_ids": padded(self.input_ids), "attention_mask": padded(self.attention_mask)}))

    @staticmethod
    def _lengths(mask: Tensor) -> list[int]:
        """One more than the place of each row's last real token."""
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        lengths: list[int] = (mask.bool() * places).amax(1).tolist()
        return lengths

    @staticmethod
    def _width(longest: int, mask: Tensor) -> int:
        return min(mask.shape[1], -(-max(1, longest) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)
