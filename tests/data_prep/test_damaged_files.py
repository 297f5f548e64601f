"""What is lost with a damaged file or archive is counted by what it held, and reading goes on behind the damage."""

import csv
import gzip
import io
import random
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.pipeline import prepare
from data_prep.reading import SetAside, lost_items
from data_prep.source_config import HubDataset, HubSource, JsonlSource, ParquetSource, TableSource, TarSource
from data_prep.sources import read_source
from data_prep.tables import TableRow, read_table
from data_prep.tally import BENIGN
from pretrain.errors import DataCorruption


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


def test_a_hole_of_zeros_in_a_tar_is_damage(tmp_path):
    names = [f"{i:03d}.txt" for i in range(60)]
    content = bytearray(tar_of(names))
    content[5 * 1024:35 * 1024] = bytes(30 * 1024)  # up to a header: more than the end of a tar has
    texts, [gap] = parts(read(tar_source(tmp_path, bytes(content))))
    assert texts == names[:5] + names[35:]
    assert (gap.reason, gap.items, gap.provenance["offset"]) == ("unreadable", 30, 5 * 1024)
    content = bytearray(tar_of(names))
    content[5 * 1024:8 * 1024 + 512] = bytes(3 * 1024 + 512)  # up to the middle of a member
    texts, [gap] = parts(read(tar_source(tmp_path, bytes(content))))
    assert (texts, gap.items) == (names[:5] + names[9:], 4)


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


def table(tmp_path: Path, name: str, content: str) -> TableSource:
    (tmp_path / name).write_text(content, newline="")
    return TableSource(name="t", path=str(tmp_path / name))


def rows(count: int, separator: str = ",") -> list[str]:
    return [f"id{separator}text", *(f"{i}{separator}row {i}" for i in range(1, count))]


@pytest.mark.parametrize("ending", ["", "\n"])
def test_a_quote_that_nothing_closes_costs_its_line(tmp_path, ending):
    lines = rows(300)
    lines[200] = '200,"row 200'
    texts, [aside] = parts(read(table(tmp_path, "a.csv", "\n".join(lines) + ending)))
    assert texts == [f"row {i}" for i in range(1, 300) if i != 200]
    assert (aside.reason, aside.provenance["line"], aside.items) == ("open_quote", 201, 1)
    lines[250] = '250,"row" 250'  # the next quote is followed by text: it does not close the field of line 201
    lines[299] = '299,"row 299'  # open at the end of the file
    texts, aside = parts(read(table(tmp_path, "a.csv", "\n".join(lines) + ending)))
    assert texts == [f"row {i}" for i in range(1, 299) if i != 200]
    assert [item.provenance["line"] for item in aside] == [201, 300]


def test_a_quoted_field_longer_than_any_text_is_damage(tmp_path):
    lines = rows(9)
    lines[2] = '2,"' + "\n".join(["x" * 99] * 99)
    (tmp_path / "a.csv").write_text("\n".join(lines))
    with (tmp_path / "a.csv").open("rb") as stream:
        found = list(read_table(stream, ".csv", 1000))
    assert [row.line for row in found if row.fields is None] == [3]
    assert found[-1] == TableRow(107, 1, ["8", "row 8"])


def test_quoted_fields_over_lines_are_read_and_named_by_their_first_line(tmp_path):
    content = 'id,text\n1,"a\n""b"",\n\nc"\n2,d\n3,"e\r\nf"\n\n4,"g"h\n'
    found = read(table(tmp_path, "a.csv", content))
    assert [(d.text.decode(), d.provenance["line"]) for d in found] == [
        ('a\n"b",\n\nc', 2), ("d", 6), ("e\r\nf", 7), ("gh", 10)]
    [_, bad] = read(table(tmp_path, "a.csv", 'id,text\n1,a\n2,"b\nc\nd",e\n'))
    assert (bad.reason, bad.provenance["line"], bad.items) == ("bad_row", 3, 3)


def test_a_tsv_is_read_as_the_csv_module_writes_it_and_other_quotes_are_text(tmp_path):
    out = io.StringIO()
    texts = ["two\nlines", 'a "word"', "tab\tinside", "plain"]
    csv.writer(out, delimiter="\t").writerows([["id", "text"], *enumerate(texts)])
    assert parts(read(table(tmp_path, "a.tsv", out.getvalue()))) == (texts, [])
    plain = ['"Go", she said', '"open', "19\" wide", 'he said "no"', 'a closing"', "last"]
    content = "".join(f"{line}\n" for line in ["id\ttext", *(f"{i}\t{text}" for i, text in enumerate(plain))])
    assert parts(read(table(tmp_path, "a.tsv", content))) == (plain, [])


