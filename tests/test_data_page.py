"""docs/data.md: each row of its tables, and each line of refusal, is what happens."""

import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import zarr
from PIL import Image

from flowtrain import data
from flowtrain.data import array_files, image_sources
from flowtrain.data.tables.table_file import COMPRESSED, READERS
from flowtrain.data.tables.text_stream import COMPRESSIONS
from flowtrain.errors import FlowtrainError

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
N = 40
RANDOM = np.random.default_rng(0)
FRAME = pd.DataFrame({"a": RANDOM.normal(size=N), "b": RANDOM.choice(["red", "green"], N)})
ARRAYS = {
    "real numbers (40, 2)": RANDOM.normal(size=(N, 2)),
    "a structured array": np.array([*FRAME.itertuples(index=False)], dtype=[("a", "f8"), ("b", "U5")]),
    "real numbers (40, 8, 12)": RANDOM.normal(size=(N, 8, 12)),
    "integers (40, 8, 12, 3)": RANDOM.integers(0, 256, (N, 8, 12, 3), dtype=np.uint8),
}
PICTURES = ARRAYS["integers (40, 8, 12, 3)"][:4]
COLUMNS = "arrays a and b, (40,) each"


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the rows of the table whose first heading it is."""
    lines = PAGE[PAGE.index(f"| {heading} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def files() -> list[tuple[bool, str, str, list[str]]]:
    """Whether it is a folder of such files, the suffix, what it holds, and what the page says of each dataset."""
    found = []
    for names, holds, *says in rows_of("file"):
        for part in re.split(", (?=folder)", names):
            found += [(part.startswith("folder"), suffix, holds, says) for suffix in re.findall(r"`(.*?)`", part)]
    return found


def encode(pixels, kind: str = "png") -> bytes:
    file, kind = io.BytesIO(), {"jpg": "jpeg", "tif": "tiff", "pgm": "ppm"}.get(kind, kind)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_array(path, array) -> None:
    arrays = {name: FRAME[name].to_numpy("f8" if name == "a" else "S5") for name in "ab"} if array is None else None
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez(path, **arrays or {"x": array})
    elif path.suffix == ".zarr":
        zarr.open_group(path, mode="w").create_array("x", data=array)
    else:
        with h5py.File(path, "w") as file:
            for name, value in (arrays or {"x": array}).items():
                file[name] = value


def write(path, holds: str) -> None:
    """Write a file of this name that holds what the page says."""
    ends = path.suffixes
    if holds == "text":
        FRAME.to_csv(path, index=False, sep="\t" if ends[0] == ".tsv" else ",")
    elif holds == "an object in each line":
        FRAME.to_json(path, orient="records", lines=True)
    elif holds == "a sheet":
        FRAME.to_excel(path, index=False, engine="openpyxl") if ends == [".xlsx"] else path.write_bytes(b"\xd0\xcf")
    elif holds == "columns":
        FRAME.to_parquet(path) if ends == [".parquet"] else FRAME.to_feather(path)
    elif holds == "encoded images":
        pd.DataFrame({"image": [encode(image) for image in PICTURES]}).to_parquet(path)
    elif holds in ARRAYS or holds == COLUMNS:
        write_array(path, ARRAYS.get(holds))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for i, image in enumerate(PICTURES):
                archive.writestr(f"{i}.png", encode(image))
    elif ends[0] == ".tar":
        with tarfile.open(path, "w:gz" if ends[-1] == ".gz" else "w") as archive:
            for i, image in enumerate(PICTURES):
                member = tarfile.TarInfo(f"{i}.png")
                member.size = len(encode(image))
                archive.addfile(member, io.BytesIO(encode(image)))
    elif holds == "images":
        path.write_bytes(encode(PICTURES[0], path.suffix[1:]))
    else:
        assert holds == "anything"
        path.write_bytes(b"anything")


def write_all(folder: Path, is_folder: bool, suffix: str, holds: str) -> Path:
    """A file, or a folder of three files; an array in a folder has one example a file."""
    path = folder / f"data{suffix}"
    if not is_folder:
        if suffix.endswith(".zst"):  # pandas needs one more package to write it
            write(path.with_suffix(""), holds)
            with pa.CompressedOutputStream(str(path), "zstd") as packed:
                packed.write(path.with_suffix("").read_bytes())
        else:
            write(path, holds)
        return path
    path = folder / "data"
    path.mkdir()
    for i in range(3 if suffix != ".npy" else N):
        file = path / f"{i:02}{suffix}"
        np.save(file, ARRAYS[holds][i]) if suffix == ".npy" else write(file, holds)
    return path


def what_happens(kind, path: Path) -> str:
    """What the page should say of a file."""
    dataset = kind(path=str(path), **({"image_size": [8, 12]} if kind is data.ImageFolder else {}))
    try:
        split = dataset.split("train")
        split.take(torch.arange(len(split)))
    except FlowtrainError as error:
        return f"– {error}"
    if kind is data.Table:
        return ", ".join(split.columns.names)
    return "×".join(map(str, split.shape)) if len(split.shape) == 3 else f"vector {split.shape[0]}"


@pytest.mark.parametrize(
    ("is_folder", "suffix", "holds", "says"),
    files(),
    ids=lambda value: value if isinstance(value, str) else "folder" if value is True else "",
)
def test_a_file_is_what_the_page_says(tmp_path, is_folder, suffix, holds, says):
    path = write_all(tmp_path, is_folder, suffix, holds)
    for kind, cell in zip((data.Table, data.Arrays, data.ImageFolder), says, strict=True):
        happens = what_happens(kind, path)
        if cell.startswith("–"):
            assert happens.startswith("– ") and cell.removeprefix("–").strip() in happens and "\n" not in happens
        else:
            assert happens == cell


def test_the_page_names_every_suffix():
    named = {suffix for _, suffix, _, says in files() if not all(cell.startswith("–") for cell in says)}
    packed = {f"{suffix}{end}" for suffix, reader in READERS.items() if reader in COMPRESSED for end in COMPRESSIONS}
    archives = {".zip", ".tar", ".parquet"}
    assert named == {*READERS, *packed, *array_files.SUFFIXES, *image_sources.SUFFIXES, *archives}


@pytest.mark.parametrize(("values", "type_"), [row[:2] for row in rows_of("values, such as")])
def test_a_column_is_taken_for_what_the_page_says(tmp_path, values, type_):
    values = re.findall("`(.*?)`", values)
    lines = [f"{values[i % len(values)]},{i / 7}" for i in range(N)]
    (tmp_path / "t.csv").write_text("\n".join(["v,x", *lines, ""]))
    columns = data.Table(path=str(tmp_path / "t.csv")).split("train").columns
    assert any(re.match(rf"{type_}: v\b", line) for line in columns.describe())


def csv(text: str, encoding: str = "utf-8") -> dict:
    Path("survey.csv").write_bytes(text.encode(encoding))
    return {"path": "survey.csv"}


def spectra() -> dict:
    with h5py.File("spectra.h5", "w") as file:
        file["err"] = file["flux"] = RANDOM.normal(size=(N, 10))
    return {"path": "spectra.h5"}


def array(path: str, values) -> dict:
    np.save(path, values)
    return {"path": path}


def log() -> dict:
    Path("log.jsonl").write_text("".join(json.dumps({"ms": i % 7, "user": {"id": i}}) + "\n" for i in range(N)))
    return {"path": "log.jsonl"}


PAIRS, COUNTS = "1,2\n2,3\n" * 10, [f"{i % 7},{40 + i % 9}\n" for i in range(30)]
HOLE = np.where(np.arange(N)[:, None, None] == 7, np.nan, ARRAYS["real numbers (40, 8, 12)"])
REFUSED = [  # in the order of the page
    (data.Table, lambda: csv("straße,b\n" + PAIRS, "latin-1")),
    (data.Table, lambda: csv("age,b\n1,2\n2,3\n,4\n" + PAIRS)),
    (data.Table, lambda: csv("a,b\n" + PAIRS + "1,2,3\n")),
    (data.Table, lambda: csv("v,size\n" + "".join(COUNTS) + "1,M\n")),
    (data.Table, lambda: csv("v,price\n" + "".join(f"{i % 7},$1{i}\n" for i in range(30)))),
    (data.Table, lambda: csv("p,b\n0.5,2\n1.5,3\n" + PAIRS) | {"types": {"p": [0, 1]}}),
    (data.Table, lambda: csv("height,b\n" + PAIRS) | {"columns": ["hight"]}),
    (data.Table, log),
    (data.Table, spectra),
    (data.Arrays, spectra),
    (data.Arrays, lambda: array("amb.npy", np.zeros((N, 8, 12, 2)))),
    (data.Arrays, lambda: array("nan.npy", HOLE)),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_a_refusal_says_what_the_page_says(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    block = PAGE[PAGE.index("## What is refused") :].split("```")[1].removeprefix("text\n")
    lines = block.replace("\n  ", " ").strip().splitlines()
    assert len(lines) == len(REFUSED)
    kind, keys = REFUSED[number]
    with pytest.raises(FlowtrainError) as refusal:
        kind(**keys()).split("train")
    assert str(refusal.value) == lines[number]
