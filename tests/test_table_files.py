"""Table files as people have them: what is read from each, and what each refusal says."""

import bz2
import datetime
import decimal
import gzip
import lzma

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import feather, ipc, parquet
from test_data import one_line

from flowtrain.data.tables import block, text_file, text_stream
from flowtrain.data.tables.table_file import TableFile
from flowtrain.errors import FlowtrainError

NAN = float("nan")
NO_NAMES = ["no line names the columns, which are called c0 … c1"]
HASH = ["lines that start with #: left out as comments"]
FROM_COMMENT = ["the names of the columns are those of the comment before the first row", *HASH]
COMMA = "numbers with a decimal comma: "


def contents(file: TableFile, names=None) -> dict[str, list]:
    """The values of each column, those of all blocks together."""
    names = names or file.names
    blocks = list(file.blocks(names))
    return {name: [value for part in blocks for value in part[name].tolist()] for name in names}


def assert_holds(file: TableFile, expected: dict, kinds: str | None = None):
    """``kinds``: the first letter of each column's kind; None: all are numbers."""
    assert file.names == [*expected]
    found = "".join(kind[0] for kind in file.kinds(file.names).values())
    assert found == (kinds or "n" * len(expected))
    for name, values in contents(file).items():
        np.testing.assert_equal(values, expected[name], err_msg=name)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# ------------------------------------------------------------------ delimited text


