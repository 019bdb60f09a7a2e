"""The board: its rules and times are those of the package, on thousands of schedules; what Python makes of it."""

import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import playwright
import pytest
from bs4 import BeautifulSoup
from nbformat import write
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import build_html
from pipetutor.figures import board as board_module
from pipetutor.figures.board import board
from pipetutor.schedule.orders import Instruction, build, deepspeed_1f1b
from pipetutor.schedule.puzzles import PUZZLES, Puzzle, grade
from pipetutor.schedule.rules import PASSES, ScheduleError, check, picture
from pipetutor.schedule.simulate import Costs, simulate
from pipetutor.schedule.text import parse
from pipetutor.schedule.timeline import CODE, peak_live

NODE = Path(playwright.__file__).parent / "driver" / "node"
LETTER = dict(zip(PASSES, "FBIW", strict=True))
JUDGE = """
const board = await import(process.argv[1]);
let given = "";
for await (const part of process.stdin) given += part;
const answers = JSON.parse(given).map(({ game, text }) => {
  try {
    const rows = board.parse(game, text);
    const wrong = board.problem(game, rows);
    if (wrong) return { wrong };
    const times = board.play(game, rows);
    const { slots, bubble, peaks } = times;
    const gaps = times.rows.flat().filter((one) => one.start > one.begin);
    const causes = gaps.map((one) => board.why(game, times, one.rank, one.index));
    const again = board.parse(game, board.textOf(game, board.linkOf(game, rows)));
    return { missing: board.missing(game, rows), slots, bubble, peaks, causes,
      capped: board.problem({ ...game, cap: 2 }, rows), picture: board.write(game, rows),
      same: JSON.stringify(again) === JSON.stringify(rows), verdict: board.verdict(game, rows) };
  } catch (error) {
    if (!(error instanceof board.Refusal)) throw error;
    return { wrong: error.message };
  }
});
console.log(JSON.stringify(answers));
"""


def judged(cases):
    """What the module says of games and texts."""
    return in_node(JUDGE, json.dumps(cases))


