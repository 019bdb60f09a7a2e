"""DeepSpeed's DualPipeV computes in our order, and every pass is told under its stage and micro-batch."""

from conftest import run
from tiny import Tiny

from pipetutor.schedule.orders import build

RANKS, MICRO_BATCHES, BOUNDS = 2, 5, [0, 2, 5, 9, 14]


def rank():
    import torch

    from pipetutor.certify.dualpipev import DualPipeV
    from pipetutor.core.config import read_config
    from pipetutor.core.model import Model

    config = {"train_batch_size": 2 * MICRO_BATCHES, "train_micro_batch_size_per_gpu": 2}
    config["optimizer"] = {"type": "SGD", "params": {"lr": 0.1}}
    seen = []
    engine = DualPipeV(Model.of(Tiny()), RANKS, ",".join(map(str, BOUNDS)), read_config(config))
    engine.observe(lambda instruction, peers: seen.append((*instruction, peers)), lambda: None)
    engine.train_batch(iter([[torch.randn(2, 3, 64, 64), torch.tensor([0, 1])] for _ in range(MICRO_BATCHES)]))
    return seen, sorted(engine.state())


def test_each_pass_is_told_under_its_stage(tmp_path):
    results = run(tmp_path, RANKS, rank)
    for number, (stream, (seen, _)) in enumerate(zip(build("dualpipev", RANKS, MICRO_BATCHES), results, strict=True)):
        whole = [i._replace(name=i.name.replace("Input", "Pass")) for i in stream if i.micro_batch is not None]
        wanted = [tuple(i) for i in whole if i.name != "BackwardWeight"]
        assert [i[:3] for i in seen if "Pass" in i[0]] == wanted
        messages = [i for i in seen if i[0].startswith(("Send", "Recv"))]
        assert {i[3] for i in messages} == {(1 - number,)}
        assert len(messages) == 4 * MICRO_BATCHES, (
            "an activation and a gradient for each of the two cuts between them"
        )
        assert [i[1:] for i in seen if i[0] == "AggregateLoss"] == [(number, None, (0,) if number else ())]
    assert sorted(name for _, names in results for name in names) == sorted(Tiny().state_dict())
