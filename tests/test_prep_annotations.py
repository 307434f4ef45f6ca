"""Annotation lists: every form, every row accounted for, nothing believed unchecked."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import time
import tracemalloc
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from prep import annotation_json
from prep.annotation_overlap import ListCounts
from prep.annotations import (
    ANY_SPLIT,
    ClassFolders,
    DeepMindJson,
    KineticsCsv,
    PathList,
    kinetics_class_list,
    normalise_split,
    open_annotations,
    overlap,
    read_class_list,
)
from prep.errors import StorageError, UsageError
from prep.journal import Journal
from prep.ledger import read_ledger, write_ledger
from prep.merge_plan import case_notes
from prep.overlap_command import overlap_command
from prep.segment import BadRow, Segment

HEADER = "label,youtube_id,time_start,time_end,split"
ID_CHARACTERS = "ABCXYZabcxyz0189_-"
PRINTABLE = st.characters(codec="utf-8", exclude_categories=("C", "Z"), include_characters=" ")
QUICK = settings(max_examples=60)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for property tests, whose examples must not share a function's tmp_path."""
    return tmp_path_factory.mktemp("lists")


def written(folder: Path, text: str | bytes, name: str = "list.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape"))
    return path


def read(path: Path, split: str = "train") -> list[Segment | BadRow]:
    return list(open_annotations(path, split))


def one(path: Path, split: str = "train") -> Segment:
    (item,) = read(path, split)
    assert isinstance(item, Segment), item
    return item


# -- the real lists -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split", "classes"),
    [
        # the mirror's val and test lists have as many rows, 19,906 and 38,685
        ("activitynet/kinetics-400_val.csv", "val", 400),
        ("activitynet/kinetics-400_test.csv", "test", 0),
        ("activitynet/kinetics-600_val.csv", "val", 600),
        ("mini_kinetics_200/build_kinetics_200_train.csv", "train", 200),
        ("tiny_kinetics_400/tiny_train.csv", "train", 400),
        ("tiny_kinetics_400/tiny_val.csv", "validate", 400),
        ("datumaro_kinetics_example/test.csv", "test", 2),
    ],
)
def test_real_tables_parse_in_full(corpus: Path, name: str, split: str, classes: int) -> None:
    path = corpus / "annotations" / name
    listing = open_annotations(path, split)
    items = list(listing)
    with path.open(newline="") as file:
        expected = list(csv.DictReader(file))  # the standard library's reading, for comparison
    assert len(items) == len(expected)
    for item, row in zip(items, expected, strict=True):
        assert isinstance(item, Segment)
        assert (item.video_id, item.label) == (row["youtube_id"], row.get("label"))
        assert (item.start_seconds, item.end_seconds) == (
            float(row["time_start"]),
            float(row["time_end"]),
        )
    assert len({item.label for item in items if isinstance(item, Segment)} - {None}) == classes
    assert listing.other_splits == 0


def test_official_counts(corpus: Path) -> None:
    lists = corpus / "annotations" / "activitynet"
    val, test = read(lists / "kinetics-400_val.csv", "val"), lists / "kinetics-400_test.csv"
    assert len(val) == 19_906  # rows of the mirror's list, too
    assert len(read(test, "test")) == 38_685
    keys = {item.key for item in val if isinstance(item, Segment)}
    assert len(keys) == 19_906
    assert (
        sum(key.startswith("v__") for key in keys) == 8
    )  # ids that begin with __, see `Segment.key`
    six = open_annotations(lists / "kinetics-600_val.csv", "val")
    ids = [item.video_id for item in six if isinstance(item, Segment)]
    assert len(ids) == 30_000
    assert len(set(ids)) < len(ids)  # two segments of one video are two rows
    listing = open_annotations(test, "val")
    assert list(listing) == []
    assert listing.other_splits == 38_685
    assert listing.notes == ["38685 rows of kinetics-400_test.csv are of other splits"]


def test_class_order_is_torchvisions(corpus: Path) -> None:
    lists = corpus / "annotations"
    val = read(lists / "activitynet" / "kinetics-400_val.csv", "val")
    labels = [item.label or "" for item in val if isinstance(item, Segment)]
    torchvision = lists / "torchvision" / "kinetics400_categories_torchvision.txt"
    assert kinetics_class_list(labels) == torchvision.read_text().splitlines()
    for size in (400, 600, 700):
        names = read_class_list(lists / "mmaction2" / f"kinetics_label_map_k{size}.txt")
        assert len(names) == size
        assert kinetics_class_list(reversed(names)) == names


def test_class_order_of_numbers_is_by_value() -> None:
    assert kinetics_class_list(["10", "9", "1", "9"]) == ["1", "9", "10"]
    assert kinetics_class_list(["10", "9", "a"]) == ["10", "9", "a"]
    assert kinetics_class_list([]) == []


def test_ucf101_lists(corpus: Path) -> None:
    folder = corpus / "annotations" / "efficient3dcnns" / "annotation_UCF101"
    labels = []
    for name in ("trainlist01.txt", "testlist01.txt"):
        path = folder / name
        items = read(path)
        rows = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(items) == len(rows)
        for item, row in zip(items, rows, strict=True):
            assert isinstance(item, Segment)
            assert item.path == row.split()[0]
            assert item.label == row.partition("/")[0]  # class 1 of classInd.txt is that folder
        labels.append({item.label for item in items if isinstance(item, Segment)})
    assert labels[0] == labels[1]
    assert len(labels[0]) == 101


def test_deepmind_example(corpus: Path) -> None:
    path = corpus / "annotations" / "datumaro_kinetics_example" / "train.json"
    segment = one(path)
    assert segment == Segment("3", 0.0, 2.0, "label_2", "train", '{"duration":2.0}')
    assert open_annotations(path, "val").sha256 == open_annotations(path, "train").sha256


