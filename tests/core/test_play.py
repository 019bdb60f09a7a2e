"""What a schedule computes when it is played: gradients of one process, to the last bit, in any order."""

import pytest
import torch
from conftest import run
from torch import nn

from pipetutor.core.play import play
from pipetutor.schedule.orders import Instruction, build
from pipetutor.schedule.rules import picture
from pipetutor.schedule.simulate import Costs, simulate
from pipetutor.schedule.timeline import peak_live

M, WIDTH = 4, 8
LOSS = nn.functional.mse_loss


def stages(count):
    """Stages of a model of six blocks, the same whatever their number."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(6)]
    return [nn.Sequential(*blocks[s * 6 // count : (s + 1) * 6 // count]) for s in range(count)]


def data():
    torch.manual_seed(1)
    return list(torch.randn(M, 3, WIDTH)), list(torch.randn(M, 3, WIDTH))


def plain():
    """The gradients of one process, and its mean loss."""
    (model,) = stages(1)
    total = 0.0
    for x, target in zip(*data(), strict=True):
        loss = LOSS(model(x), target) / M
        loss.backward()
        total += loss.item()
    return [p.grad for p in model.parameters()], total


def played(streams, spoil=False):
    """What one rank makes of it: loss, gradients of its stages by number, and how many it kept in flight."""
    rank = torch.distributed.get_rank()
    mine = {i.stage for i in streams[rank] if i.micro_batch is not None}
    count = 1 + max(i.stage for stream in streams for i in stream)
    modules = {stage: module for stage, module in enumerate(stages(count)) if stage in mine}
    kept, most = 0, 0

    def begin(*_):
        nonlocal kept, most
        kept += 1
        most = max(most, kept)

    def end(*_):
        nonlocal kept
        kept -= 1

    for module in modules.values():
        module.register_forward_pre_hook(begin)
        module.register_forward_hook(lambda module, x, y: y.register_hook(end) and None)
    inputs, targets = data()
    if spoil:
        inputs[1], inputs[2] = inputs[2], inputs[1]
    loss = play(streams, modules, inputs, targets, LOSS, [(3, WIDTH)] * count)
    return loss, {s: [p.grad for p in module.parameters()] for s, module in modules.items()}, most


def together(results):
    loss = sum(loss for loss, *_ in results)
    gradients = {stage: grads for _, of_rank, _ in results for stage, grads in of_rank.items()}
    return [gradient for stage in sorted(gradients) for gradient in gradients[stage]], loss


def equal(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found[0], wanted[0], strict=True)) and found[1] == wanted[1]


CASES = {
    "one rank": build("1f1b", 1, M),
    "gpipe on 2": build("gpipe", 2, M),
    "gpipe on 3": build("gpipe", 3, M),
    "1f1b on 2": build("1f1b", 2, M),
    "1f1b on 3": build("1f1b", 3, M),
    "two halves": build("zero_bubble", 3, M),
    "two stages a rank": build("interleaved_1f1b", 2, M, 2),
}


@pytest.mark.parametrize("streams", CASES.values(), ids=CASES)
def test_it_computes_what_one_process_computes(streams, tmp_path):
    results = run(tmp_path, len(streams), played, streams)
    assert equal(together(results), plain())


def test_the_picture_above_the_loop_is_that_of_the_schedule():
    shown = [line.strip().partition("    ")[0] for line in play.__doc__.splitlines()]
    assert all(row in shown for row in picture(build("1f1b", 2, 2)).splitlines())


def test_a_rank_keeps_in_flight_what_the_simulator_says(tmp_path):
    for schedule, most in (("gpipe", [4, 4, 4]), ("1f1b", [3, 2, 1])):
        streams = build(schedule, 3, M)
        said = [peak.micro_batches for peak in peak_live(simulate(streams, Costs.equal(3)))]
        directory = tmp_path / schedule
        directory.mkdir()
        assert [kept for *_, kept in run(directory, 3, played, streams)] == most == said


NAMES = {"F": "ForwardPass", "B": "BackwardPass", "I": "BackwardInput", "W": "BackwardWeight"}
V = [  # pass, stage, micro-batch: stages 0 and 3 on rank 0, whole and halved backward passes, another way back
    "F00 F01 F30 B30 F31 I31 B01 W31 B00",
    "F10 F20 F11 F21 B20 I21 B11 B10 W21",
]


def of_v(row):
    """The stream of a row, for its two micro-batches and then for two more."""
    return [Instruction(NAMES[w[0]], int(w[1]), int(w[2]) + more) for more in (0, 2) for w in row.split()]


def test_any_stage_may_be_on_any_rank_and_whole_and_halved_passes_mix(tmp_path):
    found, wanted = together(run(tmp_path, 2, played, [of_v(row) for row in V])), plain()
    assert found[1] == wanted[1]
    for gradient, one in zip(found[0], wanted[0], strict=True):  # micro-batches come back in another order
        torch.testing.assert_close(gradient, one)
    assert not equal(found, wanted), "another order of additions"


def test_a_swapped_micro_batch_is_seen(tmp_path):
    """The control: all passes run, and the inputs of two of them are each other's."""
    found, wanted = together(run(tmp_path, 2, played, build("1f1b", 2, M), True)), plain()
    apart = max((a - b).abs().max().item() for a, b in zip(found[0], wanted[0], strict=True))
    assert found[1] != wanted[1] and apart > 1e-3
