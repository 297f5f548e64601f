"""Tensors through a process boundary."""

import os
from multiprocessing import get_context

import pytest
import torch

from pretrain.data.transfer import HAS_MEMFD, Parcel

pytestmark = pytest.mark.skipif(not HAS_MEMFD, reason="memfd is a Linux call")


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"ids": torch.arange(77).reshape(7, 11), "narrow": torch.arange(5, dtype=torch.int16),
            "flags": torch.tensor([[True], [False]]), "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5),
            "values": torch.randn(3, 4, 5, generator=generator), "view": torch.arange(20).reshape(4, 5)[:, 1:3]}


def test_what_arrives_is_what_was_sent_and_may_be_written_to():
    context = get_context("fork")
    queue = context.Queue()
    sender = context.Process(target=lambda: (queue.put(Parcel(tensors())), queue.put(Parcel(tensors())),
                                             queue.close(), queue.join_thread(), done.wait()))
    done = context.Event()
    sender.start()
    received, again = queue.get(timeout=30), queue.get(timeout=30)
    done.set()
    sender.join()
    for name, tensor in tensors().items():
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor)
    received["ids"][0, 0] = 99
    assert again["ids"][0, 0] == 0


def test_nothing_stays_open():
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        test_what_arrives_is_what_was_sent_and_may_be_written_to()
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 0