# -- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", "\t", ";", " "])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_any_delimiter_and_line_end(tmp_path: Path, delimiter: str, newline: str) -> None:
    rows = [
        ["label", "youtube_id", "time_start", "time_end", "split", "is_cc"],
        ['"air drumming"', "--6bJUbfpnQ", "17", "27.5", "validate", "0"],
        ["", "", ""],
        ["abseiling", "_-aBlJFi7LY", "1e1", "20", "val", "1"],
        ["abseiling", "0wR5jVB-WPk", "417", "427", "train", "0"],
    ]
    text = newline.join(delimiter.join(row) if any(row) else "  " for row in rows)
    listing = open_annotations(written(tmp_path, b"\xef\xbb\xbf" + text.encode(), "a.txt"), "val")
    assert list(listing) == [
        Segment("--6bJUbfpnQ", 17.0, 27.5, "air drumming", "val", '{"is_cc":"0"}'),
        Segment("_-aBlJFi7LY", 10.0, 20.0, "abseiling", "val", '{"is_cc":"1"}'),
    ]
    assert listing.other_splits == 1


def test_columns_by_other_names_and_in_another_order(tmp_path: Path) -> None:
    text = "Split;End Time;Start-Time;YouTube ID;Class Name;;\nval;20;10;--6bJUbfpnQ;a;x;y\n"
    assert one(written(tmp_path, text), "val") == Segment(
        "--6bJUbfpnQ", 10.0, 20.0, "a", "val", '{"column_6":"x","column_7":"y"}'
    )


def test_unquoted_label_with_spaces_between_spaces(tmp_path: Path) -> None:
    text = (
        "label youtube_id time_start time_end split\nair drumming a  --6bJUbfpnQ 1 2   train\n"
        "zumba 0wR5jVB-WPk 3 4 train\n"
    )
    found = read(written(tmp_path, text))
    assert [item.label for item in found if isinstance(item, Segment)] == [
        "air drumming a",
        "zumba",
    ]


@pytest.mark.parametrize("delimiter", [",", "\t", ";", " "])
@pytest.mark.parametrize("order", ["label first", "id first", "no label"])
def test_headerless_columns_are_recognised(tmp_path: Path, delimiter: str, order: str) -> None:
    # kitesurfing has 11 letters, as an id has
    ids = [f"-{number:09d}_" for number in range(30)]
    rows = {
        "label first": [["kitesurfing", name, "10", "20.5", "train", "0"] for name in ids],
        "id first": [[name, "10", "20.5", "kitesurfing", "train", "0"] for name in ids],
        "no label": [[name, "10", "20.5", "train", "0"] for name in ids],
    }[order]
    text = "\n".join(delimiter.join(row) for row in rows)
    listing = open_annotations(written(tmp_path, text), "train")
    label = None if order == "no label" else "kitesurfing"
    extra = f'{{"column_{len(rows[0])}":"0"}}'
    assert list(listing) == [Segment(name, 10.0, 20.5, label, "train", extra) for name in ids]
    assert "no header line; its columns were taken as" in listing.notes[0]


def test_headerless_bad_first_row_is_a_bad_row(tmp_path: Path) -> None:
    text = "what is this\nabseiling,0wR5jVB-WPk,4,9\nabseiling,3caPS4FHFF8,36,46\n"
    bad, *good = read(written(tmp_path, text))
    assert isinstance(bad, BadRow)
    assert bad.detail == "list.csv, line 1: 1 fields, the first rows 4"
    assert len(good) == 2


def test_headerless_without_a_clear_label_is_refused(tmp_path: Path) -> None:
    text = "a,b,0wR5jVB-WPk,4,9\nc,d,3caPS4FHFF8,36,46\n"
    with pytest.raises(UsageError, match="add a line like label,youtube_id"):
        open_annotations(written(tmp_path, text), "train")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("hello world\nand so on\n", "is no Kinetics list"),
        ("label,video\na,b\n", r"missing: time_start, time_end|missing: youtube_id"),
        ("label,youtube_id,time_start,time_end,label\n", "two columns for label"),
        (b"\xff\xfel\x00a\x00", "is UTF-16; save it as UTF-8"),
        ("x" * 200_000 + "\n", "its first line has no end"),
        ("{]", "DeepMind"),
        ('{"a": {"annotations": {"segment": [1, 2]}}', "line 1: expected"),
        ('{"a": {}} {', "something follows the closing brace"),
        ("{" * 100_000, "a key must be text|cannot be read"),
        ('{"a":' * 100_000, "cannot be read"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, text: str | bytes, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        read(written(tmp_path, text))


def test_missing_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        open_annotations(tmp_path / "none.csv", "val")


HOSTILE = [
    ("../../etc/pas", "1", "2", "a"),
    ("a/b/c/d/e/f", "1", "2", "a"),
    ("$(touch x)", "1", "2", "a"),
    ("`id`", "1", "2", "a"),
    ("..", "1", "2", "a"),
    ("a\x00bcdefghij", "1", "2", "a"),
    ("a\x1b[2Jbcdefg", "1", "2", "a"),
    ("x" * 100_000, "1", "2", "a"),
    ("", "1", "2", "a"),
    ("0wR5jVB-WPk", "-1", "2", "a"),
    ("0wR5jVB-WPk", "nan", "2", "a"),
    ("0wR5jVB-WPk", "1", "inf", "a"),
    ("0wR5jVB-WPk", "1", "1e308", "a"),
    ("0wR5jVB-WPk", "9", "2", "a"),
    ("0wR5jVB-WPk", "2", "2", "a"),
    ("0wR5jVB-WPk", "", "", "a"),
    ("0wR5jVB-WPk", "0:10", "0:20", "a"),
    ("0wR5jVB-WPk", "1_0", "2_0", "a"),
    ("0wR5jVB-WPk", "1", "2", "a\x07"),
    ("0wR5jVB-WPk", "1", "2", "a" * 1000),
    ("0wR5jVB-WPk", "1", "2", "l\udcffbel"),
]


@pytest.mark.parametrize("row", HOSTILE, ids=[str(number) for number in range(len(HOSTILE))])
@pytest.mark.parametrize("form", ["csv", "json"])
def test_hostile_rows_are_bad_rows(tmp_path: Path, row: tuple[str, ...], form: str) -> None:
    video_id, start, end, label = row
    if form == "csv":
        good = "a,0wR5jVB-WPk,1,2,train\n"
        text = f'{HEADER}\n{good}"{label}","{video_id}",{start},{end},train\n{good}'
    else:
        entries = [
            (name, {"annotations": {"label": told, "segment": [first, last]}, "subset": "train"})
            for name, first, last, told in (
                ("0wR5jVB-WPk", 1, 2, "a"),
                (video_id, start, end, label),
                ("0wR5jVB-WP_", 1, 2, "a"),
            )
        ]
        # Written by hand, as a JSON object can hold a key twice
        body = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries)
        text = f"{{\n{body}\n}}"
    items = read(written(tmp_path, text, f"hostile.{form}"))
    assert [type(item) for item in items] == [Segment, BadRow, Segment]
    (bad,) = (item for item in items if isinstance(item, BadRow))
    assert bad.line == 3
    assert bad.detail.startswith(f"hostile.{form}, line 3: ")
    assert len(bad.detail) < 250
    assert bad.detail.isascii()


