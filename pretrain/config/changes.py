"""What may change in the config of a run that goes on: one table from key to rule.

A run that goes on takes weights, moments, schedule and cursor from its checkpoint and everything else from the config
as it is now. A change is free, told (with what follows from it), or refused (with the cure). A branch, which is another
run that starts from a checkpoint of this one, may change all but what makes the weights those of another model.

Sections whose class depends on a key carry the rule in their schemas: `ModelConfig.changeable`,
`SourceConfig.changeable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pretrain.config.model import Section
from pretrain.config.run import RunConfig
from pretrain.config.sections import TAGS, fields_of, members, section_class
from pretrain.config.source import SourceConfig

Change = tuple[str, Any, Any]
"""(dotted key, value at the last start, value now); a key that one of the two lacks is None there."""
Kind = Literal["free", "told", "fixed"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of a change."""

    kind: Kind
    says: str = ""
    """What follows from it (told), or what it would make of the run (fixed)."""
    branch: str | None = None
    """Where it is fixed: what follows on a branch; None: fixed there too."""


MODEL = Rule("fixed", "another model")
ORDER = Rule("fixed", "other data, order or batch size",
             "the data begin with their first batch; where only the batch size changes, after the samples seen")
MASKING = Rule("fixed", "documents seen otherwise", "documents are seen otherwise from here on")
OBJECTIVE = Rule("fixed", "another objective", "losses before and after are of another kind")
TERMS = Rule("told", "losses before and after weigh other things")
NEXT = Rule("told", "holds from the next update on")
RATE = Rule("told", "the learning rate is computed anew for this step and may jump")
JUDGED = Rule("told", "figures before and after cannot be compared: the best checkpoint is chosen anew")
ROUNDING = Rule("told", "losses go on near the former ones, not equal to them")
FREE = Rule("free")

_KEYS: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (ORDER, ("seed", "data.seq_len", "data.stride", "data.order.chunk_windows", "data.order.group_chunks",
             "data.order.lanes", "data.order.shuffle", "batch.global_batch_size")),
    (MASKING, ("data.document_masking",)),
    (OBJECTIVE, ("objective.name",)),
    (NEXT, ("optim.lr", "optim.betas", "optim.eps", "optim.weight_decay", "optim.grad_clip", "train.on_spike",
            "train.max_rewinds", "train.max_bad_steps", "train.max_bad_per_1000")),
    (RATE, ("train.length", "schedule.name", "schedule.warmup", "schedule.min_lr_ratio", "schedule.decay",
            "schedule.plateau_patience", "schedule.plateau_factor")),
    (JUDGED, ("eval.metric", "eval.max_batches", "eval.embedding.sts", "eval.embedding.quick_pairs",
              "eval.embedding.head", "eval.embedding.queries", "eval.embedding.pool", "eval.embedding.collapse_texts",
              "eval.embedding.loss_triplets", "data.validation")),
    (ROUNDING, ("engine.precision", "engine.compile", "engine.deterministic", "engine.deepspeed")),
    (FREE, ("name", "runs_dir", "data.workers", "data.prefetch", "batch.micro_batch_size",
            "batch.gradient_accumulation_steps", "train.max_hours", "train.init_from", "train.resume",
            "train.target_perplexity", "train.patience", "train.patience_delta", "train.patience_after",
            "train.gates_at_start", "engine.zero_stage",
            "engine.offload.optimizer", "engine.offload.parameters", "engine.activation_checkpointing",
            "engine.zero3_init", "checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_best",
            "checkpoint.keep_every", "checkpoint.async_save", "checkpoint.mirror.path", "checkpoint.mirror.every",
            "eval.every", "eval.at_start", "eval.samples", "eval.embedding.target_sts", "eval.embedding.health_after",
            "eval.embedding.collapse_warn", "eval.embedding.rank_warn",
            "monitor.log_every", "monitor.tensorboard", "monitor.wandb", "monitor.wandb_project", "monitor.progress",
            "monitor.profile_steps", "monitor.peak_flops", "launch.nproc", "launch.port", "launch.timeout",
            "launch.preflight", "launch.hang_timeout", "launch.threads", "slurm")),
)
TABLE: dict[str, Rule] = {key: rule for rule, keys in _KEYS for key in keys}
"""Rules by key; one of a section holds for all of it."""
REOPENS = frozenset({"train.patience", "train.patience_delta", "train.patience_after", "train.target_perplexity"})
"""Changes after which a run that has ended early is not taken for finished."""
_CURE = "set it back, or branch off: `pretrain train CONFIG --branch NAME`"
_MODEL_CURE = "set it back, give the run another name, or start it with train.init_from"