def in_node(code, given=""):
    """What code prints that is told where the module is."""
    module = Path(board_module.__file__).with_suffix(".js").as_uri()
    command = [NODE, "--input-type=module", "--no-warnings", "--eval", code, module]
    said = subprocess.run(command, input=given, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def texted(rows):
    return "\n".join(" ".join(f"{i.stage}{LETTER[i.name]}{i.micro_batch}" for i in row) or "." for row in rows)


def random_game(chance):
    ranks = chance.randint(1, 4)
    placement = [*range(ranks), *(chance.randrange(ranks) for _ in range(chance.randint(0, 4)))]
    chance.shuffle(placement)
    stages = len(placement)

    def numbers(least=0.0):
        kind = chance.randrange(3)
        return [(1.0, max(least, chance.randint(0, 3)), chance.uniform(least, 2))[kind] for _ in range(stages)]

    messages = chance.choice([(), [chance.choice([0, 1, 2.5]) for _ in range(stages - 1)]])
    more = {"message_bytes": messages, "latency": chance.choice([0, 0, 0.5]), "bandwidth": chance.choice([1.0, 2.0])}
    costs = Costs(numbers(0.1), numbers(), numbers(), load=chance.choice([(), numbers()]), burst=0.5, **more)
    return ranks, placement, chance.randint(1, 5), costs


def random_order(chance, placement, micro_batches):
    """A valid schedule, as the order in which one pass after the other could be placed: (rank, pass)."""
    last = len(placement) - 1
    left = []
    for stage in range(last + 1):
        for batch in range(micro_batches):
            names = ["ForwardPass", *chance.choice([["BackwardPass"], ["BackwardInput", "BackwardWeight"]])]
            left += [Instruction(name, stage, batch) for name in names]
    done, order = set(), []

    def ready(one):
        name, stage, batch = one
        if name == "ForwardPass":
            return stage == 0 or ("ForwardPass", stage - 1, batch) in done
        if name == "BackwardWeight":
            return ("BackwardInput", stage, batch) in done
        after = stage == last or any((half, stage + 1, batch) in done for half in ("BackwardPass", "BackwardInput"))
        return after and ("ForwardPass", stage, batch) in done

    while left:
        one = chance.choice([one for one in left if ready(one)])
        left.remove(one)
        done.add(one)
        order.append((placement[one.stage], one))
    return order


def rows_of(order, ranks):
    return [[one for at, one in order if at == rank] for rank in range(ranks)]


def broken(chance, rows, micro_batches):
    """The same rows with one mistake; now and then it is none."""
    rows = [[*row] for row in rows]
    rank = chance.choice([rank for rank, row in enumerate(rows) if row])
    row = rows[rank]
    index = chance.randrange(len(row))
    one = row[index]
    way = chance.randrange(7)
    if way < 3:  # other orders, and with them circles
        for _ in range(chance.randint(1, 6)):
            row = chance.choice([row for row in rows if row])
            index = chance.randrange(len(row))
            row.insert(chance.randrange(len(row)), row.pop(index))
    elif way == 3:
        del row[index]
    elif way == 4:
        row.insert(chance.randrange(len(row) + 1), one)
    elif way == 5:
        chance.choice(rows).append(row.pop(index))
    else:
        row[index] = Instruction(chance.choice(PASSES), one.stage, chance.randrange(micro_batches + 1))
    return rows


REASONS = {  # of the checker, and of the board
    "it would count twice": "is there already",
    "keep the whole": "are the same gradients twice",
    "swap them": "",  # and more may be wrong where a pass is not what it was
    "deadlock": "circle of waits",
}


def test_the_board_judges_and_plays_as_the_package_does():
    chance = random.Random(20)
    cases, streams_of, costs_of, beginnings = [], [], [], []
    for number in range(3000):
        ranks, placement, micro_batches, costs = random_game(chance)
        order = random_order(chance, placement, micro_batches)
        begun = number % 3 == 2
        rows = rows_of(order[: chance.randrange(len(order))] if begun else order, ranks)
        if number % 3 == 1:
            rows = broken(chance, rows, micro_batches)
        puzzle = Puzzle("any", "", micro_batches, tuple(placement), costs, par=math.inf, split=True)
        cases.append({"game": board_module._game(puzzle), "text": texted(rows)})
        streams_of.append(parse(texted(rows)))
        costs_of.append(costs)
        beginnings.append(begun and sum(map(len, rows)) < len(order))
    found = {"accepted": 0, "refused": 0, **dict.fromkeys(REASONS, 0)}
    for case, streams, costs, begun, said in zip(cases, streams_of, costs_of, beginnings, judged(cases), strict=True):
        where = f"{case['game']}\n{case['text']}\n{said}"
        passes = [[one for one in stream if one.micro_batch is not None] for stream in streams]
        if begun:
            assert "wrong" not in said and said["missing"], where
            drawn = picture(passes, case["game"]["placement"]) if any(passes) else None
        else:
            try:
                check(streams)
                reason = ""
            except ScheduleError as error:
                reason = str(error)
            assert bool(reason) == ("wrong" in said or said["missing"] > 0), f"{reason}\n{where}"
            for theirs, ours in REASONS.items():
                if theirs in reason:
                    found[theirs] += 1
                    assert ours in said["wrong"], f"{reason}\n{where}"
            found["refused" if reason else "accepted"] += 1
            if reason:
                continue
            timeline = simulate(streams, costs)
            assert said["slots"] == pytest.approx(timeline.seconds, abs=1e-9), where
            assert said["bubble"] == pytest.approx(timeline.bubble, abs=1e-9), where
            waits = np.isin(timeline.spans["kind"], [CODE["RecvActivation"], CODE["RecvGrad"]]).sum()
            assert len(said["causes"]) == waits and all(" waits " in cause for cause in said["causes"]), where
            assert bool(said["capped"]) == (max(said["peaks"]) > 2), where
            assert said["peaks"] == [peak.micro_batches for peak in peak_live(timeline)], where
            drawn = picture(passes)
        assert said["same"], f"the link changes something: {where}"
        if drawn:  # where the board has an I, the pictures of the package have a B
            words = [line.replace("I", "B").split() for line in said["picture"].splitlines()]
            assert words == [line.split() for line in drawn.splitlines()], where
    assert all(number >= 5 for number in found.values()), found


SOLUTIONS = {
    "twelve slots": build("gpipe", 3, 4),
    "three in flight": build("1f1b", 3, 4),
    "two chunks": build("interleaved_1f1b", 2, 4, chunks=2),
    "a V": """
        0F0 0F1 0F2 3F0 3B0 3F1 3B1 0B0 0F3 0B1 3F2 3B2 3F3 3B3 0B2 0B3
        1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1 1F2 2F2 1F3 2F3 2B2 1B2 2B3 1B3
    """,
    "beat 1F1B": build("zero_bubble", 3, 5),
    "a slow link": "F0 F1 F2 F3 B0 B1 B2 B3 / F0 F1 F2 F3 B0 B1 B2 B3 / F0 B0 F1 B1 F2 B2 F3 B3",
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_a_par_is_met_on_the_board_by_what_the_grader_takes(name):
    puzzle = PUZZLES[name]
    shown = board(puzzle, start=SOLUTIONS[name])
    [said] = judged([{"game": shown.game, "text": shown.text}])
    assert said["missing"] == 0 and said["verdict"].endswith("par met."), said
    assert grade(puzzle, shown.text).solved and grade(puzzle, said["picture"]).solved
    assert parse(shown.text) == shown.streams == parse(said["picture"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("f0 F1 b0 / F0", "B0 on rank 0 needs the gradient of B0 from rank 1, which is not placed yet"),
        ("F0 F1 / F0 F2", "F2 on rank 1 needs the activation of F2 from rank 0, which is not placed yet"),
        ("F0 F1 F1 / F0", "F1 is there already, on rank 0"),
        ("F0 / F0 F1 F2 / F0", "3 rows, but the board has 2 ranks"),
        ("F0 F1 F2 / .", "with F2 rank 0 would hold 3 micro-batches in flight, and 2 are allowed"),
        ("F0 / B0 F0", "B0 on rank 1 needs its forward pass F0, which would come after it"),
        (
            "F0 B0 F1 / F0 F1 B0",
            "a circle of waits, in which nobody can go on: rank 0 would stand at B0 and wait for B0",
        ),
        ("F0 / 0F1", "rank 0 holds stage 0 and its weights, so rank 1 cannot run F1"),
        ("F0 / F0 I0", "I0 is half a backward pass, and this board has whole ones"),
        ("F0 / 2F0", "there is no stage 2: the board has stages 0 to 1"),
        ("F7 / .", "F7 is of no micro-batch: there are 0 to 3"),
        ("F0 / G0", '"G0" is no pass: passes of this board are such as F0 and B0'),
    ],
)
def test_a_board_says_why_it_refuses(text, reason):
    [said] = judged([{"game": board(ranks=2, micro_batches=4, cap=2).game, "text": text}])
    assert reason in said["wrong"]


def test_a_board_gives_its_own_passes_as_examples():
    chunks = board(PUZZLES["two chunks"]).game
    split = board(PUZZLES["beat 1F1B"]).game
    said = judged([{"game": chunks, "text": "G0 / ."}, {"game": split, "text": "G0 / . / ."}])
    assert [each["wrong"].partition(": ")[2] for each in said] == [
        "passes of this board are such as 0F0 and 0B0",
        "passes of this board are such as F0, B0, I0 and W0",
    ]


def test_a_link_is_for_one_board_and_a_damaged_one_is_read_as_it_stands():
    links = ["#board=2x2:F0/.", "#board=2x2", "#board=2x2:F0/%E0", "#board=2x3:F0/.", "#elsewhere", ""]
    ask = f"""
    const {{ textOf }} = await import(process.argv[1]);
    console.log(JSON.stringify({json.dumps(links)}.map((link) => textOf({{ key: "2x2" }}, link))));
    """
    assert in_node(ask) == ["F0\n.", "", "F0/%E0", None, None, None]


COSTS = Costs((1.0,) * 2, (1.0,) * 2, (1.0,) * 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "board() takes a puzzle, a timeline, or ranks= and micro_batches="),
        ({"placement": (0, 1)}, "board() takes a puzzle, a timeline, or ranks= and micro_batches="),
        ({"ranks": 2}, "or ranks= and micro_batches=: give micro_batches= as well"),
        ({"micro_batches": 2}, "or ranks= and micro_batches=: give ranks= as well"),
        ({"ranks": "2", "micro_batches": 2}, "ranks is '2'"),
        ({"ranks": 2, "micro_batches": 0}, "micro_batches is 0"),
        ({"ranks": 2, "micro_batches": 2, "cap": 0}, "cap is 0"),
        ({"ranks": 20, "micro_batches": 64}, "a board of 2560 passes"),
        ({"ranks": 2, "micro_batches": 2, "placement": (0, 0)}, "placement is (0, 0): give the rank of each stage"),
        ({"ranks": 3, "micro_batches": 2, "costs": COSTS}, "costs for 2 stages, but placement has 3"),
        (
            {"ranks": 2, "micro_batches": 2, "costs": replace(COSTS, optimizer=(1.0, 1.0))},
            "costs of what ends a step",
        ),
        ({"shown": "1f1b"}, "board('1f1b'): give a puzzle, a timeline, or ranks= and micro_batches="),
        ({"shown": PUZZLES["twelve slots"], "cap": 3}, "the puzzle 'twelve slots' has its own cap: leave them out"),
        ({"ranks": 2, "micro_batches": 2, "start": "F0"}, "start has 1 rows, but the board has 2 ranks"),
        (
            {"ranks": 2, "micro_batches": 2, "start": "F0 / F9"},
            "rank 1 has ForwardPass 9 of stage 1, but runs passes",
        ),
        ({"ranks": 2, "micro_batches": 2, "start": "F0 F0 / ."}, "start: rank 0 has ForwardPass 0 of stage 0 twice"),
        ({"ranks": 2, "micro_batches": 2, "start": "F0 B0 / F0"}, "start cannot be played: deadlock"),
        ({"ranks": 2, "micro_batches": 2, "start": "F0 X / F0"}, "rank 0: 'X' is no pass"),
    ],
)
def test_what_makes_no_board_is_told(arguments, words):
    with pytest.raises(ValueError) as problem:
        board(**arguments)
    assert words in str(problem.value)