def test_a_quote_that_is_never_closed_spoils_one_row(tmp_path: Path) -> None:
    row = "abseiling,0wR5jVB-WPk,1,2,train\n"
    items = read(written(tmp_path, f'{HEADER}\n{row}"abseiling,0wR5jVB-WPk,1,2,train\n{row * 5}'))
    assert [isinstance(item, BadRow) for item in items] == [False, True, *[False] * 5]
    assert items[1] == BadRow(3, "list.csv, line 3: unmatched quotes")


def test_a_newline_inside_quotes_spoils_two_lines(tmp_path: Path) -> None:
    text = f'{HEADER}\na,"0wR5j\nVB-WPk",1,2,train\nb,0wR5jVB-WPk,1,2,train\n'
    items = read(written(tmp_path, text))
    assert [isinstance(item, BadRow) for item in items] == [True, True, False]


def test_rows_without_a_label_are_kept_and_counted(tmp_path: Path) -> None:
    text = f"{HEADER}\n,0wR5jVB-WPk,1,2,train\na,0wR5jVB-WPk,3,4,train\n"
    listing = open_annotations(written(tmp_path, text), "train")
    assert [item.label for item in listing if isinstance(item, Segment)] == [None, "a"]
    assert listing.notes == ["1 rows of list.csv have no label"]


ROWS = st.lists(
    st.tuples(
        st.text(PRINTABLE, min_size=1, max_size=20).map(str.strip).filter(bool),
        st.text(ID_CHARACTERS, min_size=11, max_size=11),
        st.integers(0, 10_000),
        st.one_of(st.integers(1, 60), st.floats(0.001, 60)),
        st.sampled_from(["train", "val", "test", "validate"]),
    ),
    min_size=1,
    max_size=20,
)


@QUICK
@given(ROWS, st.sampled_from(",\t; "), st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
def test_generated_tables_round_trip(
    scratch: Path, rows: list[tuple[str, str, int, float, str]], delimiter: str, quoting: int
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator="\n")  # type: ignore[arg-type]
    writer.writerow(HEADER.split(","))
    writer.writerows((label, name, start, start + length, split)
                     for label, name, start, length, split in rows)  # fmt: skip
    listing = KineticsCsv(written(scratch, text.getvalue()), "val")
    expected = [
        Segment(name, float(start), float(start + length), label, "val")
        for label, name, start, length, split in rows
        if normalise_split(split) == "val"
    ]
    assert list(listing) == expected
    assert len(expected) + listing.other_splits == len(rows)


@QUICK
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=60), max_size=20))
def test_every_line_of_a_table_is_accounted_for(scratch: Path, rows: list[str]) -> None:
    good = ["a,0wR5jVB-WPk,1,2,train", "a,0wR5jVB-WPk,1,2,val"]
    path = written(scratch, "\n".join([HEADER, *good, *rows]))
    # Universal newlines, as a text file is read; a line of white space is no row
    count = sum(bool(line.strip()) for line in path.read_text("utf-8").split("\n")) - 1
    listing = open_annotations(path, "train")
    items = list(listing)
    assert all(isinstance(item, (Segment, BadRow)) for item in items)
    assert len(items) + listing.other_splits == count
    assert items == list(listing)


@QUICK
@given(st.binary(max_size=300))
def test_any_bytes_are_a_list_or_a_clear_refusal(scratch: Path, data: bytes) -> None:
    path = written(scratch, data, "anything")
    with contextlib.suppress(UsageError):
        assert all(isinstance(item, (Segment, BadRow)) for item in read(path))


# -- JSON -----------------------------------------------------------------------------------------


@QUICK
@given(ROWS, st.integers(1, 40), st.sampled_from([None, 2]))
def test_json_is_read_entry_by_entry(
    scratch: Path, rows: list[tuple[str, str, int, float, str]], chunk: int, indent: int | None
) -> None:
    entries = {
        name: {
            "annotations": {"label": label, "segment": [start, start + length]},
            "duration": length,
            "subset": split,
            "url": f"https://www.youtube.com/watch?v={name}",
        }
        for label, name, start, length, split in rows
    }
    path = written(scratch, json.dumps(entries, indent=indent), "train.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotation_json, "_CHUNK_CHARACTERS", chunk)  # every cut must be survived
        listing = DeepMindJson(path, "val")
        items = list(listing)
    expected = [
        (name, float(entry["annotations"]["segment"][0]), entry["annotations"]["label"])  # type: ignore[index]
        for name, entry in entries.items()
        if normalise_split(str(entry["subset"])) == "val"
    ]
    assert [
        (item.video_id, item.start_seconds, item.label)
        for item in items
        if isinstance(item, Segment)
    ] == expected
    assert len(items) + listing.other_splits == len(entries)


def test_json_entries_of_other_shapes(tmp_path: Path) -> None:
    text = """{
      "0wR5jVB-WP0": {"annotations": {"segment": [1.5, 2]}, "subset": "testing"},
      "0wR5jVB-WP1": {"annotations": [{"segment": [1, 2]}, {"segment": [3, 4]}], "subset": "test"},
      "0wR5jVB-WP2": {"annotations": {"segment": [NaN, 2]}, "subset": "test"},
      "0wR5jVB-WP3": {"annotations": {"segment": [true, 2]}, "subset": "test"},
      "0wR5jVB-WP4": {"annotations": {"segment": [1, 2], "label": 7}},
      "0wR5jVB-WP5": {"annotations": null},
      "0wR5jVB-WP6": [],
      "0wR5jVB-WP7": {"annotations": {"segment": [1, 2]}, "subset": "train"}
    }"""
    listing = open_annotations(written(tmp_path, text, "x.json"), "test")
    items = list(listing)
    starts = [item.start_seconds for item in items if isinstance(item, Segment)]
    assert starts == [1.5, 1.0, 3.0]
    assert [item.line for item in items if isinstance(item, BadRow)] == [4, 5, 6, 7, 8]
    assert listing.other_splits == 1
    assert listing.notes == [
        "1 rows of x.json are of other splits",
        "3 rows of x.json have no label",
    ]


@pytest.mark.parametrize(
    "text",
    ['{"a": 1,}', '{"a" 1}', "{1: 2}", '{"a": }', '{"a": "', '{"a": [1, 2', '{"a": 1} x', "{,}"],
)
def test_broken_json_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"x\.json, line 2: "):
        read(written(tmp_path, "\n" + text, "x.json"))


