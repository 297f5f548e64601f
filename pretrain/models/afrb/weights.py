"""The backbone's weights from a folder of safetensors: an export of this stack or a local Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.models.afrb.model import AFRBForCausalLM

KEY = "model.backbone.weights"
_PREFIXES = ("", "native.", "model.", "transformer.", "backbone.native.")
"""Where a name of ours may stand in a file: wrapped exports add a prefix, published base models leave one out."""
_OWN = "backbone.native."
Write = Callable[[str, Tensor], object]


def load_backbone(model: AFRBForCausalLM, folder: Path, write: Write | None = None, *,
                  only: Collection[str] | None = None) -> int:
    """Fill the backbone from `folder`; attention weights that were taken out are passed over. Returns tensors read.

    Args:
        model: its backbone is filled.
        folder: one or more .safetensors files.
        write: (name, value) sets a parameter of the model; None: in place.
        only: names of the model's parameters to be filled; None: all of the backbone.

    Raises:
        UserError: nothing to read, a weight is missing, or has another shape.
    """
    source = _Source(folder)
    parameters = {name: parameter for name, parameter in model.backbone.native.named_parameters()
                  if only is None or _OWN + name in only}
    tied = _tied(model.backbone.native)
    for name, parameter in parameters.items():
        value = next((found for alias in tied.get(name, [name]) if (found := source.read(alias)) is not None), None)
        if value is None:
            raise UserError(f"{KEY}: {folder} holds no {name}: it is of another model than model.backbone.hf_config")
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if tuple(value.shape) != shape:
            raise UserError(f"{KEY}: {name} is {list(value.shape)} in {folder}, but model.backbone.hf_config makes it "
                            f"{list(shape)}")
        if write is None:
            with torch.no_grad():
                parameter.copy_(value)
        else:
            write(_OWN + name, value)
    return len(parameters)


class _Source:
    """Tensors of a folder by name, read one at a time."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{KEY}: {folder} is no folder; give an export or a Hugging Face folder")
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{KEY}: {folder} has no .safetensors file; pickled weights are not loaded here, convert "
                            "them first")
        self.places = {name: file for file in files for name in self._names(file)}

    def _names(self, file: Path) -> Iterator[str]:
        try:
            with safe_open(file, framework="pt") as opened:
                yield from opened.keys()
        except Exception as error:  # safetensors raises a class of its own that it does not export
            raise UserError(f"{KEY}: {file}: cannot be read ({error})") from None

    def read(self, name: str) -> Tensor | None:
        """A weight of the backbone under whatever name this folder has for it."""
        bare = name.split(".", 1)[1] if name.startswith(("model.", "transformer.")) else name
        for found in (*(prefix + name for prefix in _PREFIXES), bare):
            if found in self.places:
                with safe_open(self.places[found], framework="pt") as opened:
                    return opened.get_tensor(found)
        return None


def _tied(native: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by the one under which it is listed."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in native.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in by_id.values()}
