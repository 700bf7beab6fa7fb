"""What a table's columns are taken for: types by their values and by the user, gaps, constants, identifiers."""

import datetime
import math

import numpy as np
import pandas as pd
import pytest
import torch

from flowtrain import data
from flowtrain.data.tables import times
from flowtrain.data.tables.columns import Columns
from flowtrain.errors import UsageError

N = 60


def table(tmp_path, frame, **keys):
    """A :class:`Table` of ``frame``, written as a csv."""
    frame.to_csv(tmp_path / "t.csv", index=False)
    return data.Table(path=str(tmp_path / "t.csv"), **keys)


def columns_of(tmp_path, values, **keys) -> Columns:
    """The columns of a table that has ``values`` beside a column x of real numbers."""
    frame = pd.DataFrame({"value": values, "x": np.linspace(0.5, 1, len(values))})
    return table(tmp_path, frame, **keys).split("train").columns


random = np.random.default_rng(0)
DAYS = pd.date_range("2024-02-25", periods=N)
TYPES = {
    "real": (random.normal(size=N), "real"),
    "integer": (random.integers(0, 9, N), "integer"),
    "whole floats": (random.integers(0, 9, N).astype(float), "integer"),
    "text": (random.choice(["red", "green"], N), "categorical"),
    "boolean": (random.random(N) < 0.5, "categorical"),
    "leading zeros": ([f"{code:05}" for code in random.integers(0, 30, N)], "categorical"),
    "days": (DAYS.strftime("%Y-%m-%d"), "time"),
    "hours": ((DAYS + pd.to_timedelta(7, "h")).strftime("%Y-%m-%dT%H:%M:%SZ"), "time"),
    "fractions of seconds": ((DAYS + pd.to_timedelta(random.random(N), "s")).strftime("%Y-%m-%d %H:%M:%S.%f"), "time"),
    "days first": (DAYS.strftime("%d.%m.%Y"), "time"),
    "months first": (DAYS.strftime("%m/%d/%Y"), "time"),
    "names of months": (DAYS.strftime("%d %b %Y"), "time"),
    "half days": (DAYS.strftime("%m/%d/%Y 07:30 PM"), "time"),
    "time of day with points": ((DAYS + pd.to_timedelta(random.integers(0, 24, N), "h")).strftime("%H.00.00"), "time"),
    "time of day": ((DAYS + pd.to_timedelta(random.integers(0, 1440, N), "min")).strftime("%H:%M"), "time"),
}


@pytest.mark.parametrize("name", TYPES)
def test_the_type_of_a_column_is_found_and_its_values_come_back(tmp_path, name):
    values, kind = TYPES[name]
    columns = columns_of(tmp_path, values)
    assert columns.modelled[0].kind == kind
    frame = pd.read_csv(tmp_path / "t.csv", dtype={"value": str} if name == "leading zeros" else None)
    x, _ = columns.encode({key: frame[key].to_numpy() for key in frame})
    assert x.isfinite().all()
    decoded = columns.decode(x)["value"]
    if kind == "real":
        np.testing.assert_allclose(decoded, values, rtol=1e-6)
    elif name == "fractions of seconds":
        got, want = (times.to_seconds(texts, "%Y-%m-%d") for texts in (decoded, list(values)))
        np.testing.assert_allclose(got, want, atol=1)  # float32 over two months
    else:
        expected = [str(value).lower() if name == "boolean" else value for value in values]
        assert [str(value) for value in decoded] == [str(type(got)(want)) for got, want in zip(decoded, expected)]


def test_times_are_seconds_inside_the_density(tmp_path):
    column = columns_of(tmp_path, TYPES["days"][0]).modelled[0]
    assert (column.unit, column.width, column.written) == (86400, 86400, "%Y-%m-%d")
    assert column.offset == datetime.datetime(2024, 2, 25, tzinfo=datetime.UTC).timestamp()
    assert column.std == pytest.approx(N * 86400 / math.sqrt(12), rel=0.1)