# -- paths and folders ----------------------------------------------------------------------------


def test_mmaction2_list_with_a_label_map(tmp_path: Path) -> None:
    written(tmp_path, "abseiling\nair drumming\nzumba\n", "kinetics_label_map_k400.txt")
    plain = "abseiling/a.mp4 0\nair drumming/b c.MP4 1\nflat.webm 2\nz/q.mp4 3\n"
    listing = open_annotations(written(tmp_path, plain, "train.txt"), "train")
    *items, bad = listing
    assert [(item.path, item.label) for item in items if isinstance(item, Segment)] == [
        ("abseiling/a.mp4", "abseiling"),
        ("air drumming/b c.MP4", "air drumming"),
        ("flat.webm", "zumba"),
    ]
    assert isinstance(bad, BadRow)
    assert bad.detail == "train.txt, line 4: class number ('3') is not in the class index"
    assert listing.notes == [
        "train.txt: class numbers are looked up in kinetics_label_map_k400.txt"
    ]
    before = listing.sha256
    written(tmp_path, "abseiling\nair drumming\nyoga\n", "kinetics_label_map_k400.txt")
    assert open_annotations(tmp_path / "train.txt", "train").sha256 != before


@pytest.mark.parametrize(
    ("text", "labels", "note"),
    [
        ("a/x.mp4 0\nb/y.mp4 1\na/z.mp4 0\n", ["a", "b", "a"], "match the class folders"),
        ("v/x.mp4 0\nv/y.mp4 1\nv/z.mp4 0\n", ["0", "1", "0"], "3 labels are class numbers"),
        ("a/x.mp4 0\nb/y.mp4 0\n", ["0", "0"], "2 labels are class numbers"),
        ("a/x.mp4\ntrain/b/y.mp4\ntrain/z.mp4\n", ["a", "b", None], "1 rows of list.txt have no"),
        ('x.mp4,golf putting\n"y, z.mp4","a ""b"""\n', ["golf putting", 'a "b"'], ""),
        ("x.mp4\tgolf putting\ny.avi ; 5 \n", ["golf putting", "5"], "1 labels are class"),
    ],
)
def test_labels_of_path_lists(
    tmp_path: Path, text: str, labels: list[str | None], note: str
) -> None:
    listing = open_annotations(written(tmp_path, text, "list.txt"), "train")
    items = list(listing)
    assert [item.label for item in items if isinstance(item, Segment)] == labels
    assert note in " ".join(listing.notes)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd.mp4", "../x.mp4", "a/../../x.mp4", "a/..\\x.mp4", "\\\\host\\x.mp4",
        "C:\\x.mp4", "http://127.0.0.1/x.mp4", "file:///x.mp4", "a\x00.mp4", "a\x1b.mp4",
        "x" * 2000 + ".mp4", "folder 250 3", "no video",
    ],
)  # fmt: skip
def test_paths_that_could_leave_the_source_are_bad_rows(tmp_path: Path, path: str) -> None:
    items = read(written(tmp_path, f"a/x.mp4 1\n{path} 1\nb/-y.mp4 2\n", "list.txt"))
    assert [type(item) for item in items] == [Segment, BadRow, Segment]
    (bad,) = (item for item in items if isinstance(item, BadRow))
    assert bad.detail.startswith("list.txt, line 2: ")


@QUICK
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=10))
def test_every_line_of_a_path_list_is_accounted_for(scratch: Path, rows: list[str]) -> None:
    good = [f"c{number % 3}/x{number}.mp4 {number % 3}" for number in range(11)]
    path = written(scratch, "\n".join([*good, *rows]), "paths")
    count = sum(bool(line.strip()) for line in path.read_text("utf-8").split("\n"))
    listing = PathList(path, "train")
    items = list(listing)
    assert len(items) == count
    for item in items:
        if isinstance(item, Segment):
            assert item.path is not None
            resolved = (Path("/source") / item.path).resolve()
            assert resolved.is_relative_to("/source")


def test_long_lines_take_no_time(tmp_path: Path) -> None:
    hostile = ["a.mp4" + " " * 60_000 + "x", "a.mp4" * 12_000, "," * 60_000, '"' * 60_000]
    began = time.process_time()  # not the clock: other processes must not count
    path = written(tmp_path, "\n".join(["a/x.mp4 1\n" * 10, *hostile]), "list.txt")
    assert len(read(path)) == 14
    header = HEADER.replace(",", " ")
    assert len(read(written(tmp_path, "\n".join([header, *hostile]), "table.txt"))) == 4
    assert time.process_time() - began < 5


def test_class_index_must_be_clear(tmp_path: Path) -> None:
    path = written(tmp_path, "a/x.mp4 1\n", "list.txt")
    for text in ("1 a\n1 b\n", "1 a\n2 a\n", ""):
        written(tmp_path, text, "classInd.txt")
        with pytest.raises(UsageError, match="must name distinct classes"):
            open_annotations(path, "train")


