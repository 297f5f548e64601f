"""Whatever can be evaluated, opened the same way: a run, a checkpoint, an export, a Hugging Face folder.

Nothing here unpickles: exports are safetensors, and a checkpoint goes through the engine's consolidation, which reads
DeepSpeed's shards only after their hashes have been checked. The dtype is always named, never taken from a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from data_prep.manifest import TOKENIZER
from data_prep.manifest import Manifest as DatasetManifest
from data_prep.tokenizer import load_tokenizer
from evaluation.plain import PlainCausalLM
from evaluation.plain_encoder import PlainEncoder, is_encoder_folder, max_length_of, pooling_of
from evaluation.untrained import untrained
from pretrain.config.load import load_run_config
from pretrain.config.presets import list_presets
from pretrain.config.registry import FAMILIES, resolve
from pretrain.config.run import RunConfig
from pretrain.config.source import PairsConfig, ShardsConfig
from pretrain.config.suggest import nearest
from pretrain.engine.consolidate import load_weights
from pretrain.errors import DataCorruption, UserError
from pretrain.models.base import BuildContext, Family
from pretrain.runfolder.layout import CheckpointRef, RunFolder, is_run_folder
from pretrain.runfolder.publish import MANIFEST, Manifest, hash_file
from pretrain.runfolder.retention import pinned

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Kind = Literal["run", "checkpoint", "export", "huggingface", "config"]
UNUSED = "pooler."
"""Weights of transformers' encoders that make nothing of what is read from them here; many folders lack them."""
PROVENANCE = "provenance.json"
"""Written by our export; tells an export from any other Hugging Face folder."""


