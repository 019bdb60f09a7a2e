"""Predictions that a learner types before a cell is run, and what became of them.

    predict("bubble", None, unit="%")             # in a cell of its own; the learner puts 0.2 in the place of None
    answer("bubble", measured.bubble)             # where the number is known
    plots.timelines(rows, predicted=predicted("slots"))
    tally()                                       # at the end of the lesson

A cell says what it has to say in a line, and a prediction never stops a lesson: nobody need make one, and what cannot
be understood is said and left out. What was typed is kept in the kernel, and nowhere else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipetutor.system.kinds import counted, shown

__all__ = ["answer", "predict", "predicted", "tally"]


@dataclass
class _Question:
    """What was asked, typed and found out."""

    unit: str
    choices: Sequence[Any]
    value: Any = None
    right: bool | None = field(default=None)  # what the first answer said; none yet

    def read(self, typed: Any) -> Any:
        """Return what was typed as one of the choices, or as a number; raise ValueError where it is none."""
        if self.choices:
            for choice in self.choices:
                if _plain(choice) == _plain(typed):
                    return choice
            raise ValueError(f"{shown(typed)} is none of {self.allowed}")
        percent = isinstance(typed, str) and typed.strip().endswith("%")
        try:
            number = float(typed.strip().removesuffix("%")) if isinstance(typed, str) else float(typed)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or isinstance(typed, bool):
            raise ValueError(f"{shown(typed)} is no number: type {self.allowed}")
        if percent or (self.unit == "%" and abs(number) > 1):
            number /= 100
        if self.unit == "%" and not 0 <= number <= 1:
            raise ValueError(f"{shown(typed)} is no share from 0 to 100 %: type {self.allowed}")
        return int(number) if number.is_integer() else number

    @property
    def allowed(self) -> str:
        """What can be typed, in words."""
        if self.choices:
            return " or ".join([", ".join(map(repr, self.choices[:-1])), repr(self.choices[-1])])
        return "a number such as 0.2, for 20 %" if self.unit == "%" else "a number such as 3"

    def written(self, value: Any) -> str:
        """Write a value with its unit."""
        if self.choices:
            return str(value)
        if self.unit == "%":
            return f"{_brief(100 * value)} %"
        return f"{_brief(value)} {self.unit}".strip()

    def distance(self, found: float) -> str:
        """Write how far a number is off."""
        off = abs(self.value - found)
        return f"{_brief(100 * off)} points" if self.unit == "%" else self.written(off)


_asked: dict[str, _Question] = {}


def predict(name: str, value: Any = None, unit: str = "", choices: Sequence[Any] = ()) -> None:
    """Commit a prediction; with none, say how to make one.

    Args:
        name: of what is predicted; ``answer`` asks for it by that name.
        value: the prediction: a number, or one of ``choices``; None for none.
        unit: of a number, such as ``ms``; ``%`` for a share, which may be typed as 0.2, 20 or "20 %".
        choices: what can be answered, where it is no number.

    >>> predict("losses", choices=["equal", "close", "different"])
    losses: what do you expect? In the place of None, type 'equal', 'close' or 'different'
    >>> predict("bubble", 0.2, unit="%")
    bubble: you say 20 %
    >>> predict("bubble", "a fifth", unit="%")
    bubble: 'a fifth' is no number: type a number such as 0.2, for 20 %; nothing is noted
    """
    question = _Question(unit, choices)
    before = _asked.get(name)
    if before is not None and before.right is not None:
        question.right = before.right  # the first one counts
    _asked[name] = question
    if value is None:
        print(f"{name}: what do you expect? In the place of None, type {question.allowed}")
        return
    try:
        question.value = question.read(value)
    except ValueError as error:
        print(f"{name}: {error}; nothing is noted")
        return
    print(f"{name}: you say {question.written(question.value)}")


def predicted(name: str) -> Any:
    """Return what was predicted, for a figure to show; None for nothing.

    >>> predict("step", 12, unit="slots")
    step: you say 12 slots
    >>> predicted("step")
    12
    """
    question = _asked.get(name)
    return None if question is None else question.value


def answer(name: str, found: Any, within: float = 0.1) -> None:
    """Compare a prediction with what was found out; silent where none was made.

    Args:
        name: as in ``predict``.
        found: what has come out, in the same form: a share for ``%``. None: nothing has, here.
        within: which share of ``found`` a number may be off and still be right; 0 for one that is to be counted.

    >>> predict("bubble", 0.2, unit="%")
    bubble: you say 20 %
    >>> answer("bubble", 0.27)
    bubble: you said 20 %, it is 27 %: off by 7 points
    """
    question = _asked.get(name)
    if question is None or question.value is None or found is None:
        return
    if question.choices:
        right = _plain(question.value) == _plain(found)
        verdict = "right" if right else "not so"
    else:
        right = abs(question.value - found) <= within * abs(found) + 1e-9
        verdict = "right" if right and not within else f"off by {question.distance(found)}"
        if right and within:
            verdict = f"right, within {100 * within:g} %"
    again = "" if question.right is None else " (your first prediction counts)"
    question.right = right if question.right is None else question.right
    print(f"{name}: you said {question.written(question.value)}, it is {question.written(found)}: {verdict}{again}")


def tally() -> None:
    """Say how many of the lesson's predictions were right.

    >>> _asked.clear()
    >>> tally()
    You made no prediction in this lesson. Where it asks for one, type one: it is what surprises you that you keep.
    """
    answered = {name: question.right for name, question in _asked.items() if question.right is not None}
    if not answered:
        print(
            "You made no prediction in this lesson. Where it asks for one, type one: it is what surprises you that "
            "you keep."
        )
        return
    wrong = [name for name, right in answered.items() if not right]
    missed = f". Look again at: {'; '.join(wrong)}" if wrong else ""
    print(f"You were right {len(answered) - len(wrong)} of {counted(len(answered), 'time')}{missed}")


def _plain(value: Any) -> str:
    return str(value).strip().lower()


def _brief(value: float) -> str:
    """Return a number in three digits, or a large one in whole."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
