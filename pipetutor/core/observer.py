"""What may look on while a rank trains: the heartbeat, the recorder of traces, an injected fault. No torch."""

from collections.abc import Sequence
from typing import Any

from pipetutor.schedule.orders import Instruction

Peers = Sequence[int]

__all__ = ["Observer", "Peers"]


class Observer:
    """Told of everything that a rank's loop does; each method does nothing until it is written anew.

    Attributes:
        starts_together: whether every step must begin on all ranks at once.
    """

    starts_together = False

    def built(self, engine: Any) -> None:
        """The engine holds the model; training begins."""

    def enter(self, phase: str, step: int) -> None:
        """The rank has got as far as this phase of this step: training, saving, evaluating or finished."""

    def begin(self, step: int) -> None:
        """The clock of a step starts."""

    def before(self, instruction: Instruction, peers: Peers = ()) -> None:
        """The engine is about to execute an instruction, which cannot end without these ranks."""

    def after(self) -> None:
        """It has executed it."""

    def loaded(self, micro_batch: list[Any]) -> list[Any]:
        """A micro-batch was loaded, images and labels; what is returned takes its place."""
        return micro_batch

    def end(self, step: int) -> None:
        """The clock of a step stops."""

    def trained(self) -> None:
        """The last step is done."""
