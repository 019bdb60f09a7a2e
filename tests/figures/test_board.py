"""The board: its rules and times are those of the package, on thousands of schedules; what Python makes of it."""

import json
import random
import subprocess
from pathlib import Path

import playwright
import pytest

from pipetutor.figures import board as board_module
from pipetutor.schedule.orders import Instruction
from pipetutor.schedule.rules import PASSES, ScheduleError, check, picture
from pipetutor.schedule.simulate import Costs, simulate
from pipetutor.schedule.text import parse
from pipetutor.schedule.timeline import peak_live

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
    const { slots, bubble, peaks } = board.play(game, rows);
    const again = board.parse(game, board.textOf(game, board.linkOf(game, rows)));
    return { missing: board.missing(game, rows), slots, bubble, peaks, picture: board.write(game, rows),
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
    module = Path(board_module.__file__).with_suffix(".js").as_uri()
    command = [NODE, "--input-type=module", "--no-warnings", "--eval", JUDGE, module]
    said = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, timeout=120)
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
        game = board_module._game(ranks, micro_batches, placement, costs, None, True)
        cases.append({"game": {**game, "par": None, "key": "any"}, "text": texted(rows)})
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
            assert said["peaks"] == [peak.micro_batches for peak in peak_live(timeline)], where
            drawn = picture(passes)
        assert said["same"], f"the link changes something: {where}"
        if drawn:  # where the board has an I, the pictures of the package have a B
            words = [line.replace("I", "B").split() for line in said["picture"].splitlines()]
            assert words == [line.split() for line in drawn.splitlines()], where
    assert all(number >= 5 for number in found.values()), found