def test_numbers_of_thousands_of_digits_are_refused(tmp_path: Path) -> None:
    """Python does not turn those into an int."""
    long = "9" * 5000
    path = written(tmp_path, f"a/x.mp4 1\na/y.mp4 {long}\n", "list.txt")
    written(tmp_path, "1 a\n2 b\n", "classInd.txt")
    good, bad = open_annotations(path, "train")
    assert isinstance(good, Segment)
    assert isinstance(bad, BadRow)
    assert "is not in the class index" in bad.detail
    written(tmp_path, f"1 a\n{long} b\n", "classInd.txt")
    with pytest.raises(UsageError, match="class number of over 18 digits"):
        open_annotations(path, "train")


@pytest.mark.parametrize("number", ["NaN", "1e999", "[-Infinity]"])
def test_numbers_that_json_does_not_have_make_a_bad_row(tmp_path: Path, number: str) -> None:
    entry = f'{{"annotations": {{"segment": [1, 2], "label": "x"}}, "duration": {number}}}'
    (bad,) = open_annotations(written(tmp_path, f'{{"aaaaaaaaaaa": {entry}}}', "x.json"), "train")
    assert isinstance(bad, BadRow)
    assert "not finite" in bad.detail


def files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_class_folders_of_showmax(tmp_path: Path) -> None:
    """Its README: dataset/{train,valid}/<class_with_underscores>/<id>.mp4, dataset/test/<id>.mp4."""
    root = files(
        tmp_path,
        "train/blowing_glass/0wR5jVB-WPk.mp4",
        "valid/golf putting/3caPS4FHFF8_000036_000046.mp4",
        "valid/golf putting/notes.txt",
        "test/--6bJUbfpnQ.mp4",
    )
    assert one(root).label == "blowing_glass"
    listing = open_annotations(root, "val")
    (clip,) = listing
    assert clip == Segment(
        "3caPS4FHFF8",
        0.0,
        None,
        "golf putting",
        "val",
        path="valid/golf putting/3caPS4FHFF8_000036_000046.mp4",
    )
    assert listing.notes == ["left out as no videos by their extension: 1 .txt"]
    assert one(root, "test").label is None
    with pytest.raises(UsageError, match="no folder for split holdout, only for test, train, val"):
        open_annotations(root, "holdout")


def test_class_folders_without_splits(tmp_path: Path) -> None:
    root = files(tmp_path, "a/x.mp4", "b c/deep/y.mkv", "z.mp4", ".hidden/q.mp4", "test/t.mp4")
    labels = {
        item.path: item.label for item in ClassFolders(root, "val") if isinstance(item, Segment)
    }
    assert labels == {"a/x.mp4": "a", "b c/deep/y.mkv": "b c", "z.mp4": None, "test/t.mp4": "test"}


def linked(root: Path, **links: str | Path) -> Path:
    """Make links below a folder; `__` in a name stands for `/`."""
    for name, target in links.items():
        (root / name.replace("__", "/")).symlink_to(target)
    return root


def paths_and_notes(root: Path, split: str = "train") -> tuple[dict[str, str | None], list[str]]:
    """The label of every path, and what the listing says."""
    listing = open_annotations(root, split)
    labels = {str(item.path): item.label for item in listing if isinstance(item, Segment)}
    assert {item.path for item in listing if isinstance(item, Segment)} == set(labels)
    return labels, listing.notes


def left_out(*links: str) -> str:
    what = "behind links were left out, as they are listed elsewhere or hold the source"
    return f"{len(links)} folders {what}: {', '.join(links)}"


def test_a_link_takes_no_real_folder_of_the_source_into_its_own_class(tmp_path: Path) -> None:
    root = files(tmp_path, "running/x.mp4", "a/y.mp4", "b/deep/z.mp4")
    linked(root, jogging="running", a__alias="../b", c="b/deep", d="running")
    labels, (note,) = paths_and_notes(root)
    assert labels == {"running/x.mp4": "running", "a/y.mp4": "a", "b/deep/z.mp4": "b"}
    first = "a/alias (to b), c (to b/deep), d (to running) and 1 more"
    assert note == left_out("", "", "", "").partition(": ")[0] + f": {first}"


def test_a_link_takes_no_clip_of_another_split_in(tmp_path: Path) -> None:
    root = files(tmp_path, "train/a/x.mp4", "val/b/y.mp4")
    linked(root, train__a__loop="../..", train__b="../val/b", train__a__up=tmp_path.parent)
    labels, (note,) = paths_and_notes(root)
    assert labels == {"train/a/x.mp4": "a"}
    assert note == left_out(
        f"train/a/loop (to {tmp_path})", f"train/a/up (to {tmp_path.parent})", "train/b (to val/b)"
    )
    assert paths_and_notes(root, "val") == ({"val/b/y.mp4": "b"}, [])


def test_a_split_of_links_alone_into_another_is_refused(tmp_path: Path) -> None:
    root = linked(files(tmp_path, "val/b/y.mp4", "train/notes.txt"), train__b="../val/b")
    with pytest.raises(
        UsageError, match=r"no clip of split train: 1 folders .*train/b \(to val/b\)"
    ):
        open_annotations(root, "train")


def test_links_out_of_the_source_are_followed_once_for_each_folder(tmp_path: Path) -> None:
    """In what they lead to, real folders go before links too."""
    files(tmp_path / "disk", "running/x.mp4", "swimming/y.mp4", "swimming/deep/z.mp4")
    disk = linked(tmp_path / "disk", jogging="running", swimming__loop="../swimming", back="../src")
    root = files(tmp_path / "src", "z/1.mp4")
    linked(root, all=disk, b=disk / "swimming", hidden=".kept/c", file="z/1.mp4", z__back="../..")
    files(root, ".kept/c/2.mp4")  # it has no other place
    labels, (note,) = paths_and_notes(root)
    assert labels == {
        "all/running/x.mp4": "all", "all/swimming/y.mp4": "all", "all/swimming/deep/z.mp4": "all",
        "file": None, "hidden/2.mp4": "hidden", "z/1.mp4": "z",
    }  # fmt: skip
    assert note.startswith("5 folders behind links were left out")
    assert f"all/back (to {root}), all/jogging (to {disk}/running)" in note


