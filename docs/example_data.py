"""Make small files of every kind that docs/data.md reads, in the current folder: python docs/example_data.py"""

import io
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from PIL import Image

ROWS = 400
random = np.random.default_rng(0)


def people(rows: int) -> pd.DataFrame:
    """A table with a column of each type."""
    age = random.integers(18, 90, rows)
    sex = random.choice(["f", "m"], rows)
    dates = pd.Timestamp("2024-01-01") + pd.to_timedelta(random.integers(0, 300, rows), "D")
    return pd.DataFrame(
        {
            "age": age,
            "sex": sex,
            "income": (np.exp(random.normal(3.3 + age / 200, 0.4)) + 5 * (sex == "m")).round(2),
            "zip": random.choice(["01234", "10115", "80331"], rows),
            "when": dates.strftime("%d.%m.%Y"),
            "phi": random.vonmises(1, 2, rows).round(4) % 6.28,
            "p": random.beta(2, 3, rows).round(4),
            "dose": random.exponential(2, rows).round(3),
        }
    )


def write_tables() -> None:
    table = people(ROWS)
    table.to_csv("people.csv", index=False)
    people(ROWS).to_csv("others.csv", index=False)
    table[["age", "sex"]].head(5).to_csv("patients.csv", index=False)
    gaps = table.mask(random.random(table.shape) < 0.1)
    gaps[["age", "income", "p", "dose"]].to_parquet("people.parquet")
    table.rename(columns={"income": "Größe"}).to_csv("latin.csv", index=False, encoding="latin-1")
    numbers = table[["age", "income", "dose"]]
    preamble = "station 12\nno comment marks\nthree lines\n"
    Path("german.csv").write_text(preamble + numbers.to_csv(index=False, sep=";", decimal=","))
    lines = numbers.to_csv(index=False).splitlines()
    Path("units.csv").write_text("\n".join([lines[0], "years,thousands,mg", *lines[1:], ""]))
    numbers.astype(float).mask(random.random(numbers.shape) < 0.02, -200).to_csv("sensor.csv", index=False)
    with pd.ExcelWriter("book.xlsx") as book:
        for month in ("January", "March"):
            numbers.to_excel(book, sheet_name=month, index=False)


def write_arrays() -> None:
    wave = np.sin(np.linspace(0, 6, 16) + random.uniform(0, 6, (ROWS, 1)))
    np.save("maps.npy", (wave[:, :, None] * wave[:, None, :]).astype("f4"))
    with h5py.File("spectra.h5", "w") as file:
        file["flux"] = wave + 0.1 * random.normal(size=wave.shape)
        file["err"] = np.abs(random.normal(size=wave.shape))
    np.savez("cells.npz", x=random.integers(0, 256, (ROWS, 16, 16), dtype=np.uint8), y=random.integers(0, 3, ROWS))


def png(side: int) -> bytes:
    """A blurred random picture."""
    file = io.BytesIO()
    small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    small.resize((side, side), Image.Resampling.BICUBIC).save(file, "png")
    return file.getvalue()


def write_images() -> None:
    Path("photos").mkdir()
    for i in range(60):
        (Path("photos") / f"{i}.png").write_bytes(png(80))
    for kind in ("cat", "dog"):
        (Path("pets") / kind).mkdir(parents=True)
        for i in range(40):
            (Path("pets") / kind / f"{i}.png").write_bytes(png(48))
    for number in range(3):
        with tarfile.open(f"shard-{number:03}.tar", "w") as archive:
            for i in range(20):
                data = png(64)
                member = tarfile.TarInfo(f"{i}.png")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


write_tables()
write_arrays()
write_images()