@pytest.mark.parametrize(
    ("text", "expected", "kinds", "notes"),
    [
        # separators
        ("a,b\n1,2\n3,4\n", {"a": [1, 3], "b": [2, 4]}, None, []),
        ("a;b\n1;2\n3;4\n", {"a": [1, 3], "b": [2, 4]}, None, []),
        ("a|b\n1|2\n3|4\n", {"a": [1, 3], "b": [2, 4]}, None, []),
        ("a\tb\n1\tx y\n3\tz\n", {"a": [1, 3], "b": ["x y", "z"]}, "nt", []),
        ("   a   b\n   1   2\n  10  20\n", {"a": [1, 10], "b": [2, 20]}, None, []),
        ("a, b\n1, x y\n3, z\n", {"a": [1, 3], "b": ["x y", "z"]}, "nt", []),
        ("sep=;\na;b\n1;2\n", {"a": [1], "b": [2]}, None, []),
        ("v\n1.5\n2.5\n\n3\n", {"v": [1.5, 2.5, 3]}, None, []),
        ("date,v\n2020-01-01 10:00,1.5\n", {"date": ["2020-01-01 10:00"], "v": [1.5]}, "tn", []),
        ("when\n2020-01-01 10:00:00\n", {"when": ["2020-01-01 10:00:00"]}, "t", []),
        # names
        ("1,2\n3,4\n", {"c0": [1, 3], "c1": [2, 4]}, None, NO_NAMES),
        ("1 2\n3 4\n", {"c0": [1, 3], "c1": [2, 4]}, None, NO_NAMES),
        ("red,1.5\nblue,2\n", {"c0": ["red", "blue"], "c1": [1.5, 2]}, "tn", NO_NAMES),
        ("red,x\nblue,y\nred,z\n", {"c0": ["red", "blue", "red"], "c1": ["x", "y", "z"]}, "tt", NO_NAMES),
        ("red,x\nblue,y\ngreen,z\n", {"red": ["blue", "green"], "x": ["y", "z"]}, "tt", []),
        ("id,2019,2020\n1,2,3\n", {"id": [1], "2019": [2], "2020": [3]}, None, []),
        (" a , b c \n 1 , x \n 2 , x\n", {"a": [1, 2], "b c": ["x", "x"]}, "nt", []),
        ('a,"b,\nc"\n1,2\n', {"a": [1], "b, c": [2]}, None, []),
        (
            "a,a,a_2,,a\n1,2,3,4,5\n",
            {"a": [1], "a_3": [2], "a_2": [3], "c3": [4], "a_4": [5]},
            None,
            ["columns without a name are called c3", "columns whose name occurs before are called a_3, a_4"],
        ),
        # an index, also where there are separators at the end
        (",v,\n0,1.5,\n1,2.5,\n", {"v": [1.5, 2.5]}, None, ["the column without a name is left out: it is an index"]),
        (",v\n0,1.5\n1,2.5\n", {"v": [1.5, 2.5]}, None, ["the column without a name is left out: it is an index"]),
        (
            "Unnamed: 0,v\n1,1.5\n2,2.5\n",
            {"v": [1.5, 2.5]},
            None,
            ["the column called 'Unnamed: 0' is left out: it is an index"],
        ),
        (",v\n5,1.5\n1,2.5\n", {"c0": [5, 1], "v": [1.5, 2.5]}, None, ["columns without a name are called c0"]),
        (
            '"x" "y"\n"1" 1.5 2\n"2" 3 4\n',
            {"x": [1.5, 3], "y": [2, 4]},
            None,
            ["the first column has no name and is left out: it names the rows"],
        ),
        ("a;b;\n1;2;\n3;4;\n", {"a": [1, 3], "b": [2, 4]}, None, []),
        ("a;b\n1;2;\n3;4;\n", {"a": [1, 3], "b": [2, 4]}, None, []),
        ("a;b;;\n1;2;;\n3;4;;\n", {"a": [1, 3], "b": [2, 4]}, None, []),
        # comments
        ("# made by hand\na,b\n1,2\n# and more\n3,4\n", {"a": [1, 3], "b": [2, 4]}, None, HASH),
        ("a,b\n1,2\n# and more\n3,4\n", {"a": [1, 3], "b": [2, 4]}, None, HASH),
        ("# made by hand\n# a b\n1 2\n3 4\n", {"a": [1, 3], "b": [2, 4]}, None, FROM_COMMENT),
        ("#a,b\n1,2\n3,4\n", {"a": [1, 3], "b": [2, 4]}, None, FROM_COMMENT),
        ("% c\n1\t2\n", {"c0": [1], "c1": [2]}, None, ["lines that start with %: left out as comments", *NO_NAMES]),
        ("// c\na\tb\n1\t2\n", {"a": [1], "b": [2]}, None, ["lines that start with //: left out as comments"]),
        ("a,b\n1,#N/A\n#N/A,2\n", {"a": [1, NAN], "b": [NAN, 2]}, None, []),
        ("tag,v\n#one,1\ntwo,2\n", {"tag": ["#one", "two"], "v": [1, 2]}, "tn", []),
        # encodings and line ends
        (b"\xef\xbb\xbfa,b\n1,2\n", {"a": [1], "b": [2]}, None, []),
        ("größe,b\n1,ä\n".encode("utf-16"), {"größe": [1], "b": ["ä"]}, "nt", []),
        ("a,b\r\n1,2\r\n3,4\r\n", {"a": [1, 3], "b": [2, 4]}, None, []),
        ("a,b\r1,2\r3,4", {"a": [1, 3], "b": [2, 4]}, None, []),
        ('a,b\n"x\ny, ""z""",1\nw,2\n', {"a": ['x\ny, "z"', "w"], "b": [1, 2]}, "tn", []),
        ('a,b\n5",3\n6",4\n', {"a": ['5"', '6"'], "b": [3, 4]}, "tn", []),
        # numbers
        ("a;b\n1,5;2\n-2,25;3\n", {"a": [1.5, -2.25], "b": [2, 3]}, None, [COMMA + "a, b"]),
        ("1,5;2,5\n2,5;3\n", {"c0": [1.5, 2.5], "c1": [2.5, 3]}, None, [*NO_NAMES, COMMA + "c0, c1"]),
        ("v\n1,5\n2,5\n", {"v": [1.5, 2.5]}, None, [COMMA + "v"]),
        ("a;b\n1,234;x\n5,678;y\n", {"a": [1.234, 5.678], "b": ["x", "y"]}, "nt", [COMMA + "a"]),
        (
            'a,b\n"1,234.5",2\n"1,000",3\n',
            {"a": [1234.5, 1000], "b": [2, 3]},
            None,
            ["numbers with a comma between thousands: a"],
        ),
        (
            "a;b\n1.234,5;x\n1.000;y\n",
            {"a": [1234.5, 1000], "b": ["x", "y"]},
            "nt",
            ["numbers with a decimal comma and a point between thousands: a"],
        ),
        ("a;b\n1 234;2\n12;3\n", {"a": [1234, 12], "b": [2, 3]}, None, ["numbers with a blank between thousands: a"]),
        (
            "a;b\n1\u202f234;2\n12;3\n",
            {"a": [1234, 12], "b": [2, 3]},
            None,
            ["numbers with a blank between thousands: a"],
        ),
        ("a\n1'234\n12\n", {"a": [1234, 12]}, None, ["numbers with an apostrophe between thousands: a"]),
        (
            "a,b\n12 %,1\n+13.5%,2\n",
            {"a": [12, 13.5], "b": [1, 2]},
            None,
            ["numbers with a percent sign (12 % is read as 12): a"],
        ),
        ("a,b\n1e5,+1\n-2E-3,.5\n", {"a": [1e5, -2e-3], "b": [1, 0.5]}, None, []),
        ("a,b\ninf,1\n-Infinity,2\n", {"a": [np.inf, -np.inf], "b": [1, 2]}, None, []),
        (f"a,b\n{2**63},1\n{10**29},2\n", {"a": [2.0**63, 1e29], "b": [1, 2]}, None, []),
        ("a,b\nNA,-\n?,.\n,null\n1,2\n", {"a": [NAN] * 3 + [1], "b": [NAN] * 3 + [2]}, None, []),
        ("a,b\nx,1\n?,2\n,3\n", {"a": ["x", None, None], "b": [1, 2, 3]}, "tn", []),
        # other kinds
        ("zip,v\n01234,1\n99999,2\n", {"zip": ["01234", "99999"], "v": [1, 2]}, "tn", []),
        ("a,b\n0,00.5\n0.5,10\n", {"a": [0, 0.5], "b": [0.5, 10]}, None, []),
        ("a,b\ntrue,FALSE\n,True\n", {"a": ["true", None], "b": ["false", "true"]}, "bb", []),
        ("a,b\nyes,1\nno,2\n", {"a": ["yes", "no"], "b": [1, 2]}, "tn", []),
        ("a,b\n", {"a": [], "b": []}, None, []),
    ],
)  # fmt: skip
def test_what_a_text_holds(tmp_path, text, expected, kinds, notes):
    file = TableFile(write(tmp_path / "t.csv", text))
    assert_holds(file, expected, kinds)
    assert file.notes == notes


