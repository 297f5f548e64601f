"""Schema and arithmetic of the needle task: L tokens hidden in a context, to be given back after a query.

    s = context (ctx_chunks * ctx_chunk_len ids, the needle among them), query (6 ids), needle (needle_len ids)

The reserved ids stand above the pool, so that the pool is the plain range [pool_low, pool_high).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pretrain.config.source import SourceConfig
from pretrain.errors import ConfigError

QUERY_LEN, KEY_LEN = 6, 4
RESERVED = QUERY_LEN  # five fixed ids of the query and the tag
Split = Literal["train", "val", "test"]


class NeedleConfig(SourceConfig):
    """Needles in a haystack, generated: example = f(seed, split, index), without end unless a size is given."""

    changeable: ClassVar[frozenset[str]] = frozenset({"haystack_path", "verify", "needle_eval_examples",
                                                      "needle_test_examples", "eval_soft_topk"})

    kind: Literal["needle"] = "needle"
    vocab_size: int = Field(32000, ge=16, le=1 << 30, description="ids of the model; the pool is drawn from them")
    split: Split = Field("train", description="val and test are the same examples for every `seed`")
    ctx_chunks: int = Field(4, ge=1, le=1 << 16, description="chunks of the context; only a unit of its length")
    ctx_chunk_len: int = Field(128, ge=1, le=1 << 16, description="tokens a chunk")
    needle_len: int = Field(16, ge=1, le=64, description="tokens of the needle, all different")
    needle_query: bool = Field(True, description="query and target behind the context; false: plain next-token "
                               "prediction over the context, no retrieval")
    needle_marker: Literal["none", "tag", "key", "tagkey"] = Field(
        "none", description="before the needle: nothing (then the task is ill-posed), a reserved id, 4 random ids that "
        "the query repeats, or both")
    needles: int = Field(1, ge=1, le=64, description="needles in the context, each with its own key; one is asked for")
    placement: Literal["inner", "uniform"] = Field(
        "inner", description="inner: not in the first nor the last chunk; uniform: anywhere (always so with several)")
    haystack: Literal["iid", "shards"] = Field("iid", description="ids drawn from the pool, or windows of real text")
    haystack_path: str | None = Field(None, description="dataset folder of haystack shards")
    haystack_repeats: bool = Field(False, description="needle ids may occur in the haystack as well")
    verify: Literal["full", "touch", "off", "auto"] = Field("auto", description="of haystack shards; see kind shards")
    needle_train_size: int = Field(0, ge=0, description="training examples, gone through in epochs; 0: a stream")
    needle_eval_examples: int = Field(200, ge=1, description="examples of split val")
    needle_test_examples: int = Field(1000, ge=1, description="examples of split test")
    eval_soft_topk: int = Field(5, ge=1, le=1000, description="k of needle_hit_rate_topk")
    eos_id: int = Field(2, ge=0, description="first id of the query; not in the pool")
    pool_margin: int = Field(100, ge=RESERVED, description="ids at either end of the vocabulary that are not drawn")
    seed: int = Field(0, ge=0, lt=1 << 63, description="key of the training stream")

    @property
    def context_len(self) -> int:
        """Tokens of the context (C * Lc)."""
        return self.ctx_chunks * self.ctx_chunk_len

    @property
    def marker_len(self) -> int:
        """Tokens before the needle that mark it."""
        return {"none": 0, "tag": 1, "key": KEY_LEN, "tagkey": 1 + KEY_LEN}[self.needle_marker]

    @property
    def has_key(self) -> bool:
        """Whether the marker holds ids that the query repeats."""
        return self.needle_marker in ("key", "tagkey")

    @property
    def retrieval_start(self) -> int:
        """rs: place of the first answer token in s; it is predicted at rs - 1."""
        return self.context_len + QUERY_LEN

    @property
    def seq_len(self) -> int:
        """Tokens that a model is given: s without its last one."""
        return self.retrieval_start + self.needle_len - 1 if self.needle_query else self.context_len - 1

    def scored_tokens(self, seq_len: int) -> int:
        """Those of the needle."""
        return self.needle_len

    @property
    def fixed_seq_len(self) -> tuple[int, str]:
        """`seq_len` with its reason; `data.seq_len` cannot be another."""
        parts = f"{self.context_len} of the context"
        if not self.needle_query:
            return self.seq_len, f"{parts} without the last"
        return self.seq_len, f"{parts} + {QUERY_LEN} of the query + {self.needle_len - 1} of the needle but its last"

    @property
    def pool_low(self) -> int:
        """First id of the pool."""
        return self.pool_margin

    @property
    def pool_high(self) -> int:
        """End of the pool, which is the first reserved id."""
        return self.vocab_size - self.pool_margin

    @property
    def pool_size(self) -> int:
        """Ids that needles, keys and iid haystacks are drawn from."""
        return self.pool_high - self.pool_low

    @property
    def query_ids(self) -> list[int]:
        """The fixed query: end of text, then five reserved ids."""
        return [self.eos_id, *range(self.pool_high, self.pool_high + QUERY_LEN - 1)]

    @property
    def tag_id(self) -> int:
        """The reserved id before a tagged needle."""
        return self.pool_high + QUERY_LEN - 1

    @property
    def start_range(self) -> tuple[int, int]:
        """First and last place of the needle's first token, where there is one needle."""
        low, high = self.marker_len, self.context_len - self.needle_len
        inner_low = max(self.ctx_chunk_len, self.marker_len)
        if self.placement == "inner" and inner_low <= high - self.ctx_chunk_len:
            return inner_low, high - self.ctx_chunk_len
        return low, high

    @property
    def min_distance(self) -> int:
        """Tokens from the end of the latest needle to the first prediction."""
        high = self.start_range[1] if self.needles == 1 else self.context_len - self.needle_len
        return self.retrieval_start - 1 - (high + self.needle_len - 1)

    @model_validator(mode="after")
    def _fits(self) -> NeedleConfig:
        key = "data.source"
        block = self.marker_len + self.needle_len
        if self.needles * block > self.context_len:
            raise ConfigError(f"{key}.ctx_chunk_len", f"{self.ctx_chunks} x {self.ctx_chunk_len} = {self.context_len} "
                              f"tokens of context do not hold {self.needles} needle(s) of {block} tokens with marker")
        wanted = self.needles * (self.needle_len + (KEY_LEN if self.has_key else 0)) + self.needle_len + QUERY_LEN
        if self.pool_size <= wanted:
            raise ConfigError(f"{key}.vocab_size", f"{self.vocab_size} less twice data.source.pool_margin "
                              f"{self.pool_margin} leaves {max(0, self.pool_size)} ids to draw from; needles, keys and "
                              f"controls need more than {wanted}")
        if self.pool_low <= self.eos_id:
            raise ConfigError(f"{key}.eos_id", f"{self.eos_id} must be below data.source.pool_margin "
                              f"{self.pool_margin}: the ids from there on are drawn as needles")
        if (self.haystack == "shards") != (self.haystack_path is not None):
            raise ConfigError(f"{key}.haystack_path", "names the dataset of haystack shards, and only of that")
        if self.needles > 1 and not self.has_key:
            raise ConfigError(f"{key}.needles", f"{self.needles} needles are told apart by their keys; use "
                              "needle_marker key or tagkey")
        return self