def test_links_to_folders_that_no_split_has_are_followed(tmp_path: Path) -> None:
    root = files(tmp_path, "videos/a/x.mp4", "videos/b/y.mp4", "train/c/z.mp4")
    (root / "val").mkdir()
    linked(root, train__a="../videos/a", val__b="../videos/b")
    assert paths_and_notes(root) == ({"train/a/x.mp4": "a", "train/c/z.mp4": "c"}, [])
    assert paths_and_notes(root, "val") == ({"val/b/y.mp4": "b"}, [])


def test_the_folder_of_a_split_can_be_a_link(tmp_path: Path) -> None:
    root = files(tmp_path, "test/a/x.mp4", "train/b/y.mp4")
    linked(root, val="test")
    assert paths_and_notes(root, "val") == ({"val/a/x.mp4": "a"}, [])


def test_class_folder_names_that_do_not_print_are_bad_rows(tmp_path: Path) -> None:
    root = files(tmp_path, "a/x.mp4", "a/y\x1b[2J.mp4")
    good, bad = read(root)
    assert isinstance(good, Segment)
    assert isinstance(bad, BadRow)
    assert bad.detail.isascii()


# -- spelling, other splits, memory ---------------------------------------------------------------


def spelled(tmp_path: Path, *labels: str) -> Path:
    rows = [f"{label},{number:011d},1,2,train" for number, label in enumerate(labels)]
    return written(tmp_path, "\n".join([HEADER, *rows]))


def test_labels_that_differ_by_case_are_one_class(tmp_path: Path) -> None:
    us, lower = "passing American football", "passing american football"
    listing = open_annotations(spelled(tmp_path, lower, us, us, "Zumba", "zumba", "yoga"), "train")
    labels = [item.label for item in listing if isinstance(item, Segment)]
    assert labels == [us, us, us, "Zumba", "Zumba", "yoga"]  # a tie: "Z" sorts before "z"
    (note,) = listing.notes
    assert note == (
        "2 classes had labels that differ only by case: 'zumba' (1) counted as 'Zumba' (1); "
        f"'{lower}' (1) counted as '{us}' (2)"
    )
    assert [item.label for item in listing if isinstance(item, Segment)] == labels
    assert len(listing.notes) == 1


def test_labels_that_look_the_same_are_one_class(tmp_path: Path) -> None:
    """`é` is one character, or on macOS an e and an accent."""
    composed, apart = "caf\u00e9", "cafe\u0301"

    def labels(classes: list[str], *written_as: str) -> tuple[list[str | None], list[str]]:
        listing = open_annotations(spelled(tmp_path, *written_as), "train", classes)
        return [item.label for item in listing if isinstance(item, Segment)], listing.notes

    found, (note,) = labels([], apart, composed, "Cafe\u0301")
    assert found == [composed] * 3
    assert note == (
        "1 classes had labels that differ only by case or by how accents are written: "
        r"'Cafe\u0301' (1), 'cafe\u0301' (1) counted as 'caf\xe9' (1)"
    )
    assert labels([], apart, apart, composed)[0] == [apart] * 3  # the more frequent one stays
    assert labels([composed], apart, apart)[0] == [composed] * 2  # a dataset's spelling goes first
    assert labels([composed, apart], apart, composed)[0] == [apart, composed]
    (note,) = case_notes([apart, composed, "x", "X"])
    assert note == (
        "classes that differ only by case or by how accents are written stay apart: "
        r"'cafe\u0301' and 'caf\xe9'; 'x' and 'X'"
    )
    assert case_notes(["x", "X"]) == ["classes that differ only by case stay apart: 'x' and 'X'"]


def test_the_class_lists_spelling_wins(tmp_path: Path) -> None:
    path = spelled(tmp_path, "A", "A", "a", "B", "b", "C")
    listing = open_annotations(path, "train", classes=["a", "B", "b", "d"])
    assert [item.label for item in listing if isinstance(item, Segment)] == [
        "a", "a", "a", "B", "b", "C",
    ]  # fmt: skip


@pytest.mark.parametrize("numbered", [False, True])
def test_a_class_list_is_read_alike_by_all(tmp_path: Path, *, numbered: bool) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(b"\xef\xbb\xbfleft \r\nright\r\n\r\n")
    assert read_class_list(path, numbered=numbered) == ["left", "right"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("\n", "has no names"),
        ("left\nright\nleft\n", "has 'left' twice"),
        ("left\nri\0ght\n", r"'ri\\x00ght' must be printable"),
        ("left\n\nright\n", "has no name in line 2, and labels count its lines"),
    ],
)
def test_class_lists_of_no_use_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UsageError, match=sentence):
        read_class_list(tmp_path / "classes.txt", numbered=True)


def test_any_split_reads_all_rows(tmp_path: Path) -> None:
    text = f"{HEADER}\na,0wR5jVB-WPk,1,2,validate\nb,0wR5jVB-WP0,1,2,train\nc,0wR5jVB-WP1,1,2,\n"
    listing = open_annotations(written(tmp_path, text), ANY_SPLIT)
    assert [item.split for item in listing if isinstance(item, Segment)] == ["val", "train", "*"]
    assert listing.other_splits == 0


@pytest.mark.parametrize("form", ["table", "json", "paths"])
@pytest.mark.parametrize("good", [True, False])
def test_memory_is_flat_in_the_number_of_rows(tmp_path: Path, form: str, *, good: bool) -> None:
    def peak(count: int) -> int:
        length = 2 if good else 0
        if form == "table":
            rows = (f"a,{n:011d},1,{length}" for n in range(count))
            path = written(tmp_path, "label,youtube_id,time_start,time_end\n" + "\n".join(rows))
        elif form == "json":
            entry = f'{{"annotations": {{"label": "a", "segment": [1, {length}]}}}}'
            body = ",\n".join(f'"{n:011d}": {entry}' for n in range(count))
            path = written(tmp_path, f"{{{body}}}", "a.json")
        else:
            suffix = "mp4" if good else "mp4/.."
            rows = (f"c{n % 9}/{n:011d}.{suffix} {n % 9}" for n in range(count))
            path = written(tmp_path, "c/x.mp4 0\n" * 200 + "\n".join(rows), "list.txt")
        listing = open_annotations(path, "train")
        tracemalloc.start()
        assert sum(1 for _ in listing) >= count
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(1000)  # caches of the standard library fill up
    few = peak(5000)  # of JSON more than two chunks
    assert peak(20_000) < few * 1.1 + 20_000


