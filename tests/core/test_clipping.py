"""Gradients are clipped by the norm of the whole model, whatever the stages, replicas, engine and optimizer."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL_SGD, equal_but_for_rounding, run, train

from pipetutor.core.clipping import clip_gradients

TINY = ["-s", 4, "--model", "tiny", "--dropout", 0]
GPT = ["-s", 3, "--model", "gpt:layers=1,width=16", "--dataset", "sums"]  # its embedding is tied to its head
CLIPPED = SMALL_SGD | {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "gradient_clipping": 0.5}
ZERO = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
BF16 = {"bf16": {"enabled": True}}


def as_torch_clips():
    import deepspeed

    def clip(self):
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.gradient_clipping())

    deepspeed.DeepSpeedEngine.clip_fp32_gradients = clip


def each_stage_alone():
    from pipetutor.core import clipping

    clipping.dist = type("Alone", (), {"all_reduce": staticmethod(lambda *_, **__: None)})


def a_tied_weight_twice():
    from pipetutor.core import deepspeed_engines

    def clip(parameters, *about):
        parameters = list(parameters)
        for parameter in parameters:
            parameter.ds_pipe_replicated = False
        clip_gradients(parameters, *about)

    deepspeed_engines.clip_gradients = clip


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Losses of one process that clips with torch's own function, and of one that does not clip."""
    directory = tmp_path_factory.mktemp("one")
    losses = {}
    for name, net in (("tiny", TINY), ("gpt", GPT)):
        found = [
            train(directory / f"{name}{norm}", *net, stages=0, config=config, patch=as_torch_clips).losses
            for norm, config in (("", CLIPPED), ("free", CLIPPED | {"gradient_clipping": 0.0}))
        ]
        assert max(abs(a - b) for a, b in zip(*found, strict=True)) > 1e-3, "clipping does not bite"
        losses[name] = found[0]
    return losses


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """Losses of two stages that each take a norm of their own."""
    directory = tmp_path_factory.mktemp("mistaken")
    return {
        name: train(directory / name, *net, stages=2, config=CLIPPED, patch=each_stage_alone).losses
        for name, net in (("tiny", TINY), ("gpt", GPT))
    }


SMALL_BUFFER = ZERO | {"zero_optimization": {"stage": 1, "reduce_bucket_size": 50}}  # some weights fit, some do not