def test_a_timeline_is_told_in_its_unit():
    streams = [deepspeed_1f1b(2, 3, stage) for stage in range(2)]
    costs = Costs((0.001,) * 2, (0.001,) * 2, (0.001,) * 2, message_bytes=(1.0,), bandwidth=1000.0)
    timeline = simulate(streams, costs)
    shown = board(timeline)
    assert shown.game["seconds"] == pytest.approx(timeline.seconds * 1e3) and shown.game["unit"] == "ms"
    assert [span["name"] for span in shown.game["spans"][:2]] == ["LoadMicroBatch", "ForwardPass"]
    assert {span["label"] for span in shown.game["spans"]} >= {"F0", "B2", ""}
    waits = [sum(gap["end"] - gap["begin"] for gap in shown.game["gaps"] if gap["rank"] == rank) for rank in (0, 1)]
    assert waits == pytest.approx([row["waiting"] * 1e3 for row in timeline.accounting()])
    assert "Rank 1 waits 1 ms for the activation of micro-batch 0 from stage 0" in shown.game["gaps"][2]["words"]
    with pytest.raises(ValueError, match="on which nothing is placed"):
        _ = shown.streams
    with pytest.raises(ValueError, match="a board shows up to 2000"):
        board(simulate(build("1f1b", 8, 200), Costs.equal(8)))