@dataclass(frozen=True, slots=True)
class Target:
    """A model in eval mode and where it comes from."""

    path: Path
    kind: Kind
    model: PreTrainedModel
    module: torch.nn.Module
    """What is called, by the contract of `LMOutput`: our model, or a wrapper around a plain transformers model."""
    dtype: str
    device: torch.device
    vocab_size: int
    max_seq_len: int | None
    tokenizer: Tokenizer | None
    tokenizer_sha256: str | None
    eos_id: int | None
    config: RunConfig | None = None
    """Of runs, checkpoints and configs."""
    checkpoint: CheckpointRef | None = None
    run_folder: RunFolder | None = None
    manifest: Manifest | None = None
    weights_sha256: str = ""
    """Of a checkpoint's manifest, or over the safetensors files."""
    controls: Mapping[str, float] = field(default_factory=dict)
    """Values of the family's hooks at this step, which its forward was called with in training."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """What an export says of its own origin."""
    encodes: bool = False
    """Whether it gives vectors of texts, by the contract of `EncoderOutput`, and not probabilities of tokens."""

    def forward(self, *, controls: Mapping[str, float] | None = None, **inputs: Any) -> Any:
        """The model's forward as training calls it; `controls` come on top of those of its step."""
        both = {**self.controls, **(controls or {})}
        return self.module(**inputs, controls=both) if both else self.module(**inputs)

    @property
    def family(self) -> str:
        """Name of the family, or the architecture of a plain transformers model."""
        return self.config.model.family if self.config is not None else type(self.model).__name__

    def parameters(self) -> int:
        """Number of weights, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())


def open_target(text: str, *, dtype: str = "fp32", device: torch.device | None = None, step: int | None = None,
                best: bool = False, trust_remote_code: bool = False, sets: Sequence[str] = ()) -> Target:
    """Open a run folder, a checkpoint of any ZeRO stage, an export, a Hugging Face folder, or a config as it starts.

    Args:
        text: its path; the name of a preset or a YAML file stands for the untrained model that it describes.
        dtype: of the weights: fp32, bf16 or fp16.
        device: None takes CUDA where there is one, else the CPU.
        step: of a run: this checkpoint instead of the newest.
        best: of a run: the checkpoint that was best on validation.
        trust_remote_code: run code that comes with a Hugging Face folder.
        sets: of a config: changes, as "model.hidden_size=64".

    Raises:
        UserError: there is no such thing, or it does not fit the request.
        DataCorruption: a file differs from its manifest, or weights and architecture do not fit.
    """
    path = Path(text)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype}: one of {', '.join(DTYPES)} would be right")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if path.suffix in (".yaml", ".yml") or (not path.exists() and text in list_presets()):
        return _from_config(text, sets, dtype, device)
    if not path.is_dir():
        raise UserError(f"{text}: no such folder; give a run, a checkpoint, an export, a Hugging Face folder or a "
                        f"config{nearest(text, list_presets())}")
    if step is not None and best:
        raise UserError("give --step or --best, not both")
    if is_run_folder(path):
        folder = RunFolder.open(path)
        return _from_checkpoint(choose_checkpoint(folder, step=step, best=best), folder, path, "run", dtype, device)
    if step is not None or best:
        raise UserError(f"{text}: is no run; --step and --best choose among the checkpoints of one")
    ref = CheckpointRef.parse(path.resolve())
    if ref is not None and (path / MANIFEST).is_file():
        return _from_checkpoint(ref, RunFolder(ref.path.parents[1]), path, "checkpoint", dtype, device)
    if (path / "config.json").is_file() or (path / PROVENANCE).is_file():
        return _from_pretrained(path, dtype, device, trust_remote_code)
    raise UserError(f"{text}: is neither a run (config.yaml), a checkpoint (manifest.json) nor a model folder "
                    "(config.json)")


def choose_checkpoint(folder: RunFolder, *, step: int | None = None, best: bool = False) -> CheckpointRef:
    """The newest checkpoint of a run, that of `step`, or the best on validation. Raises UserError where none is."""
    known = folder.checkpoints()
    if not known:
        raise UserError(f"{folder.root}: has no checkpoint yet")
    if step is not None:
        found = [ref for ref in known if ref.step == step]
        if not found:
            raise UserError(f"{folder.root}: no checkpoint of step {step}; there are steps "
                            f"{', '.join(str(ref.step) for ref in reversed(known))}")
        return found[0]
    if best:
        metric = load_run_config(folder.config_file).config.eval.metric
        chosen = folder.read_pointer(f"best-{metric}")
        if chosen is None:
            raise UserError(f"{folder.root}: no checkpoint is marked best on {metric}; use --step, or the newest")
        return chosen
    return folder.read_pointer("latest") or known[0]


def _from_checkpoint(ref: CheckpointRef, folder: RunFolder, path: Path, kind: Kind, dtype: str,
                     device: torch.device) -> Target:
    if not folder.config_file.is_file():
        raise UserError(f"{ref.path}: its run has no {folder.config_file.name}, which says what model this is")
    config = load_run_config(folder.config_file).config
    with ExitStack() as stack:
        try:
            stack.enter_context(pinned(ref))
        except FileNotFoundError as error:
            raise UserError(f"{error}; choose another with --step") from None
        manifest = Manifest.read(ref.path)
        weights_sha256 = hash_file(ref.path / MANIFEST)
        weights = load_weights(ref.path)
        controls = json.loads((ref.path / "probe.json").read_bytes())["controls"]
    family: Family = resolve(FAMILIES, config.model.family, "model.family")
    model = family.build(config.model, BuildContext(seed=config.seed, document_masking=config.data.document_masking))
    put_weights(model, weights, str(ref.path))
    cast_parameters(model, DTYPES[dtype])
    model = model.to(device).eval()
    tokenizer, sha, eos = dataset_tokenizer(config)
    return Target(path, kind, model, model, dtype, device, config.model.vocab_size, config.model.max_seq_len, tokenizer,
                  sha, eos, config, ref, folder, manifest, weights_sha256, controls,
                  encodes=config.model.kind == "encoder")


def _from_config(text: str, sets: Sequence[str], dtype: str, device: torch.device) -> Target:
    """The model of a config before its first step."""
    config = load_run_config(text, sets).config
    family: Family = resolve(FAMILIES, config.model.family, "model.family")
    model = untrained(config, device)
    cast_parameters(model, DTYPES[dtype])
    tokenizer, sha, eos = dataset_tokenizer(config)
    return Target(Path(text), "config", model, model, dtype, device, config.model.vocab_size, config.model.max_seq_len,
                  tokenizer, sha, eos, config, controls=family.hooks(config).controls(0),
                  provenance={"step": 0, "train_tokens": 0}, encodes=config.model.kind == "encoder")


@torch.no_grad()
def put_weights(model: PreTrainedModel, weights: dict[str, torch.Tensor], where: str) -> None:
    """Copy weights into a model; tied ones may stand under one of their names only.

    Raises DataCorruption naming the first weight that is missing, unknown or of another shape.
    """
    named = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    for name, value in weights.items():
        if name not in named:
            raise DataCorruption(f"{where}: holds {name}, which the configured model does not have")
        if named[name].shape != value.shape:
            raise DataCorruption(f"{where}: {name} is {list(value.shape)}, the configured model's is "
                                 f"{list(named[name].shape)}")
        named[name].copy_(value)
    given = {id(named[name]) for name in weights}
    for name, parameter in model.named_parameters():
        if id(parameter) not in given:
            raise DataCorruption(f"{where}: holds no {name}, which the configured model has")


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast parameters and leave buffers: rotary frequencies and the like lose their meaning in 16 bits."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def dataset_tokenizer(config: RunConfig) -> tuple[Tokenizer | None, str | None, int | None]:
    """(tokenizer, its SHA-256, end-of-text id) of the dataset a run trains on; None where it is not a dataset here."""
    source = config.data.source
    if not isinstance(source, ShardsConfig | PairsConfig) or not (Path(source.path) / TOKENIZER).is_file():
        return None, None, None
    manifest = DatasetManifest.read(Path(source.path))
    return load_tokenizer(Path(source.path) / TOKENIZER), manifest.tokenizer_sha256, manifest.eos_id


def register_families() -> None:
    """Let transformers' Auto classes know the architectures of all our families."""
    for name in FAMILIES:
        resolve(FAMILIES, name, "model.family")


