"""What a learner predicts is compared, counted and never in the way."""

import ast
import doctest
import re
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from pipetutor.lessons import predictions
from pipetutor.lessons.predictions import answer, predict, predicted, tally


@pytest.fixture(autouse=True)
def said(capsys, monkeypatch):
    """What was printed since the last call; each test has a kernel of its own."""
    monkeypatch.setattr(predictions, "_asked", {})
    return lambda: capsys.readouterr().out.strip()


def test_the_examples_of_its_documentation():
    assert doctest.testmod(predictions).failed == 0


@pytest.mark.parametrize("typed", [0.2, 20, "20 %", "20%", "0.2", " 20 "])
def test_a_share_may_be_typed_in_many_ways(typed, said):
    predict("bubble", typed, unit="%")
    assert said() == "bubble: you say 20 %" and predicted("bubble") == pytest.approx(0.2)
    answer("bubble", 0.2732)
    assert said() == "bubble: you said 20 %, it is 27.3 %: off by 7.32 points"
    tally()
    assert said() == "You were right 0 of 1 time. Look again at: bubble"


def test_a_number_is_right_within_a_share(said):
    predict("step", 12, unit="slots")
    assert said() == "step: you say 12 slots"
    answer("step", 12.5)
    assert said() == "step: you said 12 slots, it is 12.5 slots: right, within 10 %"
    answer("step", 13.5)
    assert "off by 1.5 slots" in said()
    answer("step", 13.5, within=0.2)
    assert "right, within 20 %" in said()
    answer("step", 12.01, within=0)
    assert "off by 0.01 slots" in said()
    answer("step", 12, within=0)
    assert "it is 12 slots: right" in said()


def test_a_choice_is_right_or_not(said):
    predict("losses", " Close ", choices=["equal", "close", "different"])
    assert said() == "losses: you say close"
    answer("losses", "equal")
    assert said() == "losses: you said close, it is equal: not so"
    predict("rank", "1", choices=[0, 1])
    answer("rank", 1)
    assert said() == "rank: you say 1\nrank: you said 1, it is 1: right"


def test_nobody_need_predict(said):
    predict("bubble", unit="%")
    assert said() == "bubble: what do you expect? In the place of None, type a number such as 0.2, for 20 %"
    predict("losses", None, choices=["equal", "close"])
    assert said() == "losses: what do you expect? In the place of None, type 'equal' or 'close'"
    answer("bubble", 0.3)
    answer("losses", "equal")
    answer("never asked", 1)
    assert said() == "" and predicted("bubble") is predicted("never asked") is None
    tally()
    assert said().startswith("You made no prediction in this lesson.") and "\n" not in said()


@pytest.mark.parametrize(
    "bad", ["a fifth", "", float("nan"), float("inf"), [1], {}, True, object, "1e999", 1j, [1] * 999, 10**999]
)
def test_what_is_no_number_is_said_in_a_line_and_left_out(bad, said):
    predict("bubble", bad, unit="%")
    words = said()
    assert "is no number: type a number such as 0.2, for 20 %; nothing is noted" in words and "\n" not in words
    answer("bubble", 0.3)
    assert said() == "" and predicted("bubble") is None


@pytest.mark.parametrize("bad", [-5, -0.01, 101, "100.5 %", "-1 %"])
def test_what_is_no_share_is_said_in_a_line_and_left_out(bad, said):
    predict("bubble", bad, unit="%")
    words = f"{bad!r} is no share from 0 to 100 %: type a number such as 0.2, for 20 %; nothing is noted"
    assert said() == f"bubble: {words}" and predicted("bubble") is None


@pytest.mark.parametrize(("typed", "words"), [(0, "0 %"), (1, "100 %"), (100, "100 %"), ("100 %", "100 %")])
def test_none_and_all_are_shares(typed, words, said):
    predict("bubble", typed, unit="%")
    assert said() == f"bubble: you say {words}"


@pytest.mark.parametrize("bad", ["equl", "", 3, [], ["equal"]])
def test_what_is_no_choice_is_said_in_a_line_and_left_out(bad, said):
    predict("losses", bad, choices=["equal", "close"])
    assert said() == f"losses: {bad!r} is none of 'equal' or 'close'; nothing is noted"


def test_the_first_prediction_counts(said):
    """Whoever has read the answer predicts no more."""
    predict("bubble", 0.5, unit="%")
    predict("bubble", 0.4, unit="%")  # not answered yet: a change of mind
    answer("bubble", 0.2)
    predict("bubble", 0.2, unit="%")
    said()
    answer("bubble", 0.2)
    assert said() == "bubble: you said 20 %, it is 20 %: right, within 10 % (your first prediction counts)"
    tally()
    assert said() == "You were right 0 of 1 time. Look again at: bubble"


def test_what_was_not_found_out_is_not_counted(said):
    predict("winner", 1, choices=[1, 2])
    said()
    answer("winner", None)
    tally()
    assert said().startswith("You made no prediction")


def test_all_right(said):
    for name in ("one", "two"):
        predict(name, 3)
        answer(name, 3)
    said()
    tally()
    assert said() == "You were right 2 of 2 times"


def calls_of(path):
    """Yield (cell, function, name, call) for each line of a notebook that has to do with predictions."""
    for place, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "code":
            for node in ast.walk(ast.parse(TransformerManager().transform_cell(cell.source))):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id in predictions.__all__
                ):
                    name = ast.unparse(node.args[0]) if node.args else ""
                    yield place, node.func.id, re.sub(r"^f?'|'$", "", name), node


NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
ASKING = [path for path in NOTEBOOKS if any(what == "predict" for _, what, *_ in calls_of(path))]


@pytest.mark.parametrize("path", ASKING, ids=lambda path: path.stem)
def test_a_lesson_answers_what_it_asks_and_counts_at_its_end(path):
    calls = list(calls_of(path))
    asked = {name: place for place, what, name, _ in calls if what == "predict"}
    for _, what, name, call in calls:
        if what == "predict":
            assert ast.unparse(call.args[1]) == "None", f"{name}: a learner types the value"
            assert len(name) <= 45, "in a line with what was said, and what it is"
    for place, what, name, _ in calls:
        if what in ("answer", "predicted"):
            pattern = re.sub(r"\\{.*?\\}", ".+", re.escape(name))  # of an f-string
            found = [one for one in asked if re.fullmatch(pattern, one)]
            assert found and all(asked[one] < place for one in found), f"{what}({name!r}) comes before any predict"
            asked |= dict.fromkeys(found, -1) if what == "answer" else {}
    assert not [name for name, place in asked.items() if place >= 0], "asked, and never answered"
    assert [what for _, what, *_ in calls].count("tally") == 1 and calls[-1][1] == "tally"