@pytest.mark.parametrize(
    ("text", "read", "expected", "kinds"),
    [
        ("a,b\n1,x\n2,y\n", {"sep": ";"}, {"a,b": ["1,x", "2,y"]}, "t"),
        ("a  b\n1  2\n", {"separator": r"\s+"}, {"a": [1], "b": [2]}, None),
        ("a\tb\n1\t2\n", {"delimiter": "\\t"}, {"a": [1], "b": [2]}, None),
        ("größe,b\n1,ä\n".encode("latin-1"), {"encoding": "latin-1"}, {"größe": [1], "b": ["ä"]}, "nt"),
        ("a;b\n1,234;2\n", {"decimal": "."}, {"a": [1234], "b": [2]}, None),
        ("a,b\n1.234,2\n", {"thousands": "."}, {"a": [1.234], "b": [2]}, None),
        ("a;b\n1_234;2\n", {"thousands": "_"}, {"a": [1234], "b": [2]}, None),
        ("a,b\n1,x\n2,-999\n", {"na_values": ["x", -999]}, {"a": [1, 2], "b": [NAN, NAN]}, None),
        ("a,b\n1,1\n2,-\n", {"na_values": {"a": [1]}}, {"a": [NAN, 2], "b": [1, NAN]}, None),
        ("a,b\nNone,1\nx,2\n", {"keep_default_na": False}, {"a": ["None", "x"], "b": [1, 2]}, "tn"),
        ("title\n\na,b\n1,2\n", {"skiprows": 1}, {"a": [1], "b": [2]}, None),
        ("a,b\nm,kg\n1,2\n", {"skiprows": [1]}, {"a": [1], "b": [2]}, None),
        ("title\na,b\n1,2\n", {"header": 1}, {"a": [1], "b": [2]}, None),
        ("2019,2020\n1,2\n", {"header": 0}, {"2019": [1], "2020": [2]}, None),
        ("x,y\nz,w\n", {"header": None}, {"c0": ["x", "z"], "c1": ["y", "w"]}, "tt"),
        ("1,2\n3,4\n", {"names": ["u", "v"]}, {"u": [1, 3], "v": [2, 4]}, None),
        ("a,b\n1,2 # first\n3,4\n", {"comment": "#"}, {"a": [1, 3], "b": [2, 4]}, None),
        ("a,b\n1,2\n3,4\n5,6\n", {"nrows": 2}, {"a": [1, 3], "b": [2, 4]}, None),
        ("a,b\n'x,y',2\n", {"quotechar": "'"}, {"a": ["x,y"], "b": [2]}, "tn"),
        ('a,b\n"x\\"y",2\n', {"escapechar": "\\", "doublequote": False}, {"a": ['x"y'], "b": [2]}, "tn"),
    ],
)
def test_options_of_a_text(tmp_path, text, read, expected, kinds):
    assert_holds(TableFile(write(tmp_path / "t.csv", text), read=read), expected, kinds)


