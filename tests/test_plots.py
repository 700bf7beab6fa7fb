"""Images: that what they show is where it should be and as bright as it should be, and that labels can be read."""

import math
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch

from flowtrain.errors import UsageError
from flowtrain.plots import density as plane
from flowtrain.plots import pairs as table
from flowtrain.plots.colours import GREY, VIRIDIS, shade
from flowtrain.plots.pairs import plot_pairs

FIRST, LAST = ([*bytes.fromhex(VIRIDIS.split()[i])] for i in (0, -1))


def normal(points, mean=(0.0, 0.0), scale=1.0):
    z = (points - torch.tensor(mean)) / scale
    return -0.5 * z.square().sum(1) - math.log(2 * math.pi * scale**2)


def cells_of(panel, cells):
    """Mean colour of each of cells × cells blocks."""
    return torch.nn.functional.avg_pool2d(panel.double(), panel.shape[-1] // cells)


# ---- colours -------------------------------------------------------------------------------------------------------


def test_colours_are_those_of_viridis():
    matplotlib = pytest.importorskip("matplotlib")
    at = torch.linspace(0, 1, 256)
    expected = matplotlib.colormaps["viridis"](at.numpy())[:, :3].T * 255
    assert (shade(at).double() - torch.tensor(expected)).abs().max() < 6
    luminance = torch.tensor([0.3, 0.6, 0.1], dtype=torch.float64) @ shade(at).double()
    assert (luminance[4:] > luminance[:-4]).all()


def test_colours_of_what_lies_outside():
    values = torch.tensor([[-math.inf, -1.0, 0.0], [1.0, 7.0, math.inf]])
    image = shade(values)
    assert image.shape == (3, 2, 3) and image.dtype == torch.uint8
    assert (image[:, 0].T == torch.tensor(FIRST)).all()
    assert (image[:, 1].T == torch.tensor(LAST)).all()
    assert shade(torch.tensor([math.nan]))[:, 0].tolist() == list(GREY)


# ---- the plane -----------------------------------------------------------------------------------------------------


def test_the_data_and_their_true_density_look_alike():
    spread = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(2**18)  # less uneven than random points
    data = torch.special.ndtri(spread.double())
    image = plane.density_image(normal, data)
    assert image.shape == (3, 400, 806) and image.dtype == torch.uint8
    assert (image[:, :, 400:406] == 255).all()
    left, right = cells_of(image[:, :, :400], 25), cells_of(image[:, :, 406:], 25)
    wrong = plane.density_image(lambda points: normal(points) - math.log(1.3), data)[:, :, 406:]
    assert (left - right).abs().max() < 4
    assert (left - cells_of(wrong, 25)).abs().max() > 40  # one that does not integrate to one is seen


def test_up_is_up_and_right_is_right():
    corner = (3.0, 1.0)
    data = torch.randn(20_000, 2) * 0.2 + torch.tensor(corner)
    data = torch.cat((data, torch.tensor([[0.0, 0.0], [4.0, 4.0]]).repeat(200, 1)))
    view = plane.choose_view(data)
    for panel in (plane.data_panel(data, view), plane.model_panel(lambda p: normal(p, corner, 0.2), view)):
        row, column = divmod(cells_of(panel, 40)[1].argmax().item(), 40)  # the greenest
        x = view.low[0] + (column + 0.5) / 40 * (view.high[0] - view.low[0])
        y = view.high[1] - (row + 0.5) / 40 * (view.high[1] - view.low[1])
        assert abs(x - 3) < 0.4 and abs(y - 1) < 0.4


def test_the_view():
    data = torch.randn(10_000, 2)
    view = plane.choose_view(torch.cat((data, torch.tensor([[1e6, -1e6], [math.nan, 0.0]]))))
    assert all(-6 < low < -2.5 and 2.5 < high < 6 for low, high in zip(view.low, view.high))
    assert view.top == pytest.approx(1 / (2 * math.pi), rel=0.25)
    wide = plane.choose_view(data * torch.tensor([2.0, 1.0]))  # units alike
    assert wide.high[0] - wide.low[0] == pytest.approx(wide.high[1] - wide.low[1])
    unlike = plane.choose_view(data * torch.tensor([1000.0, 1.0]))
    assert unlike.high[0] - unlike.low[0] > 300 * (unlike.high[1] - unlike.low[1])
    flat = plane.choose_view(data * torch.tensor([1.0, 0.0]))
    assert flat.low[1] < 0 < flat.high[1] and math.isfinite(flat.top)


@pytest.mark.parametrize("n", [1, 30, 1000, 1_000_000])
def test_the_colours_end_near_the_data_s_greatest_density(n):
    view = plane.choose_view(torch.randn(n, 2))
    assert view.top > 0 and math.isfinite(view.top)
    if n >= 1000:
        assert view.top == pytest.approx(1 / (2 * math.pi), rel=0.3)


def test_densities_are_evaluated_in_batches_without_gradients():
    seen = []
    weight = torch.ones((), requires_grad=True)

    def log_prob(points):
        seen.append(points)
        return normal(points) * weight

    view = plane.View((-1.0, -2.0), (1.0, 2.0), 0.2)
    panel = plane.model_panel(log_prob, view, side=30, batch=128)
    assert [len(points) for points in seen] == [128] * 7 + [4]
    points = torch.cat(seen)
    assert points.dtype == torch.float32
    assert points.abs().max(0).values.tolist() == pytest.approx([1 - 1 / 30, 2 - 2 / 30])
    assert torch.equal(panel, plane.model_panel(normal, view, side=30))


def test_coarse_cells_are_whole_pixels():
    view = plane.View((-3.0, -3.0), (3.0, 3.0), 0.16)
    coarse, fine = plane.model_panel(normal, view, 120, cells=40), plane.model_panel(normal, view, 40)
    assert torch.equal(coarse[:, 1::3, 1::3], fine)
    assert torch.equal(coarse, fine.repeat_interleave(3, 1).repeat_interleave(3, 2))
    with pytest.raises(ValueError, match="cells=50 must divide side=120"):
        plane.model_panel(normal, view, 120, cells=50)


def test_no_number_is_grey_and_no_density_is_dark():
    def log_prob(points):
        left, right = torch.full((len(points),), math.nan), torch.full((len(points),), -math.inf)
        return torch.where(points[:, 0] < 0, left, right)

    panel = plane.model_panel(log_prob, plane.View((-1.0, -1.0), (1.0, 1.0), 1.0), side=10)
    assert (panel[:, :, :5].flatten(1).T == torch.tensor(GREY)).all()
    assert (panel[:, :, 5:].flatten(1).T == torch.tensor(FIRST)).all()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (torch.zeros(5, 3), r"shape \[5, 3\]: a density plot needs points"),
        (torch.zeros(5), "a density plot needs points"),
        (torch.full((5, 2), math.nan), "without a finite point"),
    ],
)
def test_what_is_no_density_is_refused(data, says):
    with pytest.raises(ValueError, match=says):
        plane.density_image(normal, data)


