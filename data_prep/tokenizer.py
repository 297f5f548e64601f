"""Byte-level BPE: training, loading, and the bytes each token stands for."""

from __future__ import annotations

import heapq
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.config import TokenizerConfig
from data_prep.files import write_atomic
from data_prep.manifest import TOKENIZER
from data_prep.select import Kept, keyed_hash
from pretrain.errors import ConfigError

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKEN_BYTES = "token_bytes.npy"


def training_sample(documents: Iterable[Kept], seed: int, max_bytes: int) -> list[str]:
    """Texts of at most `max_bytes` UTF-8 bytes for the tokenizer, in the order of `documents`.

    A uniform sample in one pass and bounded memory: the documents with the smallest keyed hash that fit. It depends on
    the set of documents alone, and is all of them where they fit.
    """
    heap: list[tuple[int, int, bytes]] = []
    total, ceiling = 0, 1 << 64
    for position, item in enumerate(documents):
        rank = keyed_hash(item.digest, seed, "sample")
        if rank >= ceiling:
            continue  # it may fit, but one of smaller hash did not: the sample would depend on the order
        heapq.heappush(heap, (-rank, position, item.document.text))
        total += len(item.document.text)
        while total > max_bytes and len(heap) > 1:
            dropped, _, text = heapq.heappop(heap)
            total, ceiling = total - len(text), -dropped
    return [text.decode() for _, _, text in sorted(heap, key=lambda entry: entry[1])]


def train_tokenizer(texts: list[str], config: TokenizerConfig) -> Tokenizer:
    """Byte-level BPE: id 0 ends documents, id 1 pads, then the 256 bytes, then merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=config.vocab_size, min_frequency=config.min_frequency,
                                  special_tokens=[config.eos_token, config.pad_token], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer that encodes whole documents as plain text.

    Truncation and padding, which tokenizers of encoders carry, are switched off, and the text of a special token inside
    a document is text: it can neither end the document nor vanish.

    Raises:
        ConfigError: no tokenizer in that file.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
        raise ConfigError("tokenizer.path", f"{path}: no tokenizer can be read from it ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def eos_id(tokenizer: Tokenizer, config: TokenizerConfig) -> int:
    """Id of the token that ends documents. Raises ConfigError naming the special tokens there are."""
    found: int | None = tokenizer.token_to_id(config.eos_token)
    if found is None:
        known = [t.content for _, t in sorted(tokenizer.get_added_tokens_decoder().items()) if t.special]
        raise ConfigError("tokenizer.eos_token", f'"{config.eos_token}" is no token of {config.path}; '
                          f"its special tokens are {', '.join(known[:8]) or 'none'}")
    return found


def pad_id(tokenizer: Tokenizer, config: TokenizerConfig) -> int:
    """Id that fills up rows: the config's pad token, else the one a given tokenizer pads with. Raises ConfigError."""
    found: int | None = tokenizer.token_to_id(config.pad_token)
    if found is None and config.path is not None:
        found = (json.loads(Path(config.path).read_bytes()).get("padding") or {}).get("pad_id")
    if found is None:
        raise ConfigError("tokenizer.pad_token", f'"{config.pad_token}" is no token of {config.path}, which names none '
                          "to pad with either; rows of pairs need one")
    return found


def special_ids(tokenizer: Tokenizer, eos: int) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer's own post-processor puts before and after a text; where it puts none, `eos` after it."""
    probe = tokenizer.encode("a", add_special_tokens=True)
    content = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
    prefix, suffix = probe.ids[:content[0]], probe.ids[content[-1] + 1:]
    return prefix, suffix if prefix or suffix else [eos]


def encode(tokenizer: Tokenizer, texts: list[str],
           eos: int | None) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """(ids of all texts, each followed by `eos` unless it is None; [len(texts)] number of ids of each)."""
    encoded = [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    end = () if eos is None else (eos,)
    lengths = np.fromiter((len(ids) + len(end) for ids in encoded), np.int64, len(encoded))
    flat: Iterator[int] = (i for ids in encoded for i in (*ids, *end))
    return np.fromiter(flat, np.uint32, int(lengths.sum())), lengths


def token_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.int32] | None:
    """[vocab] UTF-8 bytes that each token stands for, 0 for special tokens. None for one that is not byte-level.

    A byte-level vocabulary spells each byte as one character, so lengths in characters are lengths in bytes.
    """
    spec = json.loads(tokenizer.to_str())
    if not any(part.get("type") == "ByteLevel" for part in _parts(spec.get("decoder"))):
        return None
    table = np.zeros(vocab_size(tokenizer), np.int32)
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        table[number] = len(token)
    for number, added in tokenizer.get_added_tokens_decoder().items():
        table[number] = 0 if added.special else len(added.content.encode())
    return table


def _parts(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A component of a tokenizer file and, of a sequence, its members."""
    if not component:
        return []
    return [component, *component.get("decoders", [])]


def save_tokenizer(tokenizer: Tokenizer, folder: Path, config: TokenizerConfig) -> str:
    """Write tokenizer.json, tokenizer_config.json (for transformers) and token_bytes.npy. Returns the first's SHA-256.

    A tokenizer that was given is copied as it is, its config too where one lies beside it.
    """
    stated: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": config.eos_token,
                              "bos_token": config.eos_token, "clean_up_tokenization_spaces": False}
    if config.path is None:
        content = tokenizer.to_str(pretty=True).encode()
        beside = json.dumps(stated | {"pad_token": config.pad_token}, indent=1).encode()
    else:
        content = Path(config.path).read_bytes()
        given = Path(config.path).with_name(TOKENIZER_CONFIG)
        beside = given.read_bytes() if given.is_file() else json.dumps(stated, indent=1).encode()
    write_atomic(folder / TOKENIZER_CONFIG, beside)
    table = token_bytes(tokenizer)
    if table is not None:
        buffer = io.BytesIO()
        np.save(buffer, table, allow_pickle=False)
        write_atomic(folder / TOKEN_BYTES, buffer.getvalue())
    return write_atomic(folder / TOKENIZER, content)
