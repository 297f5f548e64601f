"""What is lost with a damaged file or archive is counted by what it held, and reading goes on behind the damage."""

import io
import tarfile
from pathlib import Path

import pytest

from data_prep.reading import SetAside
from data_prep.source_config import TarSource
from data_prep.sources import read_source
from data_prep.tally import BENIGN


def read(source):
    return list(read_source(source, 0, 1 << 20))


def parts(found):
    """(texts, what was set aside)."""
    return ([d.text.decode() for d in found if not isinstance(d, SetAside)],
            [d for d in found if isinstance(d, SetAside)])


def tar_of(names: list[str], format=tarfile.USTAR_FORMAT, **fields) -> bytes:
    """A tar whose members hold their own names."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(name.encode()))
    return out.getvalue()


NAMES = [f"{i:03d}.txt" for i in range(20)]


def tar_source(tmp_path: Path, content: bytes) -> TarSource:
    (tmp_path / "a.tar").write_bytes(content)
    return TarSource(name="w", path=str(tmp_path))


@pytest.mark.parametrize("format, fields, extended", [  # bytes of the extended header before each member
    (tarfile.USTAR_FORMAT, {}, 0), (tarfile.PAX_FORMAT, {"mtime": 1.5}, 1024)])
def test_a_tar_is_read_on_behind_a_broken_header(tmp_path, format, fields, extended):
    content = bytearray(tar_of(NAMES, format, **fields))
    at = content.rfind(b"010.txt", 0, content.find(b"011.txt")) // 512 * 512 - 512  # header before the content
    assert content[at:at + 7] == b"010.txt"
    content[at + 150] ^= 7
    texts, [gap] = parts(read(tar_source(tmp_path, bytes(content))))
    assert texts == [name for name in NAMES if name != "010.txt"]
    assert (gap.reason, gap.items, gap.provenance) == (
        "unreadable", 1, {"source": "w", "path": "a.tar", "sample": 10, "offset": at - extended})


def test_a_stretch_of_broken_headers_counts_the_samples_of_its_size(tmp_path):
    content = bytearray(tar_of(NAMES))
    content[5 * 1024:15 * 1024] = b"\xa5" * 10 * 1024
    texts, [gap] = parts(read(tar_source(tmp_path, bytes(content))))
    assert texts == NAMES[:5] + NAMES[15:]
    assert (gap.reason, gap.items, gap.provenance["offset"]) == ("unreadable", 10, 5 * 1024)
    content[15 * 1024:] = b"\xa5" * (len(content) - 15 * 1024)  # no whole header follows
    texts, [gap] = parts(read(tar_source(tmp_path, bytes(content))))
    assert texts == NAMES[:5] and gap.items >= 15


def test_tars_one_after_the_other_are_all_read(tmp_path):
    texts, aside = parts(read(tar_source(tmp_path, tar_of(NAMES[:7]) + tar_of(NAMES[7:]))))
    assert (texts, aside) == (NAMES, [])


def test_a_tar_cut_short_counts_as_many_samples_as_were_read(tmp_path):
    content = tar_of(NAMES)
    for end in (10 * 1024, 10 * 1024 + 100, 10 * 1024 + 515):
        texts, aside = parts(read(tar_source(tmp_path, content[:end])))
        assert texts == NAMES[:10]
        assert sum(item.items for item in aside) >= 10 and {item.reason for item in aside} == {"unreadable"}


def test_samples_without_the_member_are_counted_and_no_damage(tmp_path):
    names = [name for i in range(9) for name in (f"x/{i}.json", f"x/{i}.txt" if i % 3 else f"x/{i}.text")]
    texts, aside = parts(read(tar_source(tmp_path, tar_of(names))))
    assert texts == [f"x/{i}.txt" for i in range(9) if i % 3]
    assert [(item.reason, item.provenance["key"]) for item in aside] == [("no_member", f"x/{i}") for i in (0, 3, 6)]
    assert "no_member" in BENIGN