def test_days_before_months_are_said(tmp_path, caplog):
    early = pd.date_range("2024-02-01", periods=12).strftime("%d/%m/%Y")
    early = np.concatenate([early] * 3)
    columns_of(tmp_path, early)
    assert "times read as %m/%d/%Y" in caplog.text and "dataset.types={value: '%d/%m/%Y'}" in caplog.text
    columns = columns_of(tmp_path, early, types={"value": "%d/%m/%Y"})
    assert columns.modelled[0].unit == 86400
    span = columns.decode(torch.tensor([[11 * 86400.0, 0.5]]))["value"]
    assert list(span) == ["12/02/2024"]


DECLARED = {
    "category of numbers": ([1, 2, 3] * 20, "category", "categorical"),
    "real of whole numbers": ([1, 2, 3] * 20, "real", "real"),
    "integer that differs everywhere": (np.arange(N), "integer", "integer"),
    "seconds": (1.7e9 + np.arange(N) * 60, "time", "time"),
    "degrees": (random.uniform(0, 360, N), "angle", "angle"),
    "bounds": (random.random(N), [0, 1], "real"),
    "a lower bound": (random.random(N), [0, None], "real"),
}


@pytest.mark.parametrize("name", DECLARED)
def test_the_user_can_say_the_type(tmp_path, name):
    values, said, kind = DECLARED[name]
    column = columns_of(tmp_path, values, types={"value": said}).modelled[0]
    assert (column.name, column.kind) == ("value", kind)
    if isinstance(said, list):
        assert (column.low, column.high) == tuple(said)