@pytest.mark.parametrize(
    ("text", "read", "parts"),
    [
        ("", {}, ["it is empty"]),
        ("\n \n", {}, ["it is empty"]),
        ("a,b\n1,\0\n", {}, ["NUL bytes", "dataset.read={encoding: utf-16}"]),
        ("größe,b\n1,2\n".encode("latin-1"), {}, ["is not in UTF-8", "dataset.read={encoding: latin-1}"]),
        ("a,b\n1,2\n3\n", {}, ["row 2 (the first is 1) has 1 field, not 2"]),
        ("Operator,jane\nDevice,x\n\na,b,c\n" + "1,2,3\n" * 9, {}, ["row 1", "has 2 fields, not 3", "skiprows: N"]),
        ("a,b\n1,2\n\n3,4,5\n6\n7,8\n", {}, ["row 2", "has 3 fields, not 2"]),
        ("a b\n1 2\n3 4\n5\n", {}, ["row 3", "has 1 field, not 2"]),
        ('a,b\n"x,y",2\nz,3,4\n', {}, ["row 2", "has 3 fields, not 2"]),
        ('a,b\n1,2\n3,"4\n5,6\n', {}, ["row 2", "a quote is not closed"]),
        ('a,"b\n1,2\n3,4\n', {}, ["a quote in the line that names its columns is not closed"]),
        ("title\na,b,c\n1,2,3\n4,5,6\n", {}, ["its first line has 1 field, the others 3", "{skiprows: 1}"]),
        ("a,b\n1,2\n", {"seperator": ","}, ["dataset.read.seperator", "did you mean 'separator'?"]),
        ("a,b\n1,2\n", {"usecols": [0]}, ["dataset.read.usecols", "dataset.columns"]),
        ("a,b\n1,2\n", {"dtype": str}, ["dataset.read.dtype", "dataset.types"]),
        ("a,b\n1,2\n", {"sep": "ab"}, ["dataset.read.sep=ab", "one character"]),
        ("a,b\n1,2\n", {"sep": 3}, ["dataset.read.sep=3", "must be text"]),
        ("a,b\n1,2\n", {"decimal": "xx"}, ["dataset.read.decimal=xx", "one character"]),
        ("a,b\n1,2\n", {"encoding": "klingon"}, ["dataset.read.encoding=klingon", "latin-1"]),
        ("a,b\n1,2\n", {"skiprows": 9}, ["dataset.read.skiprows=9", "only the first 2 lines"]),
        ("a,b\n1,2\n", {"skiprows": "x"}, ["dataset.read.skiprows=x", "a number of lines"]),
        ("a,b\n1,2\n", {"header": "x"}, ["dataset.read.header=x", "the number of a line"]),
        ("a,b\n1,2\n", {"header": 5}, ["dataset.read.header=5", "2 lines"]),
        ("a,b\n1,2\n", {"names": ["x"]}, ["dataset.read.names: 1 names for 2 columns"]),
        ("a,b\n1,2\n", {"names": "xy"}, ["dataset.read.names=xy", "a list"]),
        ("a,b\n1,2\n", {"nrows": 0}, ["dataset.read.nrows=0"]),
        ("a,b\n1,2\n", {"quoting": "x"}, ["dataset.read: ", "quoting"]),
    ],
)
def test_texts_that_are_refused(tmp_path, text, read, parts):
    path = write(tmp_path / "t.csv", text)
    where = [] if parts[0].startswith("dataset.") else [str(path)]
    one_line(lambda: contents(TableFile(path, read=read)), *where, *parts)


