"""What a step takes at least, in a closed form: what takes longer than another's step need not be played."""

import numpy as np

from pipetutor.schedule.simulate import Costs

__all__ = ["lower_bound"]


def lower_bound(costs: Costs, ranks: int, micro_batches: int, *, split: bool = False) -> float:
    """Return seconds that no step is shorter than, for the schedules of ``pipetutor.planner.layout``.

    A rank begins when the first micro-batch has reached it, then has its work to do, and its last gradient still goes
    back to each rank before it, which then takes the mean and steps:

        rank 0   F--.                           .--B  end
        rank 1       F--.                   .--B  end
        rank r           F B F B ... its work B   end

    So for equal stages and free messages it is what ``idle_share`` says, and the step itself.

    Args:
        costs: of the stages of the model.
        ranks: P.
        micro_batches: M.
        split: whether backward passes come in halves: only the first of them is on the way back.

    >>> lower_bound(Costs.equal(4), 4, 8)  # (M + P - 1) (1 + 2)
    33.0
    """
    forward = np.array(costs.forward, float)
    if costs.load:
        forward += costs.load
    weight = np.array(costs.backward_weight, float)
    back = np.array(costs.backward_input, float) + (0 if split else weight)
    work = (forward + back).reshape(-1, ranks).sum(axis=0)
    rest = weight.reshape(-1, ranks).sum(axis=0) if split else np.zeros(ranks)  # which the way back need not await
    once = [np.array(one, float) for one in (costs.all_reduce, costs.tied_reduce, costs.optimizer) if one]
    end = sum((one.reshape(-1, ranks).sum(axis=0) for one in once), np.zeros(ranks))
    message = np.array([costs.message(boundary) for boundary in range(ranks - 1)], float)
    there = np.concatenate([[0.0], np.cumsum(forward[: ranks - 1] + message)])
    home = np.concatenate([[0.0], np.cumsum(back[: ranks - 1] + message)])
    last = end + (weight[:ranks] if split else 0.0)  # behind a rank's last urgent half comes one half at least
    alone = there + micro_batches * (work + rest) + end
    through = there + micro_batches * work + home + np.maximum.accumulate(last - home)
    return float(max(alone.max(), through.max()))
