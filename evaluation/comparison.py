"""The model's figures beside the n-gram baselines: one list of rows for report, model card and demo table."""

from __future__ import annotations

from dataclasses import dataclass

from evaluation.results import MetricRecord, NGramRecord, Results


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the comparison."""

    label: str
    train_tokens: int | None
    loss: MetricRecord
    perplexity: MetricRecord
    bits_per_byte: MetricRecord | None
    ours: bool = False


def comparison(results: Results) -> list[Row]:
    """The model first, then the baselines at equal tokens and on the full split, by order.

    Results of other tasks than `perplexity` give no rows.
    """
    metrics, prefix = results.metrics, results.prefix
    if f"{prefix}/loss" not in metrics:
        return []
    rows = [Row("model", results.train_tokens, metrics[f"{prefix}/loss"], metrics[f"{prefix}/perplexity"],
                metrics.get(f"{prefix}/bits_per_byte"), ours=True)]
    for record in sorted(results.baselines, key=lambda b: (b.scope != "equal tokens", b.order)):
        rows.append(Row(record.label, record.train_tokens, *_figures(record)))
    return rows


def _figures(record: NGramRecord) -> tuple[MetricRecord, MetricRecord, MetricRecord | None]:
    def figure(value: float, n: int) -> MetricRecord:
        return MetricRecord(value=value, n=n, higher_is_better=False)
    per_byte = None if record.bits_per_byte is None else figure(record.bits_per_byte, record.n)
    return figure(record.loss, record.n), figure(record.perplexity, record.n), per_byte


def beats(results: Results, order: int = 2) -> bool | None:
    """Whether the model's loss is below that of the n-gram of `order` at equal training tokens; None: not measured."""
    ours = results.metrics.get(f"{results.prefix}/loss")
    theirs = [b.loss for b in results.baselines if b.order == order and b.scope == "equal tokens"]
    return None if ours is None or not theirs else ours.value < theirs[0]
