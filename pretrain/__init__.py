"""Pretraining of unusual architectures on DeepSpeed."""

__version__ = "0.1.0"
