"""Every schedule run for real: it computes what one process computes, in the order that it says."""

import itertools
from collections import Counter

import pytest
import torch
from conftest import equal_but_for_rounding, run
from torch import nn
from torch.testing import assert_close

from pipetutor.core.config import read_config
from pipetutor.core.layers import build
from pipetutor.core.model import Model
from pipetutor.core.torch_engine import COMPUTE, TorchPipeline, build_optimizer
from pipetutor.schedule.orders import build as streams
from pipetutor.schedule.rules import placement
from pipetutor.schedule.text import parse

STEPS, MICRO_BATCHES, IMAGE = 3, 6, (3, 64, 64)
SGD = read_config(
    {
        "train_batch_size": 2 * MICRO_BATCHES,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
    }
)
ADAM = SGD | {"optimizer": {"type": "Adam", "params": {"lr": 1e-4}}}
# A stage of mobilenet_v3_small ends with Flatten, whose output is a view; one begins with an in-place Hardswish.
THREE, FOUR = [0, 6, 15, 19], [0, 6, 15, 16, 19]


def own():
    """Two micro-batches at a time, the second first; rank 0 holds both ends of the model, rank 1 what is between."""
    first = "0F{b} 0F{a} 3F{b} 3B{b} 3F{a} 3I{a} 0I{b} 0W{b} 3W{a} 0B{a}"
    second = "1F{b} 2F{b} 1F{a} 2F{a} 2B{b} 1B{b} 2I{a} 1I{a} 1W{a} 2W{a}"
    pairs = [{"a": number, "b": number + 1} for number in range(0, MICRO_BATCHES, 2)]
    return parse("\n".join(" ".join(row.format(**pair) for pair in pairs) for row in (first, second)))


CASES = {
    "naive": (streams("naive", 2, MICRO_BATCHES), [0, 6, 19]),
    "gpipe": (streams("gpipe", 2, MICRO_BATCHES), [0, 16, 19]),
    "1f1b": (streams("1f1b", 3, MICRO_BATCHES), THREE),
    "interleaved_1f1b": (streams("interleaved_1f1b", 2, MICRO_BATCHES, 2), FOUR),
    "zero_bubble": (streams("zero_bubble", 3, MICRO_BATCHES), THREE),
    "looped_bfs": (streams("looped_bfs", 2, MICRO_BATCHES, 2), FOUR),
    "zbv": (streams("zbv", 2, MICRO_BATCHES), FOUR),
    "dualpipev": (streams("dualpipev", 2, MICRO_BATCHES), FOUR),
    "own": (own(), FOUR),
}


def model():
    torch.manual_seed(0)
    return build("mobilenet_v3_small", dropout=0.0)


def micro_batches():
    generator = torch.Generator().manual_seed(0)
    while True:
        yield [torch.randn(2, *IMAGE, generator=generator), torch.randint(10, (2,), generator=generator)]


def labels_alone():
    for _, labels in micro_batches():
        yield [labels, labels]