# -- overlap --------------------------------------------------------------------------------------


def lists_to_compare(tmp_path: Path) -> tuple[Path, Path]:
    a = f"{HEADER}\nx,0wR5jVB-WPk,1,11,val\nx,0wR5jVB-WPk,20,30,val\ny,3caPS4FHFF8,5,15,val\nbad\n"
    b = f"{HEADER}\nX2,0wR5jVB-WPk,1,11,train\nz,_-aBlJFi7LY,5,15,train\n"
    return written(tmp_path, a, "a.csv"), written(tmp_path, b, "b.csv")


def test_overlap_counts_ids_rows_and_segments(tmp_path: Path) -> None:
    a, b = (open_annotations(path, ANY_SPLIT) for path in lists_to_compare(tmp_path))
    report = overlap(a, b)
    assert report.shared_ids == ("0wR5jVB-WPk",)
    assert (report.a.rows, report.a.ids, report.a.rows_shared, report.a.bad_rows) == (4, 2, 2, 1)
    assert (report.b.rows, report.b.ids, report.b.rows_shared, report.b.bad_rows) == (2, 2, 1, 0)
    assert report.same_segments == 1
    (example,) = report.examples
    assert example.in_a == ("val 1-11 s x", "val 20-30 s x")
    assert example.in_b == ("train 1-11 s X2",)


def test_overlap_command_prints_and_writes(tmp_path: Path) -> None:
    a, b = lists_to_compare(tmp_path)
    ids = tmp_path / "ids.txt"
    done = CliRunner().invoke(overlap_command, [str(a), str(b), "--ids", str(ids)])
    assert done.exit_code == 0, done.output
    assert "4 rows, 2 ids; 2 rows (50.0 %) are of shared ids, 1 rows cannot be read" in done.output
    assert "1 ids are in both; 1 segments of them have the same start and end" in done.output
    assert ids.read_text() == "0wR5jVB-WPk\n"
    failed = CliRunner().invoke(overlap_command, [str(a), str(tmp_path / "none")])
    assert isinstance(failed.exception, UsageError)


def test_ids_that_cannot_be_written_are_a_mistake_or_a_failure(tmp_path: Path) -> None:
    lists = [str(path) for path in lists_to_compare(tmp_path)]
    failed = CliRunner().invoke(overlap_command, [*lists, "--ids", "/dev/full"])
    with pytest.raises(StorageError, match=r"^--ids /dev/full .* \(No space .*the same command"):
        raise failed.exception or AssertionError
    failed = CliRunner().invoke(overlap_command, [*lists, "--ids", str(tmp_path / "no/ids.txt")])
    with pytest.raises(UsageError, match=r"^--ids .*ids.txt cannot be written: No such file"):
        raise failed.exception or AssertionError


def test_overlap_knows_a_video_by_its_files_name(tmp_path: Path) -> None:
    whole = files(
        tmp_path / "whole", "train/x/0wR5jVB-WPk.mp4", "valid/y/3caPS4FHFF8_000005_000015.mp4"
    )
    a, b = lists_to_compare(tmp_path)
    report = overlap(*[open_annotations(path, ANY_SPLIT) for path in (whole, a)])
    assert report.shared_ids == ("0wR5jVB-WPk", "3caPS4FHFF8")
    assert report.same_segments == 1  # of the whole video just the id is known
    assert report.examples[0].in_a == ("train/x/0wR5jVB-WPk.mp4",)
    assert report.examples[1].in_a == ("valid/y/3caPS4FHFF8_000005_000015.mp4",)
    # what has no such name is known by its path
    paths = files(tmp_path / "flat", "v_x.avi", "3caPS4FHFF8_000020_000030.webm")
    report = overlap(*[open_annotations(path, ANY_SPLIT) for path in (paths, whole)])
    assert (report.shared_ids, report.same_segments) == (("3caPS4FHFF8",), 0)
    assert overlap(*[open_annotations(paths, ANY_SPLIT)] * 2).shared_ids == (
        "3caPS4FHFF8",
        "v_x.avi",
    )


def test_numbered_files_are_no_videos_of_one_id(tmp_path: Path) -> None:
    """Their names have the eleven characters of an id."""
    names = "clip_000001.mp4", "image-00002.mp4", "00000000003.mp4"
    a = files(tmp_path / "a", *(f"cat/{name}" for name in names))
    b = files(tmp_path / "b", *(f"dog/{name}" for name in names))
    assert overlap(*[open_annotations(path, ANY_SPLIT) for path in (a, b)]).shared_ids == ()


def test_a_folder_of_splits_is_read_whole_for_any(tmp_path: Path) -> None:
    files(tmp_path, "train/a/1.mp4", "validate/b/2.mp4", "validate/b/list.txt")
    listing = open_annotations(tmp_path, ANY_SPLIT)
    found = [(item.split, item.label, item.path) for item in listing if isinstance(item, Segment)]
    assert found == [("train", "a", "train/a/1.mp4"), ("val", "b", "validate/b/2.mp4")]
    assert listing.notes == ["left out as no videos by their extension: 1 .txt"]


@pytest.mark.parametrize("kind", ["folder", "list"])
def test_overlap_with_nothing_is_refused(tmp_path: Path, kind: str) -> None:
    a, _ = lists_to_compare(tmp_path)
    nothing = files(tmp_path / "empty", "read.txt")
    if kind == "list":
        nothing = written(tmp_path, HEADER, "c.csv")
    with pytest.raises(UsageError, match="holds no .* nothing to compare"):
        overlap(*[open_annotations(path, ANY_SPLIT) for path in (a, nothing)])


def table_of(source: Path, table: Path, *splits: str) -> Path:
    """Write what `kprep info --csv` would of a dataset made from a list or folder, no clip tried."""
    with table.open("w", newline="") as file:
        for split in splits:
            with contextlib.closing(Journal(table.with_suffix(f".{split}"), split)) as journal:
                journal.plan(
                    open_annotations(source, split), seed=0, clips_per_shard=8, limit=None,
                    classes=frozenset(), taken_keys=frozenset(),
                )  # fmt: skip
                ledger = read_ledger(write_ledger(journal.all_rows()), split)
            writer = csv.writer(file)
            if split == splits[0]:
                writer.writerow(["split", *ledger.column_names])
            writer.writerows((split, *row.values()) for row in ledger.to_pylist())
    return table


