"""Figures of time and memory show every span where it was, in a form that can be read in grey."""

from collections import Counter

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from pipetutor.figures import plots_timeline
from pipetutor.schedule.orders import build, deepspeed_1f1b
from pipetutor.schedule.simulate import Costs, simulate
from pipetutor.schedule.timeline import CODE, KINDS
from pipetutor.tracing.trace import Step


def theory(name="1f1b", ranks=2, micro_batches=4, chunks=1):
    return simulate(build(name, ranks, micro_batches, chunks), Costs.equal(ranks * chunks))


def test_every_pass_is_a_box_with_its_number():
    figure = plots_timeline.timelines({"GPipe": theory("gpipe"), "1F1B": theory()}, unit="units of time")
    above, below = figure.axes
    for axes, timeline in ((above, theory("gpipe")), (below, theory())):
        boxes = {(bar.get_x(), bar.get_width(), round(bar.get_y() + bar.get_height() / 2)) for bar in axes.patches}
        for span in timeline.spans:
            if KINDS[span["kind"]] in ("ForwardPass", "BackwardPass"):
                assert (span["begin"], span["end"] - span["begin"], span["rank"]) in boxes
        numbers = Counter(text.get_text() for text in axes.texts)
        assert numbers == dict.fromkeys([f"{letter}{n}" for letter in "FB" for n in range(4)], 2)
        assert [label.get_text() for label in axes.get_yticklabels()] == ["rank 0", "rank 1"]
    assert above.get_xlim() == below.get_xlim() and "1F1B: 15 units of time" in below.get_title(loc="left")
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_what_waits_is_drawn_behind_its_waiting():
    """A gradient that comes late: a thin bar until it is made, then the box of its transfer."""
    costs = Costs([1.0, 1.0], [1.0, 1.0], [1.0, 1.0], message_bytes=[1.0], latency=0.5)
    timeline = simulate([list(deepspeed_1f1b(2, 2, stage)) for stage in range(2)], costs)
    axes = plots_timeline.timelines({"": timeline}, unit="units of time").axes[0]
    boxes = {(bar.get_x(), bar.get_width(), round(bar.get_y() + bar.get_height() / 2)) for bar in axes.patches}
    waited = timeline.spans[(timeline.spans["waiting"] > 0) & (timeline.spans["kind"] == CODE["RecvGrad"])]
    transfers = zip(waited["begin"] + waited["waiting"], [0.5] * len(waited), waited["rank"], strict=True)
    assert len(waited) and {*transfers} <= boxes


def test_why_draws_the_critical_path_and_says_what_the_longest_gaps_wait_for():
    """GPipe, two micro-batches: down to rank 1 when F0 is made, and back up with its gradient."""
    timeline = theory("gpipe", 2, 2)
    figure = plots_timeline.timelines({"GPipe": timeline}, unit="slots", why=True)
    axes = figure.axes[0]
    (path,) = [line for line in axes.lines if line.get_path_effects()]
    assert path.get_color() == "black" and path.get_linewidth() > 1.5, "to be seen in print"
    corners = [tuple(map(float, point)) for point in zip(*path.get_data(), strict=True)]
    above, below = 0.43, 1.43
    assert corners[:2] == [(0, above), (1, above)] and corners[-2:] == [(7, above), (9, above)]
    assert {corner for corner in corners if corner[1] == below} == {(x, below) for x in (1, 2, 3, 5)}
    discs = {text.get_text(): text.get_position() for text in axes.texts if text.get_bbox_patch()}
    assert discs == {"1": (0.5, 1), "2": (3.5, 0), "3": (8, 1)}
    heading, *said = axes.get_title(loc="left").splitlines()
    assert heading == "GPipe: 9 slots"
    assert said == [
        "1   rank 1 waits 1 slot for the activation of micro-batch 0 from stage 0; meanwhile: F0 of stage 0",
        "2   rank 0 waits 3 slots for the gradient of micro-batch 0 from stage 1; "
        "meanwhile: F1 of stage 1, B0 of stage 1",
        "3   rank 1 waits 2 slots for rank 0 to end the step; meanwhile: B1 of stage 0",
    ]
    for words in (*(line[4:] for line in said), "the critical path, 9 slots long, is 5 slots computing on stage 0"):
        assert words in figure.description
    assert "critical path" in [text.get_text() for text in figure.legends[0].texts]
    assert not any(text.get_bbox_patch() for text in plots_timeline.timelines({"": timeline}).axes[0].texts)


def test_the_numbers_of_gaps_go_on_from_timeline_to_timeline():
    figure = plots_timeline.timelines({"one": theory("gpipe", 3), "other": theory("1f1b", 3)}, "slots", why=True)
    seen = [[t.get_text() for t in axes.texts if t.get_bbox_patch()] for axes in figure.axes]
    assert seen == [["1", "2", "3"], ["4", "5", "6"]]
    axes = figure.axes[1]
    assert len(axes.get_title(loc="left").splitlines()) >= 4
    figure._repr_png_()  # draws it: only then a text has a place
    for axes in figure.axes:
        assert axes._left_title.get_window_extent().x1 < figure.bbox.x1, "words are cut off"