# ---- the line ------------------------------------------------------------------------------------------------------


def rows_of(image, colour):
    """The first row from above that has about this colour in each column, or the image's height."""
    close = (image.int() - torch.tensor(colour)[:, None, None]).abs().sum(0) < 60
    return torch.where(close.any(0), close.int().argmax(0), image.shape[1])


def test_the_curve_of_the_true_density_follows_the_bars():
    data = torch.randn(200_000, 1)
    image = plane.density_image(lambda x: normal(torch.cat((x, 0 * x), 1)) + 0.5 * math.log(2 * math.pi), data)
    assert image.shape == (3, 400, 806) and image.dtype == torch.uint8
    bars, curve = rows_of(image, plane.PALE)[100:-100], rows_of(image, plane.STRONG)[100:-100]
    assert curve.min() < 60 and curve.max() > 250
    bars, curve = bars[bars < 400], curve[bars < 400]  # bars stand a pixel apart
    assert len(bars) > 400 and (bars - curve).abs().float().quantile(0.95) < 15
    half = plane.density_image(lambda x: normal(torch.cat((x, 0 * x), 1)) + 0.5 * math.log(math.pi / 2), data)
    assert rows_of(half, plane.STRONG)[403] - curve.min() > 100


def test_the_curve_has_a_gap_where_it_is_no_number():
    def log_prob(x):
        return torch.where(x[:, 0].abs() < 1, math.nan, -1.0)

    curve = rows_of(plane.density_image(log_prob, torch.randn(1000, 1), side=200), plane.STRONG)
    assert (curve[190:215] == 200).all() and (curve[1:60] < 200).all() and (curve[-60:-1] < 200).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e7])
def test_ticks_are_few_and_round(scale):
    ticks = plane._ticks(-1.3 * scale, 2.9 * scale)
    assert 3 <= len(ticks) <= 8
    assert all(-1.3 * scale < tick < 2.9 * scale and len(f"{tick:g}") <= 6 for tick in ticks)


# ---- sheets --------------------------------------------------------------------------------------------------------


