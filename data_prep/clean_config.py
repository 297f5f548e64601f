"""Sections of the cleaning steps. Each is off unless its section, or a bound in it, is given."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from data_prep.source_config import EvaluationSource
from pretrain.config.model import Section
from pretrain.errors import ConfigError


class NormalizeConfig(Section):
    """How text is rewritten before anything looks at it."""

    nfc: bool = Field(True, description="Unicode normalisation form C")
    control_characters: bool = Field(True, description="drop them, but tabs and line ends; byte order marks too")
    line_ends: bool = Field(True, description="CRLF, CR and Unicode line separators become LF")


class QualityConfig(Section):
    """Documents outside of a bound are dropped, counted under its name. Defaults are Gopher's; null: no bound.

    Words are what white space parts; a line counts without outer white space, empty ones do not count.
    """

    min_words: int | None = Field(50, ge=0, description="words at least")
    max_words: int | None = Field(100_000, ge=1, description="words at most")
    min_mean_word_length: float | None = Field(3.0, ge=0, description="characters a word at least, on average")
    max_mean_word_length: float | None = Field(10.0, ge=0, description="and at most")
    max_symbol_ratio: float | None = Field(0.1, ge=0, description="# and ellipses for each word")
    max_bullet_lines: float | None = Field(0.9, ge=0, le=1, description="share of lines that begin with a bullet")
    max_ellipsis_lines: float | None = Field(0.3, ge=0, le=1, description="share of lines that end with an ellipsis")
    min_alphabetic_words: float | None = Field(0.8, ge=0, le=1, description="share of words that hold a letter")
    min_stop_words: int | None = Field(2, ge=0, description="of the, be, to, of, and, that, have, with: different ones")
    max_repeated_lines: float | None = Field(0.3, ge=0, le=1, description="share of lines seen before")
    max_repeated_line_characters: float | None = Field(0.2, ge=0, le=1, description="share of characters in them")
    max_repeated_paragraphs: float | None = Field(0.3, ge=0, le=1, description="share of paragraphs seen before")
    max_repeated_paragraph_characters: float | None = Field(0.2, ge=0, le=1, description="share of characters in them")
    max_top_ngram: dict[int, float] | None = Field(
        default_factory=lambda: {2: 0.20, 3: 0.18, 4: 0.16},
        description="n: share of characters in the most frequent n-gram of words")
    max_repeated_ngrams: dict[int, float] | None = Field(
        default_factory=lambda: {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10},
        description="n: share of characters in n-grams of words that occur twice or more")


class WebConfig(Section):
    """C4's rules for pages: bad lines are taken out, documents with what is left too short are dropped."""

    terminal_punctuation: bool = Field(True, description="keep only lines that end with . ! ? or a closing quote")
    min_line_words: int = Field(3, ge=0, description="words a kept line has at least")
    min_sentences: int = Field(5, ge=0, description="sentences a document has left at least")
    javascript: bool = Field(True, description="take out lines that mention javascript")
    policy: bool = Field(True, description="take out lines about cookies, privacy policies and terms of use")
    curly_brackets: bool = Field(True, description="drop documents with a curly bracket")
    lorem_ipsum: bool = Field(True, description="drop documents with lorem ipsum")


class LanguageConfig(Section):
    """Documents that seem to be of another language are dropped. See language.py for what it can tell."""

    allow: list[str] = Field(min_length=1, description="codes: en, de, fr, es, it, pt, nl, and the scripts' ru, el, "
                             "ar, he, hi, th, ko, ja, zh")
    min_share: float = Field(0.1, ge=0, le=1, description="of words that speak for the language")


class PiiConfig(Section):
    """What is replaced by a mark in the text. A document is never dropped for it."""

    emails: bool = Field(True, description="by [EMAIL]")
    ip_addresses: bool = Field(True, description="public IPv4 and IPv6 addresses, by [IP]")
    keys: bool = Field(True, description="private keys, tokens and access keys of well-known form, by [KEY]")


class CleanConfig(Section):
    """Steps on each text, in this order. Pairs are normalised and masked; the rest is for documents."""

    normalize: NormalizeConfig | None = Field(None, description="null: the text as it was found")
    pii: PiiConfig | None = Field(None, description="null: nothing is masked")
    web: WebConfig | None = Field(None, description="null: no line is taken out")
    quality: QualityConfig | None = Field(None, description="null: no bounds; {}: Gopher's")
    language: LanguageConfig | None = Field(None, description="null: any language")


class NearDedupConfig(Section):
    """Near copies by MinHash: two documents are, whose sets of 5-word shingles have this Jaccard similarity."""

    threshold: float = Field(0.8, gt=0, le=1, description="similarity, computed exactly for every candidate")
    bands: int = Field(20, ge=1, le=256, description="b: candidates agree in all rows of one band at least")
    rows: int = Field(8, ge=1, le=64, description="r: found with probability 1 - (1 - s^r)^b")


class DedupConfig(Section):
    """Which copies of a document are dropped, over all sources and splits. The first one is kept."""

    exact: bool = Field(True, description="keep the first of documents equal but for line ends and outer white space")
    near: NearDedupConfig | None = Field(None, description="null: near copies stay; {}: dropped")


class DecontaminateConfig(Section):
    """Documents of the train split that hold text of an evaluation set are dropped.

    Pairs, where any text does, from all splits; but not what a source's `split` puts into another one than train.
    """

    against: list[EvaluationSource] = Field(min_length=1, description="the evaluation sets, as sources")
    ngram: int = Field(13, ge=2, le=64, description="words; a text with fewer is looked for as a whole")
    coverage: float = Field(0.5, gt=0, le=1, description="share of an evaluation item found in one document: dropped")
    run: int = Field(50, ge=1, description="words of an evaluation item in a row found in one document: dropped")
    boilerplate: int = Field(10, ge=1, description="n-grams in more documents than this do not count")


class TokenizerConfig(Section):
    """A tokenizer that exists, or one trained here on the train split."""

    path: str | None = Field(None, description="tokenizer.json, a folder with a tokenizer of transformers or a "
                             "name of the hub, used as it is; null: train one")
    revision: str | None = Field(None, description="commit or tag on the hub; null: the newest")
    model: Literal["bpe", "unigram", "wordpiece", "identifiers"] = Field(
        "bpe", description="of a trained one; bpe works on bytes, unigram falls back to bytes, wordpiece has [UNK]; "
                           "identifiers: wordpieces of words and parts of identifiers, no punctuation, to search code")
    vocab_size: int = Field(8192, ge=258, le=1 << 20, description="ids of a trained tokenizer, special tokens included")
    min_frequency: int = Field(2, ge=1, description="a pair seen less often is not merged (training only)")
    sample_bytes: int = Field(256 << 20, ge=1, description="train split text the training sees at most, in UTF-8 bytes")
    eos_token: str = Field("<|endoftext|>", min_length=1, description="ends each document; one token of the vocabulary")
    pad_token: str = Field("<|pad|>", min_length=1, description="fills batches; never in the shards (training only)")
    roundtrip_share: float = Field(0.01, ge=0, le=1, description="share of documents decoded again and compared with "
                                   "their text; a tokenizer trained on bytes must lose nothing, others are counted")

    @model_validator(mode="after")
    def _distinct(self) -> TokenizerConfig:
        if self.path is None and self.eos_token == self.pad_token:
            raise ConfigError("tokenizer.pad_token", f'"{self.pad_token}" is the eos_token too; the two must differ')
        return self