def test_a_value_that_does_not_fit_is_named_with_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(text_stream, "HEAD", 2**9)
    monkeypatch.setattr(text_stream, "PIECE", 2**9)
    monkeypatch.setattr(text_file, "CHUNK", 2**10)
    start = "a,b,c\n" + '1.5,"1,000",true\n' * 500
    for row, parts in (
        ("x,1,true", ["column 'a', row 501", "'x' is not a number", "{na_values: ['x']}", "{a: category}"]),
        ('1,"1,00",true', ["column 'b', row 501", "'1,00' is not a number"]),
        ("1,2,maybe", ["column 'c', row 501", "'maybe' is not true or false"]),
        ("1,2", ["row 501", "has 2 fields, not 3"]),
        ('1,2,"true', ["row 501"]),
    ):
        path = write(tmp_path / "t.csv", start + row + "\n" + '1.5,"1,000",true\n' * 100)
        one_line(lambda: contents(TableFile(path)), str(path), *parts)
    path = write(tmp_path / "t.csv", start.encode() + b"1,2,\xe4\n")
    one_line(lambda: contents(TableFile(path)), "is not in UTF-8")
    assert contents(TableFile(path), ["b"])["b"] == [1000] * 500 + [2]  # only the columns that are read matter
    path = write(tmp_path / "t.csv", start + "1,2,\0\n")
    one_line(lambda: contents(TableFile(path), ["b"]), "NUL bytes")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_text_may_be_cut_into_pieces_anywhere(tmp_path, monkeypatch, newline):
    rows = [(f"{i / 7:.3f}", f'"x{i},{newline}""y"' if i % 5 else "z", f"{i % 3}") for i in range(60)]
    text = newline.join(
        ["# c", "a,b,c", *(",".join(row) + (f"{newline}# d" if i % 9 == 8 else "") for i, row in enumerate(rows))]
    )
    path = write(tmp_path / "t.csv", text)
    whole = contents(TableFile(path))
    assert whole["a"] == [float(a) for a, _, _ in rows] and whole["b"][1] == 'x1,\n"y'
    monkeypatch.setattr(text_stream, "HEAD_LINES", 3)
    for size in (1, 7, 64, 300):
        monkeypatch.setattr(text_stream, "HEAD", size)
        monkeypatch.setattr(text_stream, "PIECE", size)
        monkeypatch.setattr(text_file, "CHUNK", 5 * size)
        assert contents(TableFile(path)) == whole


def test_lines_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_stream, "HEAD", 2**10)
    monkeypatch.setattr(text_stream, "PIECE", 2**10)
    monkeypatch.setattr(text_stream, "LONGEST", 2**14)
    path = write(tmp_path / "t.csv", "1" * 2**16)
    one_line(lambda: TableFile(path), str(path), "has a line of more than")
    path = write(tmp_path / "t.csv", "a,b\n" + "1,2\n" * 999 + "1,2" * 2**14)
    one_line(lambda: contents(TableFile(path)), "row 1000", "is a quote not closed?")