def test_a_sheet_holds_each_panel_in_its_place():
    panels = [[torch.full((3, 60, 60), 10 * (3 * j + i) + 5, dtype=torch.uint8) for i in range(3)] for j in range(2)]
    panels[1][0] = None
    sheet = plane.sheet(panels, ["data", "neural spline"], ["moons", "rings", "spirals"])
    height, width = sheet.shape[1:]
    for j, i in [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)]:
        value = 10 * (3 * j + i) + 5
        found = (sheet == value).all(0).nonzero()
        assert len(found) >= 3600
        top, left = found.median(0).values.tolist()
        assert top == pytest.approx(height - (2 - j) * 66 + 30, abs=3)
        assert left == pytest.approx(width - (3 - i) * 66 + 30, abs=3)
    assert (sheet[:, -66:-6, -198:-138] == 255).all()
    assert (sheet[:, : height - 140, width - 190 :] < 128).any()  # names above
    assert (sheet[:, height - 132 :, : width - 200] < 128).any()  # and beside
    with pytest.raises(ValueError, match="2 × 2"):
        plane.sheet(panels, ["a", "b"], ["c", "d"])


# ---- pairs of a table's columns ------------------------------------------------------------------------------------


def rows(n, columns, seed=0):
    """Numbers of very different sizes, some whole."""
    x = np.random.default_rng(seed).normal(size=(n, columns))
    x *= np.array([1, 1e6, 1e-4, 1, 300, 1, 1, 0.02] * 3)[:columns]
    x[:, 3::8], x[:, 4::8] = np.clip(np.round(x[:, 3::8]), -1, 1), np.round(x[:, 4::8])
    return x


@pytest.fixture
def drawn(monkeypatch):
    """The figures instead of files."""
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(table, "_save", lambda figure, path: figures.append(figure))
    return figures


