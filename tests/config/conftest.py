import textwrap
from types import ModuleType
from typing import Literal

import pytest
from pydantic import Field

from pretrain.config import registry
from pretrain.config.model import ModelConfig, ParameterCount

BASE = """
model: {family: toy, width: 16}
data: {source: {path: data/x}}
objective: {name: causal_lm}
"""


class ToyConfig(ModelConfig):
    """A second family: 10 parameters a unit of width, half of them trainable."""

    family: Literal["toy"] = "toy"
    width: int = Field(8, ge=1, le=64, description="units")
    depth: int = 2

    kind = property(lambda self: "causal_lm")
    vocab_size = property(lambda self: 100)
    max_seq_len = property(lambda self: 1024)

    def parameter_count(self):
        return ParameterCount(total=10 * self.width, trainable=5 * self.width)

    def flops_per_token(self, seq_len):
        return 2.0 * 10 * self.width

    def activation_bytes_per_token(self, seq_len, *, element_bytes, checkpointing, scored=None):
        return float(self.width * element_bytes * (1 if checkpointing else 4))

    def tiny(self):
        return self


class OtherConfig(ToyConfig):
    family: Literal["other"] = "other"
    height: int = 3


@pytest.fixture(autouse=True)
def toy_families(monkeypatch):
    module = ModuleType("toy_schema")
    module.Toy, module.Other = ToyConfig, OtherConfig
    monkeypatch.setitem(__import__("sys").modules, "toy_schema", module)
    monkeypatch.setitem(registry.MODEL_SCHEMAS, "toy", "toy_schema:Toy")
    monkeypatch.setitem(registry.MODEL_SCHEMAS, "other", "toy_schema:Other")


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write files into the working folder; messages then name them by their plain names."""
    monkeypatch.chdir(tmp_path)

    def _write(text, name="run.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return _write


@pytest.fixture
def base(write):
    return write(BASE, "base.yaml")