def test_columns_may_be_read_as_text(tmp_path):
    file = TableFile(write(tmp_path / "t.csv", "a,b,c\n1, 2.50 ,true\n3,,x\n"), text=["b", "c"])
    assert_holds(file, {"a": [1, 3], "b": ["2.50", None], "c": ["true", "x"]}, "ntt")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_texts(tmp_path, suffix):
    path, text = tmp_path / f"T.Csv{suffix}", b"a;b\n" + b"1,5;2\n" * 1000
    if suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(text)
    else:
        path.write_bytes({".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(text))
    assert contents(TableFile(path)) == {"a": [1.5] * 1000, "b": [2] * 1000}
    path.write_bytes(path.read_bytes()[:-12])
    one_line(lambda: contents(TableFile(path)), f"cannot read {path}", error=FlowtrainError)


# ------------------------------------------------------------------ other files

MOMENT = datetime.datetime(2020, 1, 2, 3, 4, 5, 678901)
SECONDS = 11045.678901  # since midnight
ARROW = {  # name -> a column, what is read from it
    "i": (pa.array([1, None]), [1, NAN]),
    "u": (pa.array([2**63, None], pa.uint64()), [2.0**63, NAN]),
    "f": (pa.array(np.array([1.5, 2], np.float16)), [1.5, 2]),
    "dec": (pa.array([decimal.Decimal("1.25"), None]), [1.25, NAN]),
    "dec256": (pa.array([decimal.Decimal("1.25"), None], pa.decimal256(50, 2)), [1.25, NAN]),
    "null": (pa.nulls(2), [NAN, NAN]),
    "time32": (pa.array([MOMENT.time(), None], pa.time32("ms")), [11045.678, NAN]),
    "time64": (pa.array([MOMENT.time(), None], pa.time64("us")), [SECONDS, NAN]),
    "duration": (pa.array([datetime.timedelta(seconds=1.5), None]), [1.5, NAN]),
    "codes": (pa.array([5, None]).dictionary_encode(), [5, NAN]),
    "stamp": (pa.array([MOMENT, None], pa.timestamp("us")), [MOMENT, None]),
    "seconds": (pa.array([60, None], pa.timestamp("s")), [datetime.datetime(1970, 1, 1, 0, 1), None]),
    "zone": (pa.array([MOMENT, None], pa.timestamp("ns", "Europe/Berlin")), [MOMENT, None]),
    "date32": (pa.array([MOMENT.date(), None]), [datetime.datetime(2020, 1, 2), None]),
    "date64": (pa.array([MOMENT.date(), None], pa.date64()), [datetime.datetime(2020, 1, 2), None]),
    "text": (pa.array(["x", ""]), ["x", None]),
    "large": (pa.array(["x", None], pa.large_string()), ["x", None]),
    "view": (pa.array(["x", None], pa.string_view()), ["x", None]),
    "category": (pa.array(["x", None]).dictionary_encode(), ["x", None]),
    "bool": (pa.array([True, None]), ["true", None]),
    "list": (pa.array([[1], None]), None),
    "bytes": (pa.array([b"x", None]), None),
    "struct": (pa.array([{"x": 1}, None]), None),
}


@pytest.mark.parametrize("suffix", ["parquet", "feather", "arrow"])
def test_types_of_arrow(tmp_path, suffix):
    table, path = pa.table({name: column for name, (column, _) in ARROW.items()}), tmp_path / f"t.{suffix}"
    if suffix == "arrow":
        with ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    else:
        (parquet.write_table if suffix == "parquet" else feather.write_feather)(table, path)
    file = TableFile(path)
    assert file.names == [*ARROW]
    good = [name for name, (_, values) in ARROW.items() if values]
    assert "".join(kind[0] for kind in file.kinds(good).values()) == "n" * 10 + "t" * 9 + "b"
    for name, values in contents(file, good[::-1]).items():
        np.testing.assert_equal(values, ARROW[name][1], err_msg=name)
    for name in ARROW.keys() - {*good}:
        one_line(lambda: file.kinds([name]), str(path), f"column '{name}' holds", "dataset.columns=[…]")
    texts = contents(TableFile(path, text=good), ["i", "f", "stamp", "bool"])
    assert [*texts.values()] == [["1", None], ["1.5", "2"], ["2020-01-02T03:04:05.678901", None], ["true", None]]


def test_names_and_indices_of_parquet(tmp_path):
    columns = [pa.array([i, i + 10]) for i in range(3)]
    parquet.write_table(pa.Table.from_arrays(columns, names=["a", "a.b", "a"]), tmp_path / "t.parquet")
    file = TableFile(tmp_path / "t.parquet")
    assert_holds(file, {"a": [0, 10], "a.b": [1, 11], "a_2": [2, 12]})
    assert contents(file, ["a_2"]) == {"a_2": [2, 12]}
    for index, name in (([5, 9], None), ([0, 1], "Unnamed: 0")):
        frame = pd.DataFrame({"a": [1.5, 2.5]}, index=pd.Index(index, name=name))
        frame.to_parquet(tmp_path / "t.parquet")
        file = TableFile(tmp_path / "t.parquet")
        assert_holds(file, {"a": [1.5, 2.5]})
        assert file.notes == [f"the column called '{name or '__index_level_0__'}' is left out: it is an index"]


def test_a_folder_of_parquet_parts(tmp_path):
    for number in (2, 1):
        pd.DataFrame({"a": [number, 0.5], "b": ["x", "y"]}).to_parquet(tmp_path / f"part-{number}.parquet")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / ".part-0.parquet").touch()
    assert_holds(TableFile(tmp_path), {"a": [1, 0.5, 2, 0.5], "b": ["x", "y"] * 2}, "nt")
    pd.DataFrame({"a": [1.5], "c": ["x"]}).to_parquet(tmp_path / "part-3.parquet")
    one_line(lambda: TableFile(tmp_path), "part-3.parquet has other columns than part-1.parquet: only one has b, c")
    pd.DataFrame({"a": ["x"], "b": ["x"]}).to_parquet(tmp_path / "part-3.parquet")
    one_line(lambda: TableFile(tmp_path), "column 'a' holds", "in part-3.parquet, but double in part-1.parquet")
    (tmp_path / "part-3.parquet").write_bytes(b"nothing")
    one_line(lambda: TableFile(tmp_path), "part-3.parquet", error=FlowtrainError)
    (tmp_path / "empty").mkdir()
    one_line(lambda: TableFile(tmp_path / "empty"), "a folder must hold parts that end in .parquet")
    (tmp_path / "x=1").mkdir()
    (tmp_path / "part-3.parquet").rename(tmp_path / "x=1/part.parquet")
    one_line(lambda: TableFile(tmp_path), "divided by a column (x=1)")


def test_arrays_of_other_shapes_and_types(tmp_path):
    def holds(array, expected, kinds=None):
        np.save(tmp_path / "a.npy", array)
        assert_holds(TableFile(tmp_path / "a.npy"), expected, kinds)

    holds(np.arange(3.0), {"c0": [0, 1, 2]})
    holds(np.array([[True], [False]]), {"c0": ["true", "false"]}, "b")
    holds(np.array([["a", ""]]), {"c0": ["a"], "c1": [None]}, "tt")
    fields = [("i", ">i4"), ("v", "f4", 2), ("s", "S3"), ("b", "?"), ("t", "M8[D]"), ("d", "m8[ms]")]
    day = datetime.datetime(2020, 1, 2)
    holds(
        np.array([(1, [2, 3], b"x", True, "2020-01-02", 1500), (2, [4, 5], b"", False, "NaT", "NaT")], fields),
        {"i": [1, 2], "v_0": [2, 4], "v_1": [3, 5], "s": ["x", None], "b": ["true", "false"]}
        | {"t": [day, None], "d": [1.5, NAN]},
        "nnntbtn",
    )
    np.save(tmp_path / "a.npy", np.zeros(3, [("x", "c8"), ("y", "f8"), ("z", [("w", "f4")])]))
    file = TableFile(tmp_path / "a.npy", text=["y"])
    assert contents(file, ["y"]) == {"y": ["0"] * 3}
    one_line(lambda: file.kinds(["x"]), "column 'x' holds complex64")
    one_line(lambda: file.kinds(["z"]), "column 'z' holds [('w', '<f4')]")
    for shape in ((), (2, 2, 2)):
        np.save(tmp_path / "a.npy", np.zeros(shape))
        one_line(lambda: TableFile(tmp_path / "a.npy"), "must be numbers (rows, columns)")


def test_archives_of_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(block, "BLOCK", 2)
    path, rows = tmp_path / "a.npz", np.arange(6.0).reshape(3, 2)
    np.savez(path, x=rows[:, 0], y=rows[:, 1])
    assert_holds(TableFile(path), {"x": [0, 2, 4], "y": [1, 3, 5]})
    for save, array in ((np.savez, rows), (np.savez_compressed, np.asfortranarray(rows))):
        save(path, first=array, objects=np.array([None]))
        assert_holds(TableFile(path), {"c0": [0, 2, 4], "c1": [1, 3, 5]})
    np.savez(path, first=rows, second=rows[:2, :1])
    one_line(lambda: TableFile(path), "it holds several arrays", "dataset.key=…: first, second")
    one_line(lambda: TableFile(path, key="secnd"), "dataset.key=secnd", "did you mean 'second'?")
    assert_holds(TableFile(path, key="second"), {"c0": [0, 2]})
    path.write_bytes(path.read_bytes()[:-30])
    one_line(lambda: TableFile(path), f"cannot read {path}", error=FlowtrainError)


def test_hdf5(tmp_path, monkeypatch):
    monkeypatch.setattr(block, "BLOCK", 2)
    path, rows = tmp_path / "a.h5", np.arange(6.0).reshape(3, 2)
    with h5py.File(path, "w") as file:
        file["one/rows"] = rows
    assert_holds(TableFile(path), {"c0": [0, 2, 4], "c1": [1, 3, 5]})
    with h5py.File(path, "a") as file:
        file["pairs"] = np.array([(1, 2.5), (2, 3.5)], [("i", "i4"), ("f", "f8")])
        file["two/a"], file["two/b"] = rows[:, 0], ["x", "", "y"]
        file["number"] = 3
    one_line(lambda: TableFile(path), "it holds several arrays", "one/rows, pairs, two/a, two/b")
    assert_holds(TableFile(path, key="/pairs"), {"i": [1, 2], "f": [2.5, 3.5]})
    assert_holds(TableFile(path, key="two"), {"a": [0, 2, 4], "b": ["x", None, "y"]}, "nt")
    assert_holds(TableFile(path, key="two/b"), {"c0": ["x", None, "y"]}, "t")
    one_line(lambda: TableFile(path, key="number"), "dataset.key=number", "no such array")
    one_line(lambda: TableFile(write(tmp_path / "b.h5", "junk")), "cannot read", error=FlowtrainError)


def test_json_lines(tmp_path):
    lines = '{"a": 1, "b": " x", "c": true, "d": [1]}\n\n{"a": 2.5, "b": "", "c": null}\n{"a": NaN, "b": null}\n'
    path = write(tmp_path / "t.jsonl", lines)
    file = TableFile(path)
    assert file.names == ["a", "b", "c", "d"] and [*file.kinds("abc").values()] == ["number", "text", "boolean"]
    expected = {"a": [1, 2.5, NAN], "b": ["x", None, None], "c": ["true", None, None]}
    np.testing.assert_equal(contents(file, [*"abc"]), expected)
    one_line(lambda: file.kinds(["d"]), str(path), "lists, objects or several kinds in d: dataset.columns=")
    assert contents(TableFile(path, text=["a"]), ["a"])["a"] == ["1", "2.5", None]
    packed = tmp_path / "t.ndjson.gz"
    packed.write_bytes(gzip.compress(lines.encode()))
    np.testing.assert_equal(contents(TableFile(packed), [*"abc"]), expected)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["it is empty"]),
        ('{"a": 1}\n\n{"a": 2\n', ["row 2 (the first is 1) is no JSON"]),
        ('{"a": 1}\n[2]\n', ["row 2", "no object of JSON"]),
        ('{"a": 1}\n' * 3000 + '{"a": "x"}\n', ["column 'a', row 3001", '"x" is not a number']),
        ('{"a": true}\n' * 3000 + '{"a": 1}\n', ["column 'a', row 3001", "1 is not true or false"]),
    ],
)
def test_json_lines_that_are_refused(tmp_path, text, parts):
    one_line(lambda: contents(TableFile(write(tmp_path / "t.jsonl", text))), *parts)


