"""Recomputing changes nothing but the work: the same weights, running statistics and masks, on both engines."""

import pytest
import torch
from conftest import SMALL_SGD, run

from pipetutor.core.config import read_config
from pipetutor.core.deepspeed_engines import Pipeline
from pipetutor.core.layers import build
from pipetutor.core.model import Model
from pipetutor.core.torch_engine import TorchPipeline
from pipetutor.options import Options
from pipetutor.preflight import World, preflight
from pipetutor.processes.describe import describe
from pipetutor.schedule import orders
from pipetutor.system.gpus import Gpus

STEPS, MICRO_BATCHES, IMAGE, BOUNDS = 2, 2, (3, 64, 64), [0, 6, 19]
STREAMS = orders.build("1f1b", 2, read_config(SMALL_SGD)["train_batch_size"] // 2)
PIPELINE = {"pipe_partitioned": True, "use_reentrant": True}


def micro_batches():
    generator = torch.Generator().manual_seed(0)
    while True:
        yield [torch.randn(2, *IMAGE, generator=generator), torch.randint(10, (2,), generator=generator)]


def rank(name, recompute, dropout):
    """Return the losses, the state at the end, and how often the first layer ran; BatchNorm in both stages."""
    torch.manual_seed(0)
    net, runs = build("mobilenet_v3_small", dropout=dropout), []
    config = read_config(SMALL_SGD)
    if name == "torch":
        pipe = TorchPipeline(Model.of(net), STREAMS, BOUNDS, config, torch.empty(2, *IMAGE, device="meta"), recompute)
    else:
        pipe = Pipeline(Model.of(net), 2, ",".join(map(str, BOUNDS)), config | {"pipeline": PIPELINE}, recompute)
        assert pipe.deepspeed.config["pipeline"] == PIPELINE
    for module in (net.features[0], net.features[6]):
        module.register_forward_hook(lambda *_: runs.append(1))
    data = micro_batches()
    losses = [pipe.train_batch(data).item() for _ in range(STEPS)]
    return losses, {key: value.detach() for key, value in pipe.state().items()}, len(runs)


@pytest.mark.parametrize("name", ["deepspeed", "torch"])
def test_recomputing_changes_no_bit(name, tmp_path):
    """With dropout, whose masks are drawn again: losses, weights and running statistics are equal to the last bit."""
    kept, again = (run(tmp_path, 2, rank, name, recompute, 0.5) for recompute in (False, True))
    without = run(tmp_path, 2, rank, name, False, 0.0)
    assert kept[0][0] != without[0][0], "dropout is on"
    for (losses, state, runs), (losses_again, state_again, runs_again) in zip(kept, again, strict=True):
        assert losses == losses_again
        torch.testing.assert_close(state_again, state, rtol=0, atol=0)
        counts = [value.item() for key, value in state_again.items() if key.endswith("num_batches_tracked")]
        assert counts and set(counts) == {STEPS * MICRO_BATCHES}
        assert (runs, runs_again) == (STEPS * MICRO_BATCHES, 2 * STEPS * MICRO_BATCHES)


def test_deepspeeds_own_recomputing_is_refused():
    config = SMALL_SGD | {"pipeline": {"activation_checkpoint_interval": 1}}
    with pytest.raises(ValueError, match=r"activation_checkpoint_interval.*recompute=True"):
        preflight(Options(config=config), World(2, 2, Gpus(0)), describe("alexnet", "synthetic"))