@pytest.mark.parametrize("extra", [{}, ZERO, SMALL_BUFFER], ids=["ZeRO 0", "ZeRO 1", "ZeRO 1, small buffer"])
@pytest.mark.parametrize(("stages", "replicas"), [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
def test_deepspeeds_engine_clips_as_one_process_does(stages, replicas, extra, runs, one_process, mistaken):
    found = train(runs, *TINY, stages=stages, replicas=replicas, config=CLIPPED | extra)
    equal_but_for_rounding(found.losses, one_process["tiny"], mistaken["tiny"])


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_torchs_engine_clips_as_one_process_does(stages, runs, one_process, mistaken):
    found = train(runs, *TINY, "--engine", "torch", stages=stages, config=CLIPPED)
    equal_but_for_rounding(found.losses, one_process["tiny"], mistaken["tiny"])


@pytest.mark.parametrize("extra", [{}, ZERO], ids=["ZeRO 0", "ZeRO 1"])
def test_a_tied_weight_counts_once(extra, runs, one_process, mistaken):
    found = train(runs, *GPT, stages=2, config=CLIPPED | extra)
    equal_but_for_rounding(found.losses, one_process["gpt"], mistaken["gpt"])


def test_a_tied_weight_counts_once_in_torchs_engine(runs, one_process, mistaken):
    found = train(runs, *GPT, "--engine", "torch", stages=2, config=CLIPPED)
    equal_but_for_rounding(found.losses, one_process["gpt"], mistaken["gpt"])


def test_a_tied_weight_that_counts_twice_is_seen(runs, one_process, mistaken):
    found = train(runs, *GPT, stages=2, config=CLIPPED, patch=a_tied_weight_twice)
    with pytest.raises(AssertionError):
        equal_but_for_rounding(found.losses, one_process["gpt"], mistaken["gpt"])


@pytest.mark.parametrize("extra", [{}, ZERO], ids=["ZeRO 0", "ZeRO 1"])
def test_bf16_clips_by_the_norm_of_all_stages(extra, runs):
    """Its losses are numbers of 16 bits: those of one stage and of two are the same ones."""
    config = CLIPPED | BF16 | extra
    one, two = (train(runs / f"{stages}", *TINY, stages=stages, config=config) for stages in (1, 2))
    free = train(runs / "free", *TINY, stages=1, config=config | {"gradient_clipping": 0.0})
    assert one.losses == two.losses != free.losses


GRADIENTS = {
    "long": [3.0, 4.0, 12.0],
    "short": [0.01, 0.02, 0.03],
    "zero": [0.0, 0.0, 0.0],
    "infinite": [1.0, float("inf"), 2.0],
    "not a number": [1.0, 2.0, float("nan")],
}


def clipped(values, of_rank, copy):
    """On each rank, its gradients after clipping; a last parameter has none, and one may be another rank's."""
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(len(of_rank[dist.get_rank()]) + 1)]
    for parameter, index in zip(parameters, of_rank[dist.get_rank()], strict=False):
        parameter.grad = torch.full((2,), values[index])
        parameter.ds_pipe_replicated = index == copy and dist.get_rank() > 0
    clip_gradients(parameters, 0.5, torch.device("cpu"), dist.group.WORLD)
    return [p.grad for p in parameters if p.grad is not None]


@pytest.mark.parametrize(("of_rank", "copy"), [([[0, 1], [2]], None), ([[0, 1, 2], []], None), ([[0, 1], [2, 0]], 0)])
@pytest.mark.parametrize("case", GRADIENTS)
def test_it_is_what_torch_does(case, of_rank, copy, tmp_path):
    values = GRADIENTS[case]
    whole = [torch.nn.Parameter(torch.zeros(2)) for _ in values]
    for parameter, value in zip(whole, values, strict=True):
        parameter.grad = torch.full((2,), value)
    torch.nn.utils.clip_grad_norm_(whole, 0.5)
    for found, indices in zip(run(tmp_path, 2, clipped, values, of_rank, copy), of_rank, strict=True):
        for gradient, index in zip(found, indices, strict=True):
            torch.testing.assert_close(gradient, whole[index].grad, equal_nan=True)


def note_peers():
    from pipetutor.core import loop

    before = loop.Loop._before

    def noted(self, instruction, peers):
        if instruction.name == "OptimizerStep":
            Path(f"peers{loop.dist.get_rank()}").write_text(json.dumps(sorted(peers)))
        before(self, instruction, peers)

    loop.Loop._before = noted


@pytest.mark.parametrize(
    ("extra", "stages", "wanted"),
    [
        ({"gradient_clipping": 0.0}, 2, [[], [], [], []]),
        ({}, 2, [[2], [3], [0], [1]]),  # the ranks 0 and 2 are one pipeline, 1 and 3 the other
        (ZERO | {"gradient_clipping": 0.0}, 2, [[1, 2], [0, 3], [0, 3], [1, 2]]),
        ({}, 0, [[], []]),  # replicas hold the whole model, and equal gradients
        (ZERO, 0, [[1], [0]]),
    ],
    ids=["free", "clipped", "ZeRO 1", "baseline", "baseline, ZeRO 1"],
)
def test_an_optimizer_step_tells_whom_it_waits_for(extra, stages, wanted, runs):
    train(runs, "-s", 1, *TINY[2:], stages=stages, replicas=2, config=CLIPPED | extra, patch=note_peers)
    assert [json.loads((runs / f"peers{rank}").read_text()) for rank in range(len(wanted))] == wanted