def test_a_way_of_a_message_goes_aslant_from_rank_to_rank():
    costs = Costs((2, 3), (1, 2), (1, 2), message_bytes=(10,), latency=0.5, bandwidth=20)
    axes = plots_timeline.timelines({"": simulate(build("1f1b", 2, 1), costs)}, "s", why=True).axes[0]
    (path,) = [line for line in axes.lines if line.get_path_effects()]
    corners = dict.fromkeys(tuple(map(float, point)) for point in zip(*path.get_data(), strict=True))
    assert list(corners) == [(0, 0.43), (2, 0.43), (3, 1.43), (6, 1.43), (10, 1.43), (11, 0.43), (13, 0.43)]


def test_a_prediction_is_a_dashed_line():
    figure = plots_timeline.timelines({"": theory()}, "slots", predicted=20)
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert [list(line.get_xdata()) for line in dashed] == [[20, 20]]
    assert figure.axes[0].get_xlim()[1] >= 20, "one that is too long is seen, too"
    assert "you predicted 20 slots" in figure.description
    assert "your prediction" in [text.get_text() for text in figure.legends[0].texts]
    assert "predict" not in plots_timeline.timelines({"": theory()}, "slots").description


def test_a_slow_step_is_written_out():
    slow = simulate(build("1f1b", 2, 4), Costs.equal(2, 0.75))
    figure = plots_timeline.timelines({"theory": slow})
    assert slow.seconds > 10
    for words in (figure.axes[0].get_title(loc="left"), figure.description):
        assert f"theory: {1e3 * slow.seconds:.0f} ms" in words


def test_a_narrow_box_has_its_number_alone():
    axes = plots_timeline.timelines({"": theory(ranks=2, micro_batches=14)}).axes[0]
    assert {text.get_text() for text in axes.texts} == {*map(str, range(10)), *(f"B{n}" for n in range(14))}


def test_a_narrower_box_has_none():
    axes = plots_timeline.timelines({"": theory(ranks=2, micro_batches=200)}).axes[0]
    assert not axes.texts and len(axes.patches) > 2 * 2 * 200


def test_chunks_of_a_rank_differ_in_shade():
    axes = plots_timeline.timelines({"": theory("interleaved_1f1b", 2, 4, chunks=2)}).axes[0]
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2 * 2 + 1, "two chunks, two passes, and waiting"


def test_kinds_can_be_told_apart_without_colour():
    """By how dark they are, by their texture, or by how much of the row they fill."""
    seen = {}
    for look, (colour, hatch, height) in plots_timeline.LOOKS.items():
        grey = np.dot(to_rgb(colour), (0.3, 0.59, 0.11))
        for other, (dark, texture, part) in seen.items():
            assert abs(grey - dark) > 0.12 or hatch != texture or height != part, (look, other)
        seen[look] = grey, hatch, height
    assert set(plots_timeline.LOOK_OF) == set(KINDS) and set(plots_timeline.LOOK_OF.values()) < set(seen)


def test_the_account_is_drawn_as_it_adds_up():
    timeline = simulate([deepspeed_1f1b(2, 4, s) for s in range(2)], Costs.equal(2))
    axes = plots_timeline.accounting({"theory": timeline}).axes[0]
    ends = [0.0, 0.0]
    for bar in axes.patches:
        ends[round(bar.get_y() + bar.get_height() / 2)] += bar.get_width()
    assert ends == pytest.approx([timeline.seconds * 1e3] * 2)


def test_memory_counts_from_the_beginning_of_the_step():
    timeline = theory("gpipe")
    timeline.spans["memory"] = timeline.spans["memory"] * 1e6 + 5e6
    axes = plots_timeline.memory({"GPipe": Step(1, timeline, [5_000_000] * 2, [0, 0])}).axes[0]
    assert [max(line.get_ydata()) for line in axes.lines] == [4, 4]
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()


def test_activations_are_lines_and_marks():
    axes = plots_timeline.activations({"GPipe": {2: 2e6, 8: 8e6}}, {"GPipe": {2: 2.1e6}}).axes[0]
    assert list(axes.lines[0].get_ydata()) == [2, 8]
    assert axes.collections[0].get_offsets().tolist() == [[2, 2.1]]


def test_durations_leave_waiting_out():
    timeline = simulate([deepspeed_1f1b(2, 4, s) for s in range(2)], Costs.equal(2))
    assert timeline.durations("RecvGrad").tolist() == [0, 0, 0, 0]
    assert timeline.of(0)["waiting"][timeline.of(0)["kind"] == CODE["RecvGrad"]].sum() > 0
    assert set(timeline.durations("ForwardPass")) == {1}


@pytest.mark.parametrize("draw", [plots_timeline.timelines, plots_timeline.accounting, plots_timeline.memory])
@pytest.mark.parametrize("rows", [{}, theory()], ids=["nothing", "no dict"])
def test_what_cannot_be_drawn_is_refused(draw, rows):
    with pytest.raises(ValueError, match="a dict of titles is needed"):
        draw(rows)