def plain_loop(lost=0):
    """Losses, the first step's gradients and the state at the end; the first ``lost`` micro-batches teach nothing."""
    net, data = model(), micro_batches()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    losses, gradients = [], {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        parts = [nn.functional.cross_entropy(net(x), y) for x, y in itertools.islice(data, MICRO_BATCHES)]
        loss = torch.stack(parts).mean()
        (torch.stack(parts[lost:]).sum() / MICRO_BATCHES).backward()
        gradients = gradients or {name: p.grad.clone() for name, p in net.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients, net.state_dict()


def own_gradients(engine):
    return {n: t.grad.clone() for n, t in engine.state().items() if t.grad is not None}


def torch_rank(order, bounds, config):
    """Train; return losses, gradients, state, what was observed and how often a layer of each stage ran."""
    runs, seen, gradients, losses = Counter(), [], {}, []
    net = model()
    for name, module in net.named_modules():
        module.register_forward_hook(lambda *_, name=name: runs.update([name]))
    random = torch.get_rng_state()
    engine = TorchPipeline(Model.of(net), order, bounds, config, torch.empty(2, *IMAGE, device="meta"))
    runs.clear()
    assert torch.equal(torch.get_rng_state(), random)
    engine.observe(lambda i, peers: note(engine, seen, gradients, i, peers), lambda: seen.append(None))
    is_last = placement(order)[-1] == torch.distributed.get_rank()
    data = micro_batches() if engine.is_first else labels_alone() if is_last else None
    for _ in range(STEPS):
        losses.append(engine.train_batch(data).item())
    state = {name: tensor.detach() for name, tensor in engine.state().items()}
    return losses, gradients, state, seen, runs


def note(engine, seen, gradients, instruction, peers):
    seen.append((*instruction, tuple(peers)))
    if instruction.name == "OptimizerStep" and not gradients:
        gradients.update(own_gradients(engine))


def deepspeed_rank(bounds, config):
    from pipetutor.core.deepspeed_engines import Pipeline

    engine = Pipeline(Model.of(model()), len(bounds) - 1, ",".join(map(str, bounds)), config)
    data = micro_batches() if engine.is_first else labels_alone()
    (group,) = engine.optimizer.param_groups
    return [engine.train_batch(data).item() for _ in range(STEPS)], type(engine.optimizer), about(group)


def about(group):
    """Return what an optimizer was told of a group of parameters."""
    return {name: value for name, value in group.items() if name != "params"}


@pytest.fixture(scope="module")
def expected():
    """What a plain loop computes, and what it computes when half of the micro-batches are lost on it."""
    return plain_loop(), plain_loop(lost=MICRO_BATCHES // 2)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    order, bounds = CASES[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    return order, run(directory, len(order), torch_rank, order, bounds, SGD)


def check_same(results, expected):
    """Equal but for the order of additions: first gradients within torch's bound, the rest beside a mistake."""
    (losses, gradients, state), (losses_of_mistake, _, state_of_mistake) = expected
    for of_rank in results:
        equal_but_for_rounding(of_rank[0], losses, losses_of_mistake)
    for index, wanted in ((1, gradients), (2, state)):
        names = [name for of_rank in results for name in of_rank[index]]
        assert sorted(names) == sorted(wanted), "each tensor is on one rank"
    found = {name: tensor for of_rank in results for name, tensor in of_rank[2].items()}
    assert distance(found, state) < distance(state_of_mistake, state) / 1000
    for of_rank in results:
        for name, tensor in of_rank[1].items():
            assert_close(tensor, gradients[name], msg=lambda m, name=name: f"{name}: {m}")


def distance(found, wanted):
    return sum((tensor - wanted[name]).double().square().sum().item() for name, tensor in found.items()) ** 0.5


def test_every_schedule_computes_what_one_process_computes(case, expected):
    order, results = case
    if order == own():  # in which running statistics take micro-batches in another order
        for of_rank in results:
            for name in [name for name in of_rank[2] if "running" in name]:
                of_rank[2][name] = expected[0][2][name]
    check_same(results, expected)


def test_a_rank_computes_in_the_order_of_its_schedule(case):
    for stream, (*_, seen, _) in zip(*case, strict=True):
        found = [i[:3] for i in seen if i and i[0] in (*COMPUTE, "OptimizerStep")]
        assert found == [i[:3] for i in stream if i.name in (*COMPUTE, "OptimizerStep")] * STEPS


def test_each_message_is_waited_for_once_and_nothing_within_another(case):
    order, results = case
    ranks, holders = len(order), placement(order)
    last = len(holders) - 1
    for rank, (*_, seen, _) in enumerate(results):
        assert all(begin and end is None for begin, end in zip(seen[::2], seen[1::2], strict=True)), "nested"
        stages = [stage for stage, holder in enumerate(holders) if holder == rank]
        before = [(s, (holders[s - 1],)) for s in stages if s and holders[s - 1] != rank]
        behind = [(s, (holders[s + 1],)) for s in stages if s < last and holders[s + 1] != rank]
        wanted = {
            "RecvActivation": before,
            "SendGrad": before,
            "SendActivation": behind,
            "RecvGrad": behind,
        }
        for name, places in wanted.items():
            found = Counter(i[1:] for i in seen if i and i[0] == name)
            every = itertools.product(places, range(MICRO_BATCHES))
            assert found == {(s, m, peers): STEPS for (s, peers), m in every}, (rank, name)
        loaded = sum(i[0] == "LoadMicroBatch" for i in seen if i)
        pairs = 2 if order == own() else 1  # with the second of two, the first is loaded for later
        assert loaded == (STEPS * MICRO_BATCHES // pairs if {0, last} & {*stages} else 0)
        others = tuple(other for other in range(ranks) if other != rank)
        peers = others if rank == holders[-1] else (holders[-1],)
        assert [i[3] for i in seen if i and i[0] == "AggregateLoss"] == [peers] * STEPS
        assert seen[-2][0] == "AggregateLoss"


def test_one_rank_reads_images_and_labels_at_once(tmp_path, expected):
    results = run(tmp_path, 1, torch_rank, streams("interleaved_1f1b", 1, MICRO_BATCHES, 2), [0, 6, 19], SGD)
    check_same(results, expected)
    assert sum(i[0] == "LoadMicroBatch" for i in results[0][3] if i) == STEPS * MICRO_BATCHES


@pytest.mark.parametrize("config", [SGD, ADAM], ids=["SGD", "Adam"])
def test_deepspeed_gets_the_same_optimizer_and_the_same_losses(config, tmp_path, expected):
    for losses, kind, group in run(tmp_path, 2, deepspeed_rank, [0, 6, 19], config):
        ours = build_optimizer(config, [nn.Parameter(torch.zeros(1))])
        assert (kind, group) == (type(ours), about(ours.param_groups[0]))
        if config is SGD:
            equal_but_for_rounding(losses, expected[0][0], expected[1][0])


@pytest.mark.parametrize(
    ("kind", "params", "wanted"),
    [
        ("Adam", {}, (torch.optim.AdamW, 0.0)),
        ("AdamW", {"weight_decay": 0.1, "adam_w_mode": False}, (torch.optim.AdamW, 0.1)),
        ("Adam", {"adam_w_mode": False}, (torch.optim.Adam, 0.0)),
        ("SGD", {"weight_decay": 0.1}, (torch.optim.SGD, 0.1)),
    ],
)
def test_the_optimizer_is_deepspeeds(kind, params, wanted):
    config = {"optimizer": {"type": kind, "params": {"lr": 0.5} | params}}
    optimizer = build_optimizer(config, [nn.Parameter(torch.zeros(1))])
    (group,) = optimizer.param_groups
    assert (type(optimizer), group["weight_decay"]) == wanted and group["lr"] == 0.5
    assert kind == "SGD" or group["fused"]


@pytest.mark.parametrize("optimizer", [{"type": "Lamb"}, {"type": "Adam", "params": {"torch_adam": False}}])
def test_another_optimizer_is_refused(optimizer):
    with pytest.raises(ValueError, match="Adam, AdamW or SGD"):
        build_optimizer({"optimizer": optimizer}, [nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize(
    ("order", "bounds", "message"),
    [
        (streams("gpipe", 2, MICRO_BATCHES), THREE, "2 stages on 2 ranks, and there are 3 stages and 2 ranks"),
        (streams("gpipe", 3, MICRO_BATCHES), THREE, "3 stages on 3 ranks, and there are 3 stages and 2 ranks"),
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, order, bounds, message):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=message):
        TorchPipeline(Model.of(model()), order, bounds, SGD, torch.empty(2, *IMAGE, device="meta"))