def found_in(a: Path, b: Path) -> tuple[object, ...]:
    """Return what is compared of two lists: all but how the examples are shown."""
    report = overlap(*[open_annotations(path, ANY_SPLIT) for path in (a, b)])
    return report.a, report.b, report.shared_ids, report.same_segments


def test_overlap_reads_the_table_of_a_dataset_as_the_folder_that_it_came_from(
    tmp_path: Path,
) -> None:
    names = (
        "train/x/0wR5jVB-WPk_000417_000427.mp4",  # known by its name, with times
        "train/x/-_abcdefgh__000001_000011.mp4",  # an id of which its key keeps the letters only
        "train/x/odd,_name.mp4",
        "val/y/more/3caPS4FHFF8.mp4",
        "val/y/clip_000001.mp4",
        "val/y/bad\nname.mp4",  # a row that has no id
    )
    folder = files(tmp_path / "folder", *names)
    other = files(tmp_path / "other", *(name for name in names if "x/" in name), "train/z/1.mp4")
    table = table_of(folder, tmp_path / "rows.csv", "train", "val")
    wanted = found_in(folder, folder)
    assert wanted[0] == ListCounts(rows=6, ids=5, rows_shared=5, bad_rows=1)
    assert wanted[3] == 5
    assert found_in(folder, table) == found_in(table, folder) == found_in(table, table) == wanted
    assert found_in(table, other) == found_in(folder, other)
    assert found_in(table, other)[2] == ("-_abcdefgh_", "0wR5jVB-WPk", "train/x/odd,_name.mp4")
    sheet = table.read_text().replace(",", ";").replace("odd;_", "odd,_")
    assert found_in(written(tmp_path, sheet, "sheet.csv"), folder) == wanted
    done = CliRunner().invoke(overlap_command, [str(table), str(folder)])
    assert "A: train 417-427 s x  B: train/x/0wR5jVB-WPk_000417_000427.mp4" in done.output


def test_overlap_reads_the_table_of_a_list_as_the_list(tmp_path: Path) -> None:
    a, b = lists_to_compare(tmp_path)
    table = table_of(a, tmp_path / "rows.csv", "val")
    assert found_in(a, b)[0] == ListCounts(rows=4, ids=2, rows_shared=2, bad_rows=1)
    assert found_in(table, b) == found_in(a, b)
    assert found_in(table, table) == found_in(a, a)
    without_label = table.read_text().replace(",label,", ",other,")
    assert found_in(written(tmp_path, without_label, "cut.csv"), table) == found_in(a, a)


def test_overlap_knows_the_samples_of_somebody_elses_tars_by_their_keys(tmp_path: Path) -> None:
    """Their names are those of files; what could not be streamed has no end."""
    head = (
        "split,row,key,video_id,start_seconds,end_seconds,label,status,reason,detail,source,"
        "seconds,short"
    )
    keys = {"0wR5jVB-WPk_000417_000427": "1.2", "train/000/3caPS4FHFF8": "", "000017": "2.0"}
    rows = (f'train,0,{key},{key},0.0,{end},,ok,,"two\nlines",tar,,' for key, end in keys.items())
    table = written(tmp_path, "\n".join([head, *rows]), "rows.csv")
    assert found_in(table, table)[0] == ListCounts(rows=3, ids=3, rows_shared=3, bad_rows=0)
    folder = files(tmp_path / "videos", "0wR5jVB-WPk_000417_000427.mp4", "3caPS4FHFF8.webm")
    assert found_in(table, folder)[2:] == (("0wR5jVB-WPk", "3caPS4FHFF8"), 2)
    with pytest.raises(UsageError, match=r"rows.csv, line \d+: .*; write the table anew"):
        found_in(written(tmp_path, table.read_text() + '\ntrain,"0', "rows.csv"), folder)


def test_a_conversion_reads_the_table_of_a_dataset_as_strictly_as_any_list(tmp_path: Path) -> None:
    folder = files(tmp_path / "folder", "x/0wR5jVB-WPk_000417_000427.mp4", "x/a.mp4")
    table = table_of(folder, tmp_path / "rows.csv", "train")
    assert [type(item) for item in read(table)] == [BadRow, BadRow]


def test_overlap_with_a_list_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    a, _ = lists_to_compare(tmp_path)
    nothing = written(tmp_path, f"{HEADER}\nx,0wR5jVB-WPk,5,5,val\nx,3caPS4FHFF8,,,val\n", "c.csv")
    why = (
        "none of the 2 rows of .*c.csv can be read, .*line 2: time_start .*give an annotation list"
    )
    for lists in ((a, nothing), (nothing, a)):
        with pytest.raises(UsageError, match=why):
            found_in(*lists)


def test_overlap_does_not_write_over_its_lists(tmp_path: Path) -> None:
    a, b = lists_to_compare(tmp_path)
    before = b.read_bytes()
    (tmp_path / "link").symlink_to(b)
    failed = CliRunner().invoke(overlap_command, [str(a), str(b), "--ids", str(tmp_path / "link")])
    assert isinstance(failed.exception, UsageError)
    assert b.read_bytes() == before


def test_a_dataset_is_not_taken_for_a_folder_of_videos(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index/val.parquet").touch()
    assert len(list(open_annotations(tmp_path, ANY_SPLIT))) == 1
    (tmp_path / "manifest.json").touch()
    with pytest.raises(UsageError, match="is a dataset of kprep"):
        open_annotations(tmp_path, ANY_SPLIT)


def test_overlap_of_real_lists(corpus: Path) -> None:
    lists = corpus / "annotations"
    paths = [lists / "activitynet" / f"kinetics-{size}_val.csv" for size in (400, 600)]
    report = overlap(*[open_annotations(path, ANY_SPLIT) for path in paths])

    def ids(path: Path) -> set[str]:
        with path.open(newline="") as file:
            return {row["youtube_id"] for row in csv.DictReader(file)}

    assert set(report.shared_ids) == ids(paths[0]) & ids(paths[1])
    assert report.shared_ids
