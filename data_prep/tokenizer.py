"""Tokenizers: finding, loading, encoding, and the bytes each token stands for."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from data_prep.clean_config import TokenizerConfig
from data_prep.files import write_atomic
from data_prep.manifest import TOKENIZER
from pretrain.errors import ConfigError

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKEN_BYTES = "token_bytes.npy"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Given:
    """A tokenizer that exists: its tokenizer.json and, where there is one, its tokenizer_config.json."""

    content: bytes
    beside: bytes | None


def given_tokenizer(config: TokenizerConfig) -> Given:
    """Read the tokenizer that `config.path` names: a file, a folder, or a name of the hub.

    Folders and names without a tokenizer.json (vocab.txt, tokenizer.model) are converted by transformers. Raises
    ConfigError where there is none.
    """
    stated = str(config.path)
    path = Path(stated)
    try:
        if path.is_dir() and not (path / TOKENIZER).is_file():
            return _converted(str(path), None)
        if not path.exists() and _HUB_NAME.fullmatch(stated) and path.suffix != ".json":
            return _from_hub(stated, config.revision)
        file = path / TOKENIZER if path.is_dir() else path
        beside = file.with_name(TOKENIZER_CONFIG)
        return Given(file.read_bytes(), beside.read_bytes() if beside.is_file() else None)
    except OSError as error:
        raise ConfigError("tokenizer.path", f"{stated}: cannot be read ({error.strerror or error})") from None


def _from_hub(name: str, revision: str | None) -> Given:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    try:
        content = Path(hf_hub_download(name, TOKENIZER, revision=revision)).read_bytes()
    except EntryNotFoundError:
        return _converted(name, revision)
    except Exception as error:  # no connection, no such name, no permission: the library has many kinds
        line = str(error).strip().split("\n")[0]
        raise ConfigError("tokenizer.path", f"{name}: not here and not found on the hub ({line})") from None
    try:
        return Given(content, Path(hf_hub_download(name, TOKENIZER_CONFIG, revision=revision)).read_bytes())
    except EntryNotFoundError:
        return Given(content, None)


def _converted(name: str, revision: str | None) -> Given:
    """What transformers makes of a tokenizer of another format."""
    from transformers import AutoTokenizer
    try:
        slow = AutoTokenizer.from_pretrained(name, revision=revision)
        return Given(slow.backend_tokenizer.to_str().encode(), None)
    except Exception as error:  # whatever is wrong with the files
        line = str(error).strip().split("\n")[0]
        raise ConfigError("tokenizer.path", f"{name}: transformers finds no tokenizer in it ({line})") from None


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer that encodes whole documents as plain text; see `tokenizer_of`.

    Raises:
        ConfigError: no tokenizer in that file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError("tokenizer.path", f"{path}: cannot be read ({error.strerror})") from None
    return tokenizer_of(content, path)


def tokenizer_of(content: bytes, name: object) -> Tokenizer:
    """The tokenizer in a tokenizer.json called `name`, for whole documents of plain text.

    Truncation and padding, which tokenizers of encoders carry, are switched off, and the text of a special token inside
    a document is text: it can neither end the document nor vanish.

    Raises:
        ConfigError: no tokenizer in it.
    """
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
        raise ConfigError("tokenizer.path", f"{name}: no tokenizer can be read from it ({error})") from None
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


def pad_id(tokenizer: Tokenizer, config: TokenizerConfig, content: bytes) -> int:
    """Id that fills up rows: the config's pad token, else the one that tokenizer.json pads with. Raises ConfigError."""
    found: int | None = tokenizer.token_to_id(config.pad_token)
    if found is None:
        found = (json.loads(content).get("padding") or {}).get("pad_id")
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
    pieces = []  # an array a text and one copy at the end: half the cost of walking all ids in Python
    for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        ids = encoded.ids
        if eos is not None:
            ids.append(eos)
        pieces.append(np.array(ids, np.uint32))
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    return np.concatenate([np.zeros(0, np.uint32), *pieces]), lengths


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


def save_tokenizer(content: bytes, beside: bytes | None, folder: Path, config: TokenizerConfig) -> str:
    """Write tokenizer.json, tokenizer_config.json (for transformers) and token_bytes.npy. Returns the first's SHA-256.

    A tokenizer that was given keeps its bytes, and its config where it has one.
    """
    if beside is None:
        stated: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": config.eos_token,
                                  "bos_token": config.eos_token, "clean_up_tokenization_spaces": False}
        trained = {} if config.path else {"pad_token": config.pad_token}
        beside = json.dumps(stated | trained, indent=1).encode()
    write_atomic(folder / TOKENIZER_CONFIG, beside)
    table = token_bytes(tokenizer_of(content, folder / TOKENIZER))
    if table is not None:
        buffer = io.BytesIO()
        np.save(buffer, table, allow_pickle=False)
        write_atomic(folder / TOKEN_BYTES, buffer.getvalue())
    return write_atomic(folder / TOKENIZER, content)
