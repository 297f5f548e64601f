"""Training a tokenizer on the train split.

Bytes are the alphabet of `bpe` and `unigram`: no text is unknown to them and none is lost. `wordpiece` is BERT's:
lower case, accents off, [UNK] for what it cannot spell. `identifiers` is for searching code: wordpieces of lower-case
words and of the parts of identifiers (`getHTTPResponse_v2` is get, http, response, v, 2), punctuation left out. All but
`unigram` come out the same from the same texts; its library sums in an order of its own. Everything after training is
reproducible with the tokenizer.json that was written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data_prep.clean_config import TokenizerConfig
from data_prep.corpus import KEPT, Corpus

UNKNOWN = "[UNK]"
_CONTINUES = "##"
_BINS = 1 << 16
_CASE = "(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
"""Places between the words of an identifier."""


def sample_limit(corpus: Corpus, train: int, max_bytes: int) -> int:
    """The train items whose `rank` is below this are the tokenizer's sample: at most `max_bytes` of UTF-8, or one.

    A uniform sample that depends on the set of kept items alone, and is all of them where they fit. Two passes over
    ranks and sizes, in memory for 65,536 bins.
    """
    sizes = np.zeros(_BINS, np.int64)
    for _, unit, verdict in corpus:
        chosen = (verdict == KEPT) & (unit["split"] == train)
        np.add.at(sizes, (unit["rank"][chosen] >> np.uint64(48)).astype(np.int64), unit["size"][chosen])
    before = np.cumsum(sizes) - sizes
    crossing = int(np.searchsorted(np.cumsum(sizes), max_bytes, side="right"))
    if crossing == _BINS:
        return 1 << 64
    ranks, inside = [], []
    for _, unit, verdict in corpus:
        places = (unit["rank"] >> np.uint64(48)).astype(np.int64)
        chosen = (verdict == KEPT) & (unit["split"] == train) & (places == crossing)
        ranks.append(unit["rank"][chosen])
        inside.append(unit["size"][chosen])
    order = np.argsort(np.concatenate(ranks))
    totals = before[crossing] + np.cumsum(np.concatenate(inside)[order])
    over = int(np.searchsorted(totals, max_bytes, side="right"))
    alone = int(over == 0 and before[crossing] == 0)
    return int(np.concatenate(ranks)[order[over]]) + alone  # the first one of all is taken whatever its size


def train_tokenizer(texts: Callable[[], Iterable[str]], config: TokenizerConfig) -> Tokenizer:
    """A tokenizer of `config.model`: id 0 ends documents, id 1 pads. `texts` may be called more than once."""
    if config.model in ("wordpiece", "identifiers"):
        return _wordpiece(texts, config)
    specials = [config.eos_token, config.pad_token]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if config.model == "bpe":
        tokenizer = Tokenizer(models.BPE())
        trainer: Any = trainers.BpeTrainer(
            vocab_size=config.vocab_size, min_frequency=config.min_frequency, special_tokens=specials,
            show_progress=False, initial_alphabet=alphabet)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=config.vocab_size, special_tokens=specials, show_progress=False,
                                          initial_alphabet=alphabet)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def _wordpiece(texts: Callable[[], Iterable[str]], config: TokenizerConfig) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    if config.model == "identifiers":
        tokenizer.normalizer = normalizers.Sequence([
            normalizers.NFKC(), normalizers.Replace(Regex(_CASE), " "), normalizers.Replace(Regex(r"[\W_]+"), " "),
            normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits()])
    else:
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUES)
    counts: Counter[str] = Counter()
    for text in texts():
        counts.update(tokenizer.normalizer.normalize_str(text))
    frequent = sorted(counts, key=lambda c: (-counts[c], c))[:config.vocab_size // 4]
    letters = sorted(letter for letter in frequent if not letter.isspace())
    # The library numbers continued letters in the order of a hash map, unless it knows them as special tokens.
    specials = [config.eos_token, config.pad_token, UNKNOWN]
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size, min_frequency=config.min_frequency, show_progress=False, initial_alphabet=letters,
        limit_alphabet=len(letters), special_tokens=[*specials, *(_CONTINUES + letter for letter in letters)])
    tokenizer.train_from_iterator(texts(), trainer)
    stated = json.loads(tokenizer.to_str())
    stated["added_tokens"] = [token for token in stated["added_tokens"] if token["content"] in specials]
    return Tokenizer.from_str(json.dumps(stated))
