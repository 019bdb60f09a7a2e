"""Figures show what the run recorded, as pictures that a notebook displays."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_descriptions import RUN

from pipetutor.costs.table import LayerCost, LayerCosts
from pipetutor.figures import plots, plots_plan
from pipetutor.figures.picture import Picture, explore


@pytest.fixture
def run():
    return RUN


def test_losses(run):
    figure = plots.losses({"one": run, "other": run}, chance=2.3)
    axes = figure.axes[0]
    assert [list(line.get_ydata()) for line in axes.lines[:2]] == [run.losses] * 2
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_stages(run):
    axes = plots.stages(run).axes[0]
    words = [text.get_text() for text in axes.texts]
    assert words == ["stage 0\n40.2 M", "stage 1\n16.8 M"]
    assert len(axes.patches) == 22 + 2 and axes.get_xticklabels()[16].get_text() == "Linear 16"


def test_stages_of_which_a_rank_holds_several(run):
    """All of them, in their ranks' colours, and none is written over the highest bar."""
    figure = plots.stages(replace(run, bounds=[0, 8, 16, 19, 22]))
    axes = figure.axes[0]
    words = [text.get_text().splitlines() for text in axes.texts]
    assert words == [
        ["stage 0", "rank 0", "1.0 M"],
        ["stage 1", "rank 1", "1.5 M"],
        ["stage 2", "rank 0", "37.8 M"],
        ["stage 3", "rank 1", "16.8 M"],
    ]
    colours = [text.get_color() for text in axes.texts]
    assert colours[0] == colours[2] != colours[1] == colours[3]
    assert len(axes.patches) == 22 + 4
    assert "stage 3 on rank 1 holds layers 19 to 21, 16.8 million" in figure.description
    figure._repr_png_()  # draws it: only then a text has a place
    lowest = min(text.get_window_extent().y0 for text in axes.texts)
    assert lowest > max(patch.get_window_extent().y1 for patch in axes.patches if patch.get_height() > 1.1)


def test_passes_cross_out_what_fills_no_micro_batch():
    figure = plots.passes([[[3, 1, 4], [0, 2, 5]], [[5, 0, 1], [4, 3, 2]]], micro_batch=2)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["pass 0", "pass 1"]
    first = figure.axes[0]
    assert [text.get_text() for text in first.texts] == ["3", "1", "4", "0", "2", "5"]
    cells = [patch for patch in first.patches if patch.get_fill()]
    assert [bool(cell.get_hatch()) for cell in cells] == [False, False, True] * 2
    assert figure.description.endswith("so many fill no micro-batch: 1.")


def test_layers_says_what_each_part_of_the_model_has():
    layer = LayerCost("Linear", 0.001, 0.001, 0.001, 0.0, 3_000_000, 1_000_000, (), False)
    small = replace(layer, kind="Conv2d", parameters=1_000_000, output_bytes=9_000_000)
    costs = LayerCosts("alexnet", 8, 1, 1, (small, layer), 0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, Path("here"))
    figure = plots.layers(costs, border=1)
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [
        ["25%", "75%"],
        ["90%", "10%"],
        ["50%", "50%"],
    ]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["Conv2d  0", "Linear  1"]


def test_sample_images():
    figure = plots.sample_images([(np.zeros((32, 32, 3), dtype=np.uint8), "disc")] * 11)
    assert [a.get_title() for a in figure.axes].count("disc") == 11


def test_rate_leaves_the_first_step_out(run):
    assert run.samples_per_second == 16


def test_a_control_draws_the_picture_anew(monkeypatch):
    """Without an Output widget, of which nbclient may wait for ever for an answer."""
    monkeypatch.setattr("ipywidgets.Output.__init__", lambda *_, **__: pytest.fail("an Output widget"))
    drawn = []

    def draw(name="b", size=3):
        drawn.append((name, size))
        figure = Picture(figsize=(size, 1))
        figure.description = f"{name}, {size}"
        return figure

    box = explore(draw, name=["a", "b"], size=(1, 5))
    choice, slider, shown = box.children
    before = shown.value
    slider.value = 5
    choice.value = "a"
    assert drawn == [("b", 3), ("b", 5), ("a", 5)]
    assert shown.value != before and ' alt="a, 5" src="data:image/png;base64,iVBO' in shown.value
    assert [(control.description, control.value) for control in (choice, slider)] == [("name", "a"), ("size", 5)]


def test_the_shortest_step_that_was_predicted_is_marked():
    steps = {"2": {"compute": 2.0}, "4": {"compute": 1.0}}
    figure = plots_plan.step_parts(steps, predicted=2)
    (mark,) = [patch for patch in figure.axes[0].patches if patch.get_linestyle() == "--"]
    assert mark.get_x() < 0 < mark.get_x() + mark.get_width() < 1 and figure.description.endswith("You predicted 2.")
    for none in (None, 8):
        figure = plots_plan.step_parts(steps, predicted=none)
        assert not [patch for patch in figure.axes[0].patches if patch.get_linestyle() == "--"]
        assert "predicted" not in figure.description


def test_the_loss_that_was_predicted_is_a_dashed_line(run):
    figure = plots.losses({"two stages": run}, 2.303, predicted=1.0)
    assert [list(line.get_ydata()) for line in figure.axes[0].lines if line.get_label() == "your prediction"] == [
        [1, 1]
    ]
    assert figure.description.endswith("guessing: 2.3; you predicted 1.")