def _from_pretrained(path: Path, dtype: str, device: torch.device, trust_remote_code: bool) -> Target:
    register_families()
    provenance = read_provenance(path)
    check_files(path, provenance)
    if not any(path.glob("*.safetensors")):
        raise UserError(f"{path}: has no .safetensors file; pickled weights are not loaded here, convert them first")
    encoder = False
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
        encoder = is_encoder_folder(path, config.architectures)
        model, info = (AutoModel if encoder else AutoModelForCausalLM).from_pretrained(
            path, config=config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code, local_files_only=True,
            use_safetensors=True, output_loading_info=True)
    except (ValueError, OSError, KeyError) as error:
        what = "an encoder" if encoder else "a causal language model"
        raise UserError(f"{path}: cannot be loaded as {what} ({str(error).splitlines()[0]})") from None
    lost = [*info["missing_keys"], *info.get("mismatched_keys", [])]
    if encoder and lost and all(str(name).startswith(UNUSED) for name in lost):
        model.pooler, lost = None, []
    if lost:
        raise DataCorruption(f"{path}: the weights do not fill the architecture of config.json: "
                             f"{min(map(str, lost))} and {len(lost) - 1} more are missing or of another shape")
    model = model.to(device).eval()
    ours = type(model).__module__.startswith("pretrain.models.")
    file = path / TOKENIZER
    generation = getattr(model, "generation_config", None)
    eos = generation.eos_token_id if generation is not None else config.eos_token_id
    plain = PlainEncoder(model, pooling_of(path)) if encoder and not ours else PlainCausalLM(model)
    longest = max_length_of(path) or getattr(config, "max_position_embeddings", None)
    return Target(
        path, "export" if provenance else "huggingface", model, model if ours else plain.eval(), dtype,
        device, int(config.get_text_config().vocab_size), longest,
        load_tokenizer(file) if file.is_file() else None, hash_file(file) if file.is_file() else None,
        eos[0] if isinstance(eos, list) else eos, weights_sha256=hash_weights(path),
        controls=provenance.get("controls", {}) if ours else {}, provenance=provenance, encodes=encoder)


def read_provenance(folder: Path) -> dict[str, Any]:
    """What an export says of its origin; empty for other folders. Raises DataCorruption where it cannot be read."""
    try:
        stated: dict[str, Any] = json.loads((folder / PROVENANCE).read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataCorruption(f"{folder / PROVENANCE}: cannot be read ({error})") from None
    return stated


def check_files(folder: Path, provenance: dict[str, Any]) -> None:
    """Hold an export to the hashes it was published with. Raises DataCorruption naming the first file that differs."""
    for name, sha256 in provenance.get("files", {}).items():
        if not (folder / name).is_file():
            raise DataCorruption(f"{folder / name}: is missing")
        if hash_file(folder / name) != sha256:
            raise DataCorruption(f"{folder / name}: does not have the bytes that were exported (SHA-256 differs)")


def hash_weights(folder: Path) -> str:
    """SHA-256 over names and hashes of the safetensors files of a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {hash_file(file)}\n".encode())
    return digest.hexdigest()