@pytest.mark.parametrize("columns", [1, 2, 5, 9])
def test_labels_do_not_overlap(drawn, columns):
    names = ["a_rather_long_name_of_a_column", *(f"column_{i}_of_a_table" for i in range(1, columns))]
    title = "outputs/table-nsf_autoregressive/2026-01-01_12-00-00, temperature 0.7"
    assert plot_pairs("x.png", rows(2500, columns), rows(500, columns, 1), names, title) == max(0, columns - 8)
    (figure,) = drawn
    assert len(figure.axes) == min(columns, 8) ** 2
    figure.draw_without_rendering()
    axes = figure.axes
    texts = [figure._suptitle, *figure.legends, *([figure._supxlabel] if columns > 8 else [])]
    for axis in (axis for plot in axes for axis in (plot.xaxis, plot.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        texts += [axis.label, *(tick.label1 for tick in ticks if tick.label1.get_visible())]
    texts = [text for text in texts if not hasattr(text, "get_text") or text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) > 2 + columns
    for i, j in combinations(range(len(boxes)), 2):
        assert not boxes[i].overlaps(boxes[j]), (texts[i], texts[j])
    for text, box in zip(texts, boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
        assert not any(box.overlaps(plot.bbox) for plot in axes), text


def test_data_are_below_and_samples_above(drawn):
    from matplotlib.colors import to_rgb

    x, y = rows(300, 3), rows(200, 3, 1)
    plot_pairs("x.png", x, y, "abc")
    (figure,) = drawn
    grid = np.array(figure.axes).reshape(3, 3)
    for row in range(3):
        for column in range(3):
            points = grid[row, column].collections
            if row == column:
                assert not points
                continue
            expected, colour = (y, table.DATA) if column < row else (x, table.SAMPLES)
            np.testing.assert_allclose(points[0].get_offsets(), expected[:, [column, row]])
            np.testing.assert_allclose(points[0].get_facecolor()[0, :3], to_rgb(colour))
    assert [plot.get_xlabel() for plot in grid[2]] == ["a", "b", "c"] == [plot.get_ylabel() for plot in grid[:, 0]]


def test_without_data_the_upper_half_is_empty(drawn):
    plot_pairs("x.png", rows(300, 3))
    grid = np.array(drawn[0].axes).reshape(3, 3)
    for row in range(3):
        for column in range(3):
            assert grid[row, column].axison == (column <= row)
            assert len(grid[row, column].collections) == (column < row)
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["samples"]


def test_histograms_hold_the_shares_of_all_rows(drawn):
    data = np.random.default_rng(0).normal(size=(5000, 1))
    samples = np.concatenate((data, data + 1e3))  # half of them nowhere near
    plot_pairs("x.png", samples, data)
    shares = [patch.get_data().values.sum() for patch in drawn[0].axes[0].patches[::2]]
    assert shares == pytest.approx([1, 0.5], abs=0.01)


def test_whole_numbers_have_bins_of_their_own():
    few, many = np.array([0.0, 3.0, 1.0, 1.0]), np.round(np.random.default_rng(0).normal(size=5000) * 300)
    axis = table.Axis.from_columns("few", [few])
    assert axis.edges.tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5] and axis.words == ["0", "1", "2", "3"]
    axis = table.Axis.from_columns("many", [many])
    width = np.diff(axis.edges)
    assert 12 <= len(width) <= 60 and (width == width[0]).all() and width[0] == round(width[0])
    assert (axis.edges % 1 == 0.5).all() and ((many > axis.edges[0]) & (many < axis.edges[-1])).mean() > 0.99
    assert not table.Axis.from_columns("samples are not whole", [few, few + 0.1]).discrete


@pytest.mark.parametrize(("at", "width"), [(0, 1e-15), (0, 3e9), (1_700_000_000, 200), (-5e-4, 1e-8), (2000, 30)])
def test_numbers_along_an_axis_differ(drawn, at, width):
    plot_pairs("x.png", at + width * np.random.default_rng(0).random((200, 2)))
    (figure,) = drawn
    figure.draw_without_rendering()
    plot = figure.axes[2]
    for axis in (plot.xaxis, plot.yaxis):
        low, high = axis.get_view_interval()
        shown = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        words = [tick.label1.get_text() for tick in shown]
        assert len(words) >= 2 and len(set(words)) == len(words) and max(map(len, words)) <= 15
        for tick, word in zip(shown, words):
            assert float(word) == pytest.approx(tick.get_loc(), abs=width / 1000)


def test_strings_are_categories(drawn):
    kinds = np.array(["red", "blue", "a colour with a name"], object)
    x, y = rows(400, 2).astype(object), rows(300, 2, 1).astype(object)
    x[:, 1], y[:, 1] = kinds[np.arange(400) % 3], kinds[np.arange(300) % 2]
    plot_pairs("x.png", x, y, ["size", "colour"])
    plot = drawn[0].axes[3]
    words = [label.get_text() for label in plot.get_xticklabels()]
    assert sorted(words) == ["a colour wi…", "blue", "red"]
    data, samples = (dict(zip(words, patch.get_data().values)) for patch in plot.patches[::2])
    assert data == pytest.approx({"red": 0.5, "blue": 0.5, "a colour wi…": 0})
    assert samples == pytest.approx(dict.fromkeys(words, 1 / 3), abs=0.01)
    axis = table.Axis.from_columns("many", [np.array([f"kind {i % 40 * (i % 3 == 0)}" for i in range(3000)])])
    assert len(axis.words) == table.MOST_CATEGORIES and axis.words[0] == "kind 0" and axis.words[-1] == "(others)"
    assert np.histogram(axis.values[0], axis.edges)[0].sum() == 3000


def test_columns_beyond_the_first_are_counted(drawn):
    assert plot_pairs("x.png", rows(100, 5), torch.tensor(rows(100, 5)), most=3) == 2
    assert len(drawn[0].axes) == 9 and drawn[0]._supxlabel.get_text() == "the first 3 of 5 columns"
    assert plot_pairs("x.png", rows(100, 2)) == 0 and drawn[1]._supxlabel is None


def test_the_file_is_whole_and_nothing_else_is_touched(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    from PIL import Image

    before = dict(matplotlib.rcParams)
    plot_pairs(tmp_path / "new" / "pairs.png", rows(50, 2), rows(50, 2))
    assert dict(matplotlib.rcParams) == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pairs.png"]
    image = np.asarray(Image.open(tmp_path / "new" / "pairs.png").convert("RGB"))
    assert min(image.shape[:2]) > 500 and len(np.unique(image.reshape(-1, 3), axis=0)) > 20
    code = (
        f"import sys; from flowtrain.plots.pairs import plot_pairs; "
        f"plot_pairs({str(tmp_path / 'a.svg')!r}, [[1.5], [3]]); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install 'flowtrain\[plots\]'"):
        plot_pairs("x.png", rows(10, 2))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((np.zeros((0, 2)),), r"shape \[0, 2\] has no rows"),
        ((np.zeros(3),), r"shape \[3\] has no rows"),
        ((rows(5, 2), rows(5, 3)), "data of 3 columns, names of 2"),
        ((rows(5, 2), None, ["a"]), "samples of 2 columns, names of 1"),
        ((np.full((5, 1), np.nan), None, ["a"]), "column a holds no finite number"),
    ],
)
def test_tables_that_cannot_be_drawn_are_refused(arguments, says):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=says):
        plot_pairs("x.png", *arguments)