@pytest.mark.parametrize("name", ["A.CSV", "A.Csv.GZ"])
def test_a_suffix_counts_in_any_case(tmp_path, name):
    content = "\n".join(rows(5)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
    texts, aside = parts(read(TableSource(name="t", path=str(tmp_path / name))))
    assert (texts, aside) == ([f"row {i}" for i in range(1, 5)], [])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.csv.gz", "a.tar"])
def test_a_compressed_file_or_tar_of_0_bytes_is_damage(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    kind = {".jsonl": JsonlSource, ".csv": TableSource, ".tar": TarSource}[f".{name.split('.')[1]}"]
    [aside] = read(kind(name="e", path=str(tmp_path)))
    assert (aside.reason, aside.items, aside.provenance["path"]) == ("unreadable", 1, name)


@pytest.mark.parametrize("name, kind", [("a.jsonl", JsonlSource), ("a.csv", TableSource)])
def test_a_plain_file_of_0_bytes_is_counted_as_empty(tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"")
    [aside] = read(kind(name="e", path=str(tmp_path)))
    assert (aside.reason, aside.provenance) == ("empty", {"source": "e", "path": name})


def test_of_a_damaged_row_group_the_rest_is_counted_and_the_next_one_read(tmp_path):
    draw = random.Random(0)
    texts = [f"{i} {draw.random()}" for i in range(2000)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=500, data_page_size=1024,
                                use_dictionary=False, write_batch_size=64, compression="NONE")
    content = bytearray(path.read_bytes())
    at = content.find(texts[800].split()[1].encode())
    assert at > 0
    content[at:at + 2000] = b"\xff" * 2000  # the header of the next page among them
    path.write_bytes(content)
    found, [aside] = parts(read(ParquetSource(name="p", path=str(path))))
    assert (aside.reason, aside.provenance["row"] + aside.items) == ("unreadable", 1000)
    assert 500 <= aside.provenance["row"] <= 900
    assert found == texts[:aside.provenance["row"]] + texts[1000:]


def test_the_rest_of_a_damaged_file_is_counted_by_its_bytes():
    assert lost_items(0, 0, 100 * 4096, cut=False) == 100  # nothing was read
    assert lost_items(50, 0, 10, cut=True) == 50  # its size says nothing about what is gone
    mb = 1 << 20
    assert lost_items(900, 91 * mb, 100 * mb, cut=False) == 100  # a MB of the 91 was read ahead
    assert lost_items(7, 1000, 1000, cut=False) == 7  # all of it was read ahead


def test_a_stream_that_ends_in_an_error_is_fatal_and_a_dataset_counts_its_rest(monkeypatch):
    class Broken(list):
        def __iter__(self):
            yield from [{"text": f"row {i}"} for i in range(3)]
            raise OSError("connection lost")

        def select(self, _):
            return self
    monkeypatch.setattr("data_prep.rows.open_hub", lambda *_: Broken(range(10)))
    stream = HubSource(name="h", dataset=HubDataset(path="far/away", streaming=True))
    with pytest.raises(DataCorruption, match=r"source h: the stream far/away ends in an error at row 3, .*lost"):
        read(stream)
    assert DataCorruption.code == 3
    whole = stream.model_copy(update={"dataset": HubDataset(path="far/away")})
    texts, [aside] = parts(read(whole))
    assert (texts, aside.items) == ([f"row {i}" for i in range(3)], 7)


def test_pairs_whose_column_of_negatives_is_gone_are_kept_and_counted(make_config, tmp_path):
    (tmp_path / "in").mkdir()
    for name, column in (("a.csv", "negative"), ("b.csv", "neg")):
        lines = [f"query,positive,{column}", *(f"query {name} {i},positive {i},negative {i}" for i in range(20))]
        (tmp_path / "in" / name).write_text("\n".join(lines))
    source = {"kind": "pair_table", "name": "p", "path": str(tmp_path / "in"), "glob": "*.csv",
              "negatives": ["negative"]}
    made = prepare(make_config(tmp_path / "d", sources=[source], splits={}, max_bad_fraction=0)).provenance
    assert made["counts"]["p"]["kept"]["documents"] == 40
    assert made["changes"]["p"]["pairs_without_negatives"] == 20
