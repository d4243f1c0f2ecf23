"""What the pictures of a report show is what they are given."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from fastmoco.evaluate.cka import Alignments, Reuse
from fastmoco.evaluate.heat_map import cka_heat_map
from fastmoco.evaluate.panels import SMALLEST
from fastmoco.evaluate.pictures import png, svg
from fastmoco.study import plots
from fastmoco.study.plots import (
    STYLES,
    Level,
    Line,
    Outputs,
    ks_curves,
    low_label_curves,
    probe_curves,
    reuse_bars,
    training_curves,
)

STAGES = ("stage1", "stage2")
LINES = [
    Line(method="moco", x=[24, 240, 2400], y=[0.7, 0.8, 0.9], low=[0.6, 0.75, 0.88], high=[0.75, 0.85, 0.92]),
    Line(method="mse", x=[24, 240, 2400], y=[0.72, None, 0.91]),
]
LEVELS = [Level(label="colours", value=0.65), Level(label="pixels", value=0.55)]


def reuse(mean: float, std: float) -> Reuse:
    return Reuse(mean=mean, std=std, draws=50, size=100, images=125)


def heat_map() -> Figure:
    values = np.array([[0.93, -0.02], [np.nan, 0.4], [0.97, 0.126]])
    found = Alignments(("stage1", "stage2", "final"), STAGES, values)
    return cka_heat_map(found, title="all", rows="MoCo", columns="MSE")


def bars() -> Figure:
    given = {"moco": {"stage1": reuse(0.9, 0.02), "stage2": reuse(0.4, 0.1)}, "mse": {"stage2": reuse(0.6, 0.05)}}
    nearer = {"barlow": {"stage1": reuse(0.97, 0.01), "stage2": reuse(0.8, 0.02)}}
    return reuse_bars({"linear": given, "RBF": nearer}, title="kept")


def distributions() -> Figure:
    rng = np.random.default_rng(0)
    few, full = rng.random((2, 30)) ** 2, rng.random((2, 40))
    return ks_curves(
        [
            Outputs(title="Mass", few=few[0], full=full[0], mean=0.3, method="barlow"),
            Outputs(title="Nodule", few=few[1], full=full[1]),
        ],
        title="outputs",
    )


def low_labels() -> Figure:
    return low_label_curves(LINES, LEVELS, title="few", score="test AUC", ticks={24: "24\n(1 %)", 240: "240"})


def probes() -> Figure:
    return probe_curves(STAGES, [Line(method="random", x=[0, 1], y=[0.6, 0.7])], LEVELS, title="p", score="AUC")


def training() -> Figure:
    panels = {
        "InfoNCE": [Line(method=m, x=[0, 1, 2], y=[3.0, 2.0, 1.0 + i]) for i, m in enumerate(("moco", "mse"))],
        "stages": [Line(method="mse", x=[0, 1, 2], y=[0.3, 0.2, 0.1])],
        "run": [Line(method="seed 0", x=[1], y=[0.5])],
    }
    return training_curves(panels, title="curves")


FIGURES = [heat_map, bars, distributions, low_labels, probes, training]


def curves(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """The named curves of a panel, by their labels."""
    named = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    return {str(n.get_label()): (list(n.get_xdata()), list(n.get_ydata())) for n in named}  # type: ignore[arg-type]


def test_a_heat_map_has_the_matrix_its_numbers_and_one_scale() -> None:
    axes = heat_map().axes[0]
    image = axes.images[0]
    drawn = np.ma.filled(image.get_array(), np.nan)
    np.testing.assert_array_equal(drawn, [[0.93, -0.02], [np.nan, 0.4], [0.97, 0.126]])
    assert image.get_clim() == (0.0, 1.0)
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "0.93", (1, 0): "-0.02", (0, 1): "n/a", (1, 1): "0.40", (0, 2): "0.97", (1, 2): "0.13"}
    assert [text.get_text() for text in axes.get_xticklabels()] == ["stage1", "stage2"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["stage1", "stage2", "final"]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("MoCo", "MSE")


def test_bars_stand_at_their_stage_with_their_heights_and_whiskers() -> None:
    figure = bars()
    axes, other = figure.axes
    moco, mse = axes.containers[1], axes.containers[3]
    assert [bar.get_height() for bar in moco] == [0.9, 0.4] and [bar.get_height() for bar in mse] == [0.6]
    # A stage is at its number, and the bars of its methods around it.
    assert [round(bar.get_x() + bar.get_width() / 2, 6) for bar in [*moco, *mse]] == [-0.2, 0.8, 1.2]
    segments = [line.get_segments() for line in axes.collections]
    assert np.allclose(segments[0][1][:, 1], [0.3, 0.5]) and np.allclose(segments[1][0][:, 1], [0.55, 0.65])
    assert to_hex(moco[0].get_facecolor()).upper() == STYLES["moco"].colour
    # A panel a kernel, and one legend for both.
    assert [axes.get_title(), other.get_title()] == ["linear", "RBF"]
    assert [bar.get_height() for bar in other.containers[1]] == [0.97, 0.8]
    assert legend(figure) == ["MoCo", "MoCo + MSE", "MoCo + Barlow"]


def test_distributions_are_drawn_and_the_greatest_gap_is_marked() -> None:
    figure = distributions()
    rng = np.random.default_rng(0)
    few, full = rng.random((2, 30)) ** 2, rng.random((2, 40))
    for axes, first, second, title in zip(figure.axes, few, full, ("Mass", "Nodule"), strict=True):
        drawn = [np.asarray(line.get_xdata())[1:] for line in axes.lines[:2]]
        np.testing.assert_allclose(drawn[0], np.sort(first))
        np.testing.assert_allclose(drawn[1], np.sort(second))
        assert np.asarray(axes.lines[0].get_ydata())[-1] == pytest.approx(1.0)
        gaps = {x: (np.mean(first <= x), np.mean(second <= x)) for x in [*first, *second]}
        at = max(gaps, key=lambda x: abs(gaps[x][0] - gaps[x][1]))
        distance = abs(gaps[at][0] - gaps[at][1])
        np.testing.assert_allclose(axes.lines[2].get_xdata(), [at, at])
        np.testing.assert_allclose(axes.lines[2].get_ydata(), sorted(gaps[at]))
        low, high = axes.get_xlim()
        assert low < min(first.min(), second.min()) and high > max(first.max(), second.max())
        assert axes.get_title() == f"{title}\nKS {distance:.2f}" + (" (mean 0.30)" if title == "Mass" else "")
    assert figure.axes[0].lines[0].get_color() == STYLES["barlow"].colour


def test_low_label_curves_hold_scores_bands_and_baselines_on_a_log_axis() -> None:
    figure = low_labels()
    axes = figure.axes[0]
    drawn = curves(axes)
    assert axes.get_xscale() == "log"
    assert drawn["MoCo"] == ([24, 240, 2400], [0.7, 0.8, 0.9])
    np.testing.assert_array_equal(drawn["MoCo + MSE"][1], [0.72, np.nan, 0.91])
    assert drawn["colours"][1] == [0.65, 0.65] and drawn["pixels"][1] == [0.55, 0.55]
    assert [line.get_linestyle() for line in axes.lines[-2:]] == ["--", "--"]
    (band,) = axes.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert {(24, 0.6), (24, 0.75), (240, 0.75), (240, 0.85), (2400, 0.88), (2400, 0.92)} <= corners
    assert [text.get_text() for text in axes.get_xticklabels()] == ["24\n(1 %)", "240"]
    assert legend(figure) == ["MoCo", "MoCo + MSE", "colours", "pixels"]


def test_low_label_curves_name_the_numbers_of_images_themselves() -> None:
    axes = low_label_curves(LINES, title="few", score="AUC").axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["24", "240", "2400"]


def test_probe_curves_go_over_the_stages() -> None:
    axes = probes().axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == list(STAGES)
    assert curves(axes)["random weights"] == ([0, 1], [0.6, 0.7])
    assert axes.get_ylabel() == "AUC"


def test_training_curves_have_a_panel_a_metric_and_one_legend() -> None:
    figure = training()
    assert [axes.get_title() for axes in figure.axes] == ["InfoNCE", "stages", "run"]
    assert curves(figure.axes[0])["MoCo + MSE"] == ([0, 1, 2], [3.0, 2.0, 2.0])
    assert curves(figure.axes[1]) == {"MoCo + MSE": ([0, 1, 2], [0.3, 0.2, 0.1])}
    # A single point has nothing to draw a line to.
    assert figure.axes[2].lines[0].get_marker() == "o" and figure.axes[0].lines[0].get_marker() in ("", "None")
    assert legend(figure) == ["MoCo", "MoCo + MSE", "seed 0"]


def test_a_method_looks_the_same_everywhere_and_like_no_other() -> None:
    looks = list(STYLES.values())
    for part in ("colour", "marker", "label"):
        assert len({getattr(look, part) for look in looks}) == len(looks)
    assert not {look.colour for look in looks} & set(plots._SPARE)
    for draw in (low_labels, training):
        lines = {str(line.get_label()): line.get_color() for line in draw().axes[0].lines}
        assert lines["MoCo"] == STYLES["moco"].colour and lines["MoCo + MSE"] == STYLES["mse"].colour


@pytest.mark.parametrize("draw", FIGURES)
def test_pictures_are_as_wide_as_a_page_and_their_text_is_legible_and_inside(draw: Callable[[], Figure]) -> None:
    figure = draw()
    figure.draw_without_rendering()
    assert figure.get_size_inches()[0] == pytest.approx(6.4)
    page = figure.bbox
    for text in texts(figure):
        assert text.get_fontsize() >= SMALLEST, text.get_text()
        box = text.get_window_extent()
        inside = box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1 and box.y0 >= page.y0 - 1 and box.y1 <= page.y1 + 1
        assert inside, text.get_text()


def texts(figure: Figure) -> list[Text]:
    """All that is written in a figure."""
    found = list(figure.texts)
    for axes in figure.axes:
        found += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        # An axis also keeps a tick beyond either end, which it does not draw.
        for place, limits, ticks in ((0, axes.get_xlim(), axes.xaxis), (1, axes.get_ylim(), axes.yaxis)):
            low, high = sorted(limits)
            found += [text for text in ticks.get_ticklabels() if low <= text.get_position()[place] <= high]
    for box in figure.legends:
        found += box.get_texts()
    return [text for text in found if text.get_text()]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("draw", FIGURES)
def test_svg_is_well_formed_stands_beside_others_asks_for_nothing_and_is_the_same_again(draw) -> None:
    text = svg(draw(), label='AUC < 1 & "more"')
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("role") == "img" and root.get("aria-label") == 'AUC < 1 & "more"' and root.get("viewBox")
    # Every reference is to something in the picture itself, and every id is referred to.
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids)) and all(f"#{name}" in text for name in ids)
    references = [value for element in root.iter() for name, value in element.items() if name.endswith("href")]
    assert all(value.startswith("data:image/png;") or (value[0] == "#" and value[1:] in ids) for value in references)
    assert not [element for element in root.iter() if element.tag.endswith(("script", "metadata"))]
    words = " ".join("".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text"))
    assert draw().get_suptitle() in words
    assert svg(draw(), label='AUC < 1 & "more"') == text


def test_png_is_the_same_again() -> None:
    first = png(low_labels())
    assert first.startswith(b"\x89PNG") and png(low_labels()) == first