def rule_of(key: str, config: RunConfig) -> Rule:
    """The rule of a leaf key. `config` tells the classes of its polymorphic sections. Raises KeyError without one."""
    parts = key.split(".")
    match parts:
        case ["model", *_]:
            return NEXT if parts[-1] in config.model.changeable else MODEL
        case ["objective", name, *_] if name != "name":
            return TERMS
        case ["data", "source", *rest]:
            return FREE if rest and rest[-1] in _source_at(config.data.source, rest[:-1]).changeable else ORDER
    for end in range(len(parts), 0, -1):
        rule = TABLE.get(".".join(parts[:end]))
        if rule is not None:
            return rule
    raise KeyError(key)


def _source_at(source: SourceConfig, path: Iterable[str]) -> type[SourceConfig]:
    """The class of the source that the parts of a key lead to from `source`."""
    node: Any = source
    for part in path:
        node = node[int(part)] if part.isdigit() and int(part) < len(node) else getattr(node, part, None)
    return type(node) if isinstance(node, SourceConfig) else SourceConfig


def refused(changes: Sequence[Change], config: RunConfig, *, branch: bool = False) -> list[tuple[Rule, Change]]:
    """Changes with which a run cannot go on, or a `branch` not begin.

    Where a key of the order of samples is left out on one side, only the data can tell whether that changes anything.
    """
    found = [(rule_of(change[0], config), change) for change in changes]
    return [(rule, change) for rule, change in found if rule.kind == "fixed"
            and not (branch and rule.branch is not None) and not (rule is ORDER and None in change[1:])]


def refusal(found: Sequence[tuple[Rule, Change]]) -> str:
    """The one line about them: what they would make of the run, key by key, and the cure."""
    kinds = dict.fromkeys(rule for rule, _ in found)
    parts = [f"{kind.says} ({told(change for rule, change in found if rule is kind)})" for kind in kinds]
    return f"the config is of {'; '.join(parts)}; {_cure(kinds)}"


def _cure(rules: Iterable[Rule]) -> str:
    return _CURE if all(rule.branch is not None for rule in rules) else _MODEL_CURE


def cure_of(rule: Rule) -> str:
    """What to do instead of a change that is refused."""
    return _cure([rule])


def consequences(changes: Sequence[Change], config: RunConfig, *, branch: bool = False) -> Iterator[str]:
    """A line for everything that follows from changes with which the run does go on."""
    says: dict[str, list[str]] = {}
    for key, *_ in changes:
        rule = rule_of(key, config)
        text = rule.says if rule.kind == "told" else rule.branch if branch and rule.kind == "fixed" else None
        if text is not None and rule is not ORDER:  # that one is told by the data
            says.setdefault(text, []).append(key)
    yield from (f"{', '.join(keys)}: {text}" for text, keys in says.items())


def told(changes: Iterable[Change]) -> str:
    """`optim.lr is 0.1 in the run, 0.2 here; ...`"""
    return "; ".join(f"{key} is {old} in the run, {new} here" for key, old, new in changes)


def leaf_keys(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every leaf key of the schema, without the parts of polymorphic sections and of free dicts."""
    for key, info in fields_of(section).items():
        here = prefix + key
        classes = [m for m in members(info.annotation) if isinstance(m, type) and issubclass(m, Section)]
        if len(classes) == 1 and classes[0] not in TAGS and here not in TABLE:
            inner = section_class(info.annotation, {})
            assert inner is not None
            yield from leaf_keys(inner, f"{here}.")
        else:
            yield here


def table() -> str:
    """The rules in Markdown, for docs/durability.md."""
    rows = [("key", "a run that goes on", "a branch"), ("---", "---", "---"),
            ("`model.*` but what its schema calls changeable", f"no: {MODEL.says}", "no"),
            ("`data.source.*` but what its schema calls changeable (`path`, `verify`)", f"no: {ORDER.says}",
             f"yes: {ORDER.branch}")]
    for rule, keys in _KEYS:
        named = ", ".join(f"`{key}`" for key in _shortened(keys))
        if rule.kind == "fixed":
            rows.append((named, f"no: {rule.says}", f"yes: {rule.branch}"))
        else:
            rows.append((named, f"yes: {rule.says}" if rule.says else "yes", "yes"))
        if rule is OBJECTIVE:
            rows.append(("`objective.*` else", f"yes: {TERMS.says}", "yes"))
        if rule is NEXT:
            rows.append(("changeable keys of `model`", f"yes: {NEXT.says}", "yes"))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _shortened(keys: Sequence[str]) -> list[str]:
    """`section.*` in place of a section's keys, where they are all of them."""
    names: list[str] = []
    for key in keys:
        section = key.rpartition(".")[0]
        whole = section and len(keys) > 1 and {other for other in TABLE if other.startswith(section + ".")} <= set(keys)
        parent = section.rpartition(".")[0]
        if whole and parent and {other for other in TABLE if other.startswith(parent + ".")} <= set(keys):
            section = parent
        name = f"{section}.*" if whole else key
        if name not in names:
            names.append(name)
    return names