@pytest.mark.parametrize(
    ("values", "said", "ends"),
    [
        ([0.1, 6.2], "angle", (0, 2 * math.pi)),
        ([-3.1, 3.1], "angle", (-math.pi, math.pi)),
        ([10, 350], "angle", (0, 360)),
        ([-170, 170], "angle", (-180, 180)),
        ([1, 2], "degrees", (0, 360)),
    ],
)
def test_the_circle_of_an_angle(tmp_path, values, said, ends):
    columns = columns_of(tmp_path, random.uniform(*values, N), types={"value": said})
    column = columns.modelled[0]
    assert (column.low, column.high) == pytest.approx(ends)
    period = ends[1] - ends[0]
    here = np.array([values[0], values[1]], dtype=float)
    x, _ = columns.encode({"value": np.concatenate([here, here + period, here - 3 * period]), "x": np.full(6, 0.5)})
    torch.testing.assert_close(x[:2, 0], x[2:4, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(x[:2, 0], x[4:, 0], rtol=0, atol=1e-4)


IDENTIFIERS = {
    "counted": np.arange(N) + 1,
    "shuffled": np.random.default_rng(1).permutation(N) + 7000,
    "text": [f"user{i}" for i in range(N)],
}


@pytest.mark.parametrize("name", IDENTIFIERS)
def test_an_identifier_is_dropped_and_said_unless_named(tmp_path, name, caplog):
    caplog.set_level("INFO", "flowtrain")
    assert columns_of(tmp_path, IDENTIFIERS[name]).names == ["x"]
    assert "column 'value' is left out" in caplog.text and "as an identifier does" in caplog.text
    for keys in ({"columns": ["value", "x"]}, {"types": {"value": "category"}}):
        assert columns_of(tmp_path, IDENTIFIERS[name], **keys).names == ["value", "x"]


def test_few_different_whole_numbers_are_no_identifier(tmp_path):
    assert columns_of(tmp_path, [3, 17, 4, 9, 30, 8, 2, 1, 77, 5]).names == ["value", "x"]


@pytest.mark.parametrize("value", [3, 2.5, "same", "2024-05-01", True])
def test_a_constant_is_dropped_said_and_restored_in_its_place(tmp_path, value, caplog):
    caplog.set_level("INFO", "flowtrain")
    frame = pd.DataFrame({"x": random.normal(size=N), "k": [value] * N, "y": random.normal(size=N), "none": [None] * N})
    columns = table(tmp_path, frame).split("train").columns
    assert columns.names == ["x", "y"]
    assert (
        "column 'k' is left out: it is" in caplog.text and "column 'none' is left out: it has no values" in caplog.text
    )
    columns = Columns.from_record(columns.to_record())
    decoded = columns.decode(torch.zeros(2, 2))
    assert list(decoded) == ["x", "k", "y", "none"]
    assert list(decoded["k"]) == [str(value).lower() if value is True else value] * 2
    assert list(decoded["none"]) == [None, None]


def test_numbers_that_float64_does_not_tell_apart_are_no_proven_constant(tmp_path, caplog):
    caplog.set_level("INFO", "flowtrain")
    columns_of(tmp_path, [2**60 + i % 3 for i in range(N)])
    assert "it is 1.15292e+18 in every row, as far as float64 tells such numbers apart" in caplog.text


def test_one_value_and_gaps_are_no_constant(tmp_path):
    frame = pd.DataFrame({"x": random.normal(size=N), "flag": ["yes", None] * (N // 2)})
    with pytest.raises(UsageError, match=rf"values are missing in 'flag' {N // 2} \(first in row 2\)"):
        table(tmp_path, frame).split("train")
    kept = table(tmp_path, frame, missing="drop")
    assert sum(len(kept.split(part)) for part in ("train", "val", "test")) == N // 2
    assert kept.split("train").columns.names == ["x"]
    assert table(tmp_path, frame, missing="model").split("train").columns.names == ["x", "flag"]


@pytest.fixture
def gaps():
    """A frame with gaps in real numbers, integers, texts and times."""
    frame = pd.DataFrame(
        {
            "x": random.normal(size=N),
            "n": random.integers(0, 9, N).astype(float),
            "colour": random.choice(["red", "green"], N),
            "day": DAYS.strftime("%Y-%m-%d"),
            "whole": random.integers(0, 9, N),
        }
    ).astype({"colour": object, "day": object})
    for column, step in (("x", 3), ("n", 4), ("colour", 5), ("day", 7)):
        frame.loc[frame.index % step == 1, column] = None
    return frame


def test_missing_values_are_refused_with_their_counts(tmp_path, gaps):
    with pytest.raises(UsageError) as error:
        table(tmp_path, gaps).split("train")
    for part in ("'x' 20 (first in row 2)", "'n' 15", "'colour' 12", "'day' 9", "missing=drop", "missing=model"):
        assert part in str(error.value)
    assert "whole" not in str(error.value) and "\n" not in str(error.value)


def test_rows_with_missing_values_are_dropped_and_said(tmp_path, gaps, caplog):
    caplog.set_level("INFO", "flowtrain")
    dataset = table(tmp_path, gaps, missing="drop")
    rows = sum(len(dataset.split(part)) for part in ("train", "val", "test"))
    assert rows == len(gaps.dropna())
    assert f"{N - rows} of {N} rows miss a value and are left out" in caplog.text
    assert dataset.split("train").data.isfinite().all()


def test_missing_values_are_modelled_with_indicators(tmp_path, gaps):
    split = (dataset := table(tmp_path, gaps, missing="model")).split("train")
    columns = split.columns
    assert [column.kind for column in columns.encoded] == ["real", "integer", "categorical", "time", "integer"] + [
        "indicator"
    ] * 4
    assert dataset.spec.shape == (9,) and split.data.shape[1] == 9
    assert torch.equal(split.data[:, :4].isnan(), split.data[:, 5:] == 1)
    whole, _ = columns.encode({name: gaps[name].to_numpy(object) for name in gaps})
    decoded = pd.DataFrame(columns.decode(whole))
    pd.testing.assert_frame_equal(decoded.isna(), gaps.isna())
    assert list(decoded["colour"].dropna()) == list(gaps["colour"].dropna())
    assert list(decoded["day"].dropna()) == list(gaps["day"].dropna())
    assert list(decoded["n"].dropna()) == list(gaps["n"].dropna())
    assert not columns.all_integer


def test_gaps_in_a_context_are_zeros_with_an_indicator(tmp_path, gaps):
    split = table(tmp_path, gaps, missing="model", context=["n", "colour"]).split("train")
    assert split.columns.context_shape == (2 + 3,) == tuple(split.context.shape[1:])
    number, number_gap, *colour, colour_gap = split.context.unbind(1)
    assert set(number_gap.tolist()) == set(colour_gap.tolist()) == {0.0, 1.0}
    assert number[number_gap == 1].eq(0).all() and torch.stack(colour).sum(0).eq(1 - colour_gap).all()


def test_an_angle_in_a_context_is_its_cosine_and_sine(tmp_path):
    frame = pd.DataFrame({"x": random.normal(size=N), "phi": random.uniform(0, 360, N)})
    columns = table(tmp_path, frame, context=["phi"], types={"phi": "angle"}).split("train").columns
    context = columns.encode_context({"phi": [0.0, 90.0, 360.0, 450.0]})
    torch.testing.assert_close(context, torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]]), atol=1e-6, rtol=0)


REFUSED = [
    ({"value": [1.5, 2] * 30}, {"types": {"value": "integer"}}, "column 'value', row 1: not a whole number"),
    ({"value": ["a", "b"] * 30}, {"types": {"value": "real"}}, "'a' is not a number"),
    (
        {"value": ["2024-01-01", "soon"] * 30},
        {"types": {"value": "%Y-%m-%d"}},
        "row 2: 'soon' is no time in the format",
    ),
    ({"value": ["soon"] * 60}, {"types": {"value": "time"}}, "row 1: 'soon' is no time in a known format"),
    ({"value": [0.5, 1.5] * 30}, {"types": {"value": [0, 1]}}, "row 2: 1.5 is above its bound 1"),
    ({"value": [1.0] * 60}, {}, "no column is left to model: it is 1 in every row"),
    ({"value": [1.5, 2] * 30}, {"types": {"value": "float"}}, "'value: float' must be one of real, number, integer"),
    ({"value": [1.5, 2] * 30}, {"types": {"value": [1, 0]}}, "a range such as [0,1]"),
    ({"value": [1.5, 2] * 30}, {"types": {"vaule": "real"}}, "dataset.types: "),
    ({"value": [1.5, 2] * 30}, {"missing": "ignore"}, "dataset.missing=ignore: must be refuse, drop or model"),
    ({"value": [1.5, float("inf")] * 30}, {}, "column 'value', row 2: inf is not finite"),
    (
        {"value": [1.5, None, 2.5, None] * 15, "y": [None, 1.5, None, 2.5] * 15},
        {"missing": "drop"},
        "no rows without a missing value",
    ),
]


@pytest.mark.parametrize(("values", "keys", "line"), REFUSED)
def test_columns_that_are_refused(tmp_path, values, keys, line):
    with pytest.raises(UsageError) as error:
        table(tmp_path, pd.DataFrame(values), **keys).split("train")
    assert line in str(error.value) and "\n" not in str(error.value)


def test_another_file_may_have_its_columns_in_another_order_and_more(tmp_path):
    frame = pd.DataFrame({name: values for name, (values, _) in TYPES.items()})
    columns = table(tmp_path, frame).split("train").columns
    other = frame[list(frame)[::-1]].assign(more=1).iloc[:20]
    other.to_csv(tmp_path / "other.csv", index=False)
    dataset = data.Table(path=str(tmp_path / "other.csv"))
    dataset.use_columns(columns)
    assert dataset.split("train").data.shape[1] == len(TYPES)


def test_an_unseen_category_and_a_missing_column_are_one_line(tmp_path):
    frame = pd.DataFrame({"colour": ["red", "green"] * 30, "x": random.normal(size=N)})
    columns = table(tmp_path, frame).split("train").columns
    for change, line in (
        (frame.assign(colour="blue"), "column 'colour', row 1: 'blue' is not one of green, red"),
        (frame.drop(columns="x"), "no column 'x'"),
    ):
        change.to_csv(tmp_path / "other.csv", index=False)
        dataset = data.Table(path=str(tmp_path / "other.csv"))
        dataset.use_columns(columns)
        with pytest.raises(UsageError, match=line):
            dataset.split("test")
