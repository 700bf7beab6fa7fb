"""Files that users might bring by accident: valid files of every kind, damaged, mixed up or of enormous shape."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image
from pyarrow import feather, parquet

ROWS = 60
SIDE = 8
# what commands open each kind of file as
TABLES = ("csv", "tsv", "txt", "dat", "csv.gz", "csv.bz2", "csv.xz", "csv.zst", "parquet", "feather", "arrow")
TABLES += ("npy", "npz", "h5", "jsonl", "xlsx")
ARRAYS = ("npy", "npz", "h5")
IMAGES = ("zip", "tar", "parquet")
PICTURES = ("png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm")


def frame(seed: int = 0) -> pd.DataFrame:
    """A table with a column of each type."""
    numbers = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "x": numbers.normal(size=ROWS),
            "n": numbers.integers(0, 9, ROWS),
            "colour": numbers.choice(["red", "grün", "blue"], ROWS),
            "when": pd.date_range("2024-01-01", periods=ROWS, freq="h").astype(str),
            "ok": numbers.random(ROWS) < 0.5,
            "zip": [f"{code:05}" for code in numbers.integers(0, 99, ROWS)],
        }
    )


def valid(kind: str) -> bytes:
    """A valid file of a kind of table."""
    table, numbers, out = frame(), frame()[["x", "n"]].to_numpy(), io.BytesIO()
    text = table.to_csv(index=False, sep="\t" if kind == "tsv" else " " if kind == "dat" else ",").encode()
    if kind in ("csv", "tsv", "txt", "dat"):
        return text
    if kind == "csv.zst":
        return pa.compress(text, "zstd", asbytes=True)
    if kind.startswith("csv."):
        return {"gz": gzip, "bz2": bz2, "xz": lzma}[kind[4:]].compress(text)
    if kind == "jsonl":
        return table.to_json(orient="records", lines=True).encode()
    if kind == "npy":
        np.save(out, numbers)
    elif kind == "npz":
        np.savez(out, a=numbers)
    elif kind == "h5":
        with h5py.File(out, "w") as file:
            file["a"] = numbers
    elif kind == "xlsx":
        table.to_excel(out, index=False)
    elif kind == "parquet":
        table.to_parquet(out)
    elif kind in ("feather", "arrow"):
        feather.write_feather(pa.Table.from_pandas(table), out)
    return out.getvalue()


def pictures(form: str = "png", seed: int = 0) -> list[bytes]:
    """Some small images."""
    numbers, found = np.random.default_rng(seed), []
    for _ in range(12):
        out = io.BytesIO()
        Image.fromarray(numbers.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(out, form)
        found.append(out.getvalue())
    return found


def pack(kind: str, members: dict[str, bytes]) -> bytes:
    """An archive of files by name; in a Parquet file, images by row with the first part of the name as a label."""
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    elif kind == "tar":
        with tarfile.open(fileobj=out, mode="w") as archive:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        labels = [name.split("/")[0] for name in members]
        parquet.write_table(pa.table({"image": pa.array(members.values(), pa.binary()), "label": labels}), out)
    return out.getvalue()


def images(kind: str, form: str = "png") -> bytes:
    """A valid archive of small images of two classes."""
    members = {f"{'ab'[number % 2]}/{number}.{form}": data for number, data in enumerate(pictures(form))}
    if kind == "tar":
        members |= {f"{name.rpartition('.')[0]}.cls": name[:1].encode() for name in members}
    return pack(kind, members)


# ---- damage to the bytes of any file -------------------------------------------------------------------------------


def cut(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))]


def flip(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 3, 30])):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
    return bytes(changed)


def insert(data: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(data))
    return data[:place] + dice.randbytes(dice.choice([1, 7, 400])) + data[place:]


def repeat(data: bytes, dice: random.Random) -> bytes:
    start, stop = sorted(dice.randrange(len(data)) for _ in range(2))
    return data[:stop] + data[start:stop] * dice.choice([1, 5]) + data[stop:]


def remove(data: bytes, dice: random.Random) -> bytes:
    start, stop = sorted(dice.randrange(len(data)) for _ in range(2))
    return data[:start] + data[stop:]


def wrap(data: bytes, dice: random.Random) -> bytes:
    """An archive in an archive, some levels deep."""
    kind = dice.choice(["gz", "zip", "tar"])
    for _ in range(dice.choice([1, 2, 20])):
        data = gzip.compress(data) if kind == "gz" else pack(kind, {f"a.{dice.choice(['png', kind])}": data})
    return data


def disguise(data: bytes, dice: random.Random) -> bytes:
    """The content of another kind of file."""
    return valid(dice.choice(TABLES)) if dice.random() < 0.7 else images(dice.choice(IMAGES))


DAMAGE = (cut, flip, insert, repeat, remove, wrap, disguise)

# ---- texts that are strange but may be read -----------------------------------------------------------------------


def _lines(text: str) -> list[str]:
    return text.split("\n")


def mix_types(text: str, dice: random.Random) -> str:
    lines, strange = _lines(text), ("?", "1e999", "-", "abc", "2024-13-45", "NaN", "0x1F", "1_000", '"', "١٢٣", "", "∞")
    for _ in range(dice.choice([1, 5, 40])):
        row = dice.randrange(len(lines))
        fields = lines[row].split(",")
        fields[dice.randrange(len(fields))] = dice.choice(strange)
        lines[row] = ",".join(fields)
    return "\n".join(lines)


def change_separators(text: str, dice: random.Random) -> str:
    lines = _lines(text)
    for row in range(len(lines)):
        if dice.random() < 0.3:
            lines[row] = lines[row].replace(",", dice.choice([";", "\t", "|", " ", ",,", "\0"]))
    return "\n".join(lines)


def change_header(text: str, dice: random.Random) -> str:
    head, _, rest = text.partition("\n")
    names = ["", " ", "x", '"', "#", "${x}", "a\tb", "名", "=1", "x" * 70_000]
    return ",".join(dice.choice([name, dice.choice(names)]) for name in head.split(",")) + "\n" + rest


def change_line_ends(text: str, dice: random.Random) -> str:
    return "".join(dice.choice(["\n", "\r\n", "\r", "\n\n", "\v", "\x1c"]) if sign == "\n" else sign for sign in text)


def comment(text: str, dice: random.Random) -> str:
    lines = _lines(text)
    for _ in range(dice.choice([1, 10])):
        lines.insert(dice.randrange(len(lines)), dice.choice(["# a comment", "% a, b", "//", '"', "#" * 5000, ";;;;"]))
    return "\n".join(lines)


def one_row(text: str, dice: random.Random) -> str:
    return "\n".join(_lines(text)[: dice.choice([0, 1, 2, 3])])


STRANGE = (mix_types, change_separators, change_header, change_line_ends, comment, one_row)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift_jis", "utf-7", "cp037")

# ---- Parquet files with types that no flow takes -----------------------------------------------------------------


def odd_columns() -> dict[str, pa.Array]:
    """Columns of odd types by name."""
    return {
        "lists": pa.array([[1, 2], [3]] * 30),
        "structs": pa.array([{"a": 1, "b": "c"}] * ROWS),
        "maps": pa.array([[("a", 1)]] * ROWS, pa.map_(pa.string(), pa.int64())),
        "bytes": pa.array([b"\xff\x00"] * ROWS),
        "nothing": pa.nulls(ROWS),
        "wide": pa.array([10**40 + i for i in range(ROWS)], pa.decimal256(60, 2)),
        "uint64": pa.array([2**64 - 1 - i for i in range(ROWS)], pa.uint64()),
        "ancient": pa.array([-(2**62) + i for i in range(ROWS)], pa.timestamp("ns")),
        "far": pa.array([2**62 + i for i in range(ROWS)], pa.timestamp("ms")),
        "zones": pa.array(range(ROWS), pa.timestamp("us", "Pacific/Kiritimati")),
        "durations": pa.array(range(ROWS), pa.duration("ms")),
        "clock": pa.array(range(ROWS), pa.time32("s")),
        "halves": pa.array(np.arange(ROWS, dtype=np.float16)),
        "codes": pa.array(["a", "b"] * 30).dictionary_encode(),
        "empty texts": pa.array([""] * ROWS),
        "huge texts": pa.array([str(i) * 50_000 for i in range(ROWS)]),
        "infinite": pa.array([np.inf, 1.0] * 30),
        "twice": pa.array([1.5, 2.0] * 30),
    }


def odd_parquet(dice: random.Random) -> bytes:
    chosen = dice.sample(sorted(odd_columns().items()), dice.choice([1, 2, 5]))
    names = [dice.choice([name, name, "x", ""]) for name, _ in chosen]  # some twice
    table, out = pa.table([array for _, array in chosen], names=names), io.BytesIO()
    if dice.random() < 0.5:
        table = table.append_column("y", pa.array(np.random.default_rng(0).normal(size=ROWS)))
    parquet.write_table(table.slice(0, dice.choice([ROWS, ROWS, 3, 0])), out)
    return out.getvalue()


def odd_h5(dice: random.Random) -> bytes:
    """An .h5 file of odd types, or with a dataset that says to be enormous and holds nothing."""
    out = io.BytesIO()
    with h5py.File(out, "w") as file:
        kind = dice.randrange(8)
        if kind == 0:
            file["a"] = np.zeros((ROWS, 2), dice.choice([">f4", "c16", "?", "f2", "S3", "V5"]))
        elif kind == 1:
            file.create_dataset("a", (10**9, 100), "f4", chunks=(1000, 100))
        elif kind == 2:
            file.create_dataset("a", (ROWS,), h5py.vlen_dtype(np.int32))
        elif kind == 3:
            file.create_dataset("a", (ROWS,), h5py.ref_dtype)
        elif kind == 4:
            file["a"] = np.zeros(ROWS, [("x", "f8"), ("y", "S4"), ("z", "i4", (2, 2))])
        elif kind == 5:
            file["a"] = h5py.SoftLink(dice.choice(["/a", "/nothing"]))
            file["b"] = h5py.ExternalLink("/dev/zero", "/a")
        elif kind == 6:
            file["a"] = h5py.Empty("f4")
            file["b"] = dice.choice([1.0, "text"])
        else:
            file.create_dataset("a", (dice.choice([0, 1, 2]), 3), "f4")
            file["group/x"], file["group/y"] = np.arange(ROWS), ["é", "b"] * 30
    return out.getvalue()


def odd_json(dice: random.Random) -> bytes:
    """JSON lines of odd values or forms."""
    values = [
        "1e999",
        "NaN",
        "-0",
        "1" * 400,
        '"\\ud800"',
        "[1]",
        "{}",
        "[" * 3000,
        "null",
        "true",
        '"2024-01-01"',
        "0x1",
    ]
    lines = []
    for row in range(ROWS):
        value = dice.choice(values) if dice.random() < 0.1 else f"{dice.random()}"
        lines.append(
            dice.choice(['{"a": %s, "b": %d}'] * 9 + ['{"a": %s, "a": %d}', "[%s, %d]", '{"a":%s}\r%d']) % (value, row)
        )
    return dice.choice(["\n", "\n", "\n\n", "", ","]).join(lines).encode()


def odd_xlsx(dice: random.Random) -> bytes:
    """An .xlsx file with members of XML that are damaged or lie."""
    with zipfile.ZipFile(io.BytesIO(valid("xlsx"))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = dice.choice(sorted(members))
    change = dice.randrange(5)
    if change == 0:
        members[name] = dice.choice(DAMAGE[:5])(members[name], dice)
    elif change == 1:
        del members[name]
    elif change == 2:
        entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
        bomb = f'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY e0 "x">{entities}]><a>&e11;</a>'
        members[name] = bomb.encode()
    elif change == 3:
        sheet = "xl/worksheets/sheet1.xml"
        place = dice.choice([b'r="XFD1048576"', b'r="A1048576"', b'r="XFD60"', b'r="A0"', b'r="?"'])
        members[sheet] = members[sheet].replace(b'r="F61"', place)
    else:
        sheet = "xl/worksheets/sheet1.xml"
        members[sheet] = members[sheet].replace(b"<v>1</v>", b"<v>999999</v>").replace(b't="n"', b't="s"')
    return pack("zip", members)


def odd_array(dice: random.Random) -> bytes:
    """An .npy of an odd dtype or shape, or with a header that lies."""
    out = io.BytesIO()
    kinds = ["f2", "f8", ">f4", "c16", "?", "u8", "i1", "S3", "U2", "M8[s]", "m8[D]", "f4,i2", "V7"]
    shape = dice.choice([(), (0,), (ROWS,), (ROWS, 0), (0, 3), (ROWS, 2), (ROWS, 2, 3), (ROWS, 4, 4, 3), (1,) * 32])
    np.save(out, np.zeros(shape, dtype=dice.choice(kinds)))
    data = out.getvalue()
    if dice.random() < 0.2:
        return pack("zip", {f"{name}.npy": data for name in "ab"[: dice.choice([1, 2])]})
    return data.replace(b"(60,", dice.choice([b"(99,", b"(60,", b"(-1,", b"(9999999999999,"]), 1)


ODD = {"parquet": odd_parquet, "npy": odd_array, "npz": odd_array, "h5": odd_h5, "jsonl": odd_json, "xlsx": odd_xlsx}

# ---- archives of images ------------------------------------------------------------------------------------------


def odd_images(kind: str, dice: random.Random) -> bytes:
    """An archive of images that are damaged, of another kind than they say, or no images."""
    members = {}
    for number, picture in enumerate(pictures(dice.choice(PICTURES))):
        if dice.random() < 0.3:
            picture = dice.choice([cut, flip, insert, remove])(picture, dice)
        name = dice.choice(
            [f"a/{number}.png", f"b/{number}.jpg", f"{number}.gif", "../a.png", f"a/{number}.tiff", "\udc80.png"]
        )
        members[name] = dice.choice([picture, picture, picture, b"", valid("csv"), images("zip")])
        if dice.random() < 0.4:
            members[f"{name}.cls".encode("utf-8", "replace").decode()] = dice.choice([b"1", b"", b"\xff", b"9" * 2000])
    if kind != "tar":
        members = {name.encode("utf-8", "replace").decode(): data for name, data in members.items()}
    return pack(kind, members)


def bomb(kind: str, dice: random.Random) -> bytes:
    """An archive with an image that says to be enormous, or is."""
    zeros = bytes(2**22)
    big = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(big, dice.choice(["png", "tiff", "gif", "webp"][:3]))
    members = {
        "a/0.png": big.getvalue(),
        "a/1.gif": pictures("gif")[0][:-1] + zeros,
        "b/2.ppm": b"P6 %d %d 255\n" % (10**9, 10**9) + zeros,
        "b/3.png": pictures()[0],
        "b/4.bmp": zeros,
    }
    return pack(kind, dict(dice.sample(sorted(members.items()), 3)))


# ---- files that are enormous --------------------------------------------------------------------------------------


def write_enormous(folder: Path, gigabyte: bool) -> Iterator[tuple[str, Path]]:
    """Write files that are wide, long, deep or unpack to much more, one at a time; what to open each as, and its path.
    The longest have a gigabyte, or 1/16 of it."""
    megabytes = 1024 if gigabyte else 64
    columns = 1_000_000

    def fill(name: str, part: bytes, count: int, head: bytes = b"", opener=open) -> tuple[str, Path]:
        with opener(folder / name, "wb") as file:
            file.write(head)
            for _ in range(count):
                file.write(part)
        return "table", folder / name

    header = ",".join(f"c{i}" for i in range(columns)).encode()
    yield fill("wide.csv", b"1," * (columns - 1) + b"2\n", 3, header + b"\n")
    yield fill("wide without names.dat", b"1.5 " * (columns - 1) + b"2\n", 3)
    yield fill("wide.jsonl", json.dumps(dict.fromkeys(map(str, range(columns)), 1.5)).encode() + b"\n", 3)
    yield fill("line.csv", b"1234567," * 2**17, megabytes)
    yield fill("text.csv", b"x" * 2**20, megabytes, b"a,b\n")
    yield fill("text.jsonl", b"x" * 2**20, megabytes, b'{"a": "')
    yield fill("quote.csv", b"1,2\n" * 2**18, megabytes, b'a,b\n1,2\n"')
    yield fill("nothing.csv", b"\n" * 2**20, megabytes)
    yield fill("comments.csv", b"# \n" * 2**18, megabytes, b"a,b\n1,2\n2,3\n")
    yield fill("bomb.csv.gz", bytes(2**20), megabytes, opener=gzip.open)
    yield fill("bomb.csv.bz2", b"," * 2**20, megabytes, opener=bz2.open)
    yield fill("bomb.csv.xz", b" " * 2**20, megabytes, opener=lzma.open)
    yield fill("deep.jsonl", b"}" * 100_000, 1, b'{"a": ' * 100_000 + b"1")
    path = folder / "wide.npy"
    np.save(path, np.zeros((3, columns)))
    yield "table", path
    path = folder / "repeated.parquet"
    picture = pictures()[0] + bytes(2**20)
    places = pa.array(np.arange(megabytes * 20, dtype=np.int32) % 2)
    repeated = pa.DictionaryArray.from_arrays(places, pa.array([picture, picture + b"0"]))
    parquet.write_table(pa.table({"image": repeated}), path, store_schema=False)
    yield "images", path
    path = folder / "pipe.csv"
    os.mkfifo(path)
    yield "table", path
    yield "table", folder / f"{'long' * 80}.csv"
    path = folder / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as member:
        np.lib.format.write_array_header_1_0(
            member, {"descr": "<f4", "fortran_order": True, "shape": (megabytes * 2**16, 4)}
        )
        for _ in range(megabytes):
            member.write(bytes(2**20))
    yield "table", path
    path = folder / "bomb.xlsx"
    path.write_bytes(valid("xlsx"))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("xl/sharedStrings.xml", "w") as member:
            for _ in range(max(512, megabytes)):
                member.write(b" " * 2**20)
    yield "table", path
    path = folder / "far.xlsx"
    with zipfile.ZipFile(io.BytesIO(valid("xlsx"))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    for old, new in ((b'r="F61"', b'r="XFD1048576"'), (b'<row r="61"', b'<row r="1048576"')):
        members[sheet] = members[sheet].replace(old, new)
    path.write_bytes(pack("zip", members))
    yield "table", path
    path = folder / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            with archive.open(f"{number}.gif", "w") as member:
                member.write(pictures("gif")[0])
                for _ in range(megabytes):
                    member.write(bytes(2**20))
    yield "images", path


def write_mutation(folder: Path, number: int) -> tuple[str, Path]:
    """Write mutation ``number``; what to open it as, of ``open_file.SETS``, and its path."""
    dice = random.Random(number)
    group = dice.choices(["damage", "strange", "encoding", "types", "pictures"], [8, 6, 2, 5, 4])[0]
    kind, opened_as = dice.choice(TABLES), dice.choice(["table", "table with gaps"])
    if group == "damage":
        data = dice.choice(DAMAGE)(valid(kind), dice)
        opened_as = dice.choice([opened_as, "arrays"]) if kind in ARRAYS else opened_as
    elif group == "strange":
        kind, text = dice.choice(["csv", "txt", "dat", "csv.gz"]), valid("csv").decode()
        for change in dice.sample(STRANGE, dice.choice([1, 1, 2])):
            text = change(text, dice) if text else text
        data = text.encode("utf-8", "surrogatepass")
        data = gzip.compress(data) if kind == "csv.gz" else data
    elif group == "encoding":
        kind, data = "csv", valid("csv").decode().encode(dice.choice(ENCODINGS), "replace")
    elif group == "types":
        kind = dice.choice(sorted(ODD))
        data = ODD[kind](dice)
        opened_as = dice.choice([opened_as, "arrays"]) if kind in ARRAYS else opened_as
    else:
        kind, opened_as = dice.choice(IMAGES), dice.choice(["images", "labelled images"])
        change = dice.randrange(4)
        data = odd_images(kind, dice) if change == 1 else bomb(kind, dice) if change == 2 else images(kind)
        data = dice.choice(DAMAGE)(data, dice) if change in (0, 3) else data
    path = folder / f"{number}.{kind}"
    path.write_bytes(data)
    return opened_as, path


def describe(path: Path) -> str:
    """The beginning of a file, for the report of a failure."""
    return json.dumps(path.read_bytes()[:200].decode("latin-1"))