def test_sheets(tmp_path):
    path = tmp_path / "t.xlsx"
    first = {"a": [1, 2.5, None], "zip": ["01234", "2", "9"], "when": [MOMENT.replace(microsecond=0), None, None]}
    with pd.ExcelWriter(path) as book:
        pd.DataFrame(first | {"b": [True, False, None]}).to_excel(book, sheet_name="one")
        pd.DataFrame({"q": [1, 2]}).to_excel(book, sheet_name="two", index=False, startrow=2, startcol=1)
    file = TableFile(path)
    expected = {"a": [1, 2.5, NAN], "zip": first["zip"], "when": ["2020-01-02 03:04:05", None, None]}
    assert_holds(file, expected | {"b": ["true", "false", None]}, "nttb")
    assert "index" in file.notes[0] and "the sheet is 'one'" in file.notes[1]
    for sheet in ("two", 1):
        assert_holds(TableFile(path, read={"sheet_name": sheet}), {"q": [1, 2]})
    one_line(lambda: TableFile(path, read={"sheet_name": "tw"}), "dataset.read.sheet_name=tw", "did you mean 'two'?")
    one_line(lambda: TableFile(path, read={"skiprow": 1}), "dataset.read.skiprow", "did you mean 'skiprows'?")


def test_files_that_are_refused_by_their_names(tmp_path):
    one_line(lambda: TableFile(tmp_path / "t.xls"), "must end in .csv, .tsv, .txt, .dat, .data, .parquet", ".gz, .bz2")
    one_line(lambda: TableFile(tmp_path / "t.parquet.gz"), "must end in")
    for suffix, hint in (
        (".xls", "save it as .xlsx"),
        (".json", "an object in each line"),
        (".zarr", "dataset=arrays"),
    ):
        one_line(lambda: TableFile(tmp_path / f"t{suffix}"), "must end in", hint)
    one_line(lambda: TableFile(tmp_path / "t.gz"), "must end in")
    one_line(lambda: TableFile(tmp_path / "t.tsv"), "t.tsv: no such file")
    path = write(tmp_path / "t.csv", "a\n1\n")
    one_line(lambda: TableFile(path, key="x"), "dataset.key=x", "only .npz and .h5 files have keys")
    for suffix, option in ((".npy", "a"), (".parquet", "pre_bufer"), (".jsonl", "precise"), (".feather", "x")):
        np.save(tmp_path / "t.npy", np.zeros((2, 2)))
        pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "t.parquet")
        pd.DataFrame({"a": [1]}).to_feather(tmp_path / "t.feather")
        write(tmp_path / "t.jsonl", '{"a": 1}\n')
        one_line(
            lambda: TableFile(tmp_path / f"t{suffix}", read={option: 1}), f"dataset.read.{option} is not an option"
        )


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("t.csv", "pandas", "tables"), ("t.h5", "h5py", "tables"), ("t.xlsx", "openpyxl", "excel")],
)
def test_a_package_that_is_lacking_is_named(tmp_path, monkeypatch, name, package, extra):
    if name == "t.xlsx":
        pd.DataFrame({"a": [1]}).to_excel(tmp_path / name)
    else:
        write(tmp_path / name, "a\n1\n")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    one_line(lambda: TableFile(tmp_path / name), "pip install 'flowtrain[", extra)