def test_a_page_has_figures_with_words_and_one_module_for_its_boards(tmp_path):
    boards = [
        board(replace(PUZZLES["twelve slots"], task="Take 12 slots, <b>& no more</b></script>.")),
        board(ranks=2, micro_batches=2, placement=(0, 1, 1, 0), start="0F0 0F1 3F0 / 1F0 2F0"),
        board(simulate(build("1f1b", 2, 2), Costs.equal(2)), unit="slots"),
    ]
    outputs = [new_output("display_data", each._repr_mimebundle_()[0]) for each in boards]
    cells = [
        new_markdown_cell("# One\n\nA promise."),
        *(new_code_cell("board()", outputs=[output]) for output in outputs),
    ]
    widgets = {each.model_id: {"state": {}} for each in boards}
    state = {"application/vnd.jupyter.widget-state+json": {"state": widgets, "version_major": 2, "version_minor": 0}}
    for metadata in ({}, {"widgets": state}):  # as JupyterLab keeps a notebook, and as papermill does
        write(new_notebook(cells=cells, metadata=metadata), tmp_path / "00_one.ipynb")
        assert build_html.build(tmp_path, tmp_path, tmp_path / "html") == []
        soup = BeautifulSoup((tmp_path / "html" / "00_one.html").read_text(), "html.parser")
        figures = soup.select("[data-pipetutor-board] > svg")
        said = [figure["aria-label"] for figure in figures]
        task = "Take 12 slots, <b>& no more</b></script>."
        assert said[0] == f"Twelve slots {task} A row for each of 3 ranks, over time. Nothing is placed yet."
        assert said[1] == "A row for each of 2 ranks, over time. Placed: 0F0 0F1 3F0 / 1F0 2F0."
        assert said[2] == "A row for each of 2 ranks, over time. 9 slots, of which the ranks wait 33%."
        assert [text.get_text() for text in figures[1].select("text")][2:] == ["0F0", "0F1", "3F0", "1F0", "2F0"]
        [module] = soup.select("script[data-pipetutor-module]")
        assert module["type"] == "module" and module.string == board_module.MOUNT
        games = [json.loads(tag.string) for tag in soup.select("[data-pipetutor-board] > script")]
        assert games == json.loads(json.dumps([{**each.game, "start": each.text} for each in boards]))


def test_the_module_can_stand_in_a_page():
    assert "</script" not in board_module.MODULE.lower() and "<!--" not in board_module.MODULE


def test_a_board_loads_no_torch():
    code = "import sys, pipetutor.figures.board; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    )
