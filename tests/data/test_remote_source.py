"""Shards from elsewhere: the batches of the local dataset, bounded on disk, damage and absence told in one line."""

import http.server
import shutil
import sys
import threading
from functools import partial
from itertools import islice
from typing import ClassVar

import numpy as np
import pytest
import torch

from pretrain.config.run import ResolvedBatch
from pretrain.config.source import DataConfig, OrderConfig
from pretrain.data.loader import UpdateLoader
from pretrain.data.open import open_source
from pretrain.data.order import GlobalOrder
from pretrain.data.remote import RemoteFolder
from pretrain.errors import DataCorruption, UserError

CAT = f"pipe:{sys.executable} -c 'import sys,shutil;shutil.copyfileobj(open(sys.argv[1],\"rb\"),sys.stdout.buffer)' "


class Quiet(http.server.SimpleHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path.rpartition("/")[2])
        super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def manifest(dataset):
    return dataset([37] * 30, block_tokens=16, blocks_per_shard=6)


@pytest.fixture
def served(manifest):
    """(address, names that were asked for) of the dataset behind a web server on this machine."""
    Quiet.asked = []
    handler = partial(Quiet, directory=str(manifest.folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", Quiet.asked
        server.shutdown()
        thread.join()


def remote(url, cache, **changes):
    config = DataConfig.model_validate({"seq_len": 8, "source": {"kind": "remote", "url": url, "cache": str(cache)}
                                        | changes})
    return open_source(config.source, config)


def local(manifest):
    config = DataConfig.model_validate({"seq_len": 8, "source": {"kind": "shards", "path": str(manifest.folder)}})
    return open_source(config.source, config)


@pytest.mark.parametrize("order", [{}, {"chunk_windows": 6, "lanes": 2}])
@pytest.mark.parametrize("workers, start", [(0, 0), (2, 3)])
def test_batches_are_those_of_the_local_dataset_with_a_cache_of_two_shards(manifest, served, tmp_path, order, workers,
                                                                           start):
    size = int(manifest.split("train").table["bytes"].max())
    assert manifest.split("train").n_shards > 5

    def batches(source, start, workers=0):
        whole = ResolvedBatch(global_batch_size=8, micro_batch_size=8, gradient_accumulation_steps=1,
                              data_parallel_size=1)
        positions = GlobalOrder([len(source)], global_batch_size=8, seed=1, order=OrderConfig(**order))
        with UpdateLoader(source, positions, whole, rank=0, start_k=start, workers=workers) as loader:
            return [torch.cat([update.micro_batches[0][name] for name in ("input_ids", "labels")])
                    for update in islice(loader, 12)]
    source = remote(served[0], tmp_path / "cache", cache_bytes=2 * size)
    assert source.fingerprint == local(manifest).fingerprint
    found, expected = batches(source, start, workers), batches(local(manifest), start)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sum(p.stat().st_size for p in (tmp_path / "cache").glob("*.tar")) <= (2 + workers) * size


def test_only_what_is_needed_is_fetched_and_only_once(manifest, served, tmp_path):
    source = remote(served[0], tmp_path / "cache")
    assert not [name for name in served[1] if name.endswith(".tar")]
    source.get(np.array([0, 1, 0]))
    assert [name for name in served[1] if name.endswith(".tar")] == ["train-000000.tar"]
    remote(served[0], tmp_path / "cache").get(np.array([2]))
    assert served[1].count("train-000000.tar") == 1


def test_a_command_gives_the_same(manifest, tmp_path):
    source = remote(CAT + f"{manifest.folder}/{{name}}", tmp_path / "cache")
    ids = np.arange(len(source))
    assert torch.equal(source.get(ids)["labels"], local(manifest).get(ids)["labels"])
    harmless = remote(CAT + f"'{manifest.folder}/{{name}}' '; touch {tmp_path}/pwned'", tmp_path / "other")
    assert len(harmless) == len(source) and not (tmp_path / "pwned").exists()  # no shell reads it


def test_damage_is_fetched_again_and_then_refused(manifest, tmp_path):
    copy = shutil.copytree(manifest.folder, tmp_path / "elsewhere")
    tar = copy / "train-000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1] + b"\1")
    folder = RemoteFolder(CAT + f"{copy}/{{name}}", tmp_path / "cache", 10**9, pause=0.01)
    seen = []

    def fault(path):
        seen.append(path)
        if len(seen) == 2:
            tar.write_bytes(whole)
        return None if path.read_bytes() == whole else "it is not whole"
    assert folder.fetch("train-000001.tar", fault).read_bytes() == whole
    assert len(seen) == 3
    with pytest.raises(DataCorruption, match=r"train-000002\.tar: arrives damaged \(never\)"):
        folder.fetch("train-000002.tar", lambda _: "never")
    assert not (tmp_path / "cache" / "train-000002.tar").exists()


def test_what_is_not_there_is_the_users_error_in_one_line(served, manifest, tmp_path):
    with pytest.raises(UserError, match=r"/gone/manifest\.json: cannot be fetched \(HTTP Error 404"):
        remote(served[0] + "/gone", tmp_path / "a")
    with pytest.raises(UserError, match=r"needs \{name\}"):
        remote("pipe:cat x", tmp_path / "b")
    with pytest.raises(ValueError, match="url"):
        remote("ftp://x", tmp_path / "c")
    source = remote(served[0], tmp_path / "d")
    (manifest.folder / "train-000000.tar").unlink()
    with pytest.raises(UserError, match=r"train-000000\.tar: cannot be fetched"):
        source.get(np.array([0]))
