"""A cluster and a transformer are what their cards say, and cost what is known of them from elsewhere."""

import math

import pytest
import torch

from pipetutor.core.gpt import gpt
from pipetutor.planner.cluster import CLUSTERS, EXAMPLE, Cluster, Link
from pipetutor.planner.layout import Layout, Placement
from pipetutor.planner.reading import quantity
from pipetutor.planner.transformers import TRANSFORMERS, Transformer


@pytest.mark.parametrize(
    "text, unit, value",
    [
        ("80GB", "B", 80e9),
        ("16 GiB", "B", 16 * 2**30),
        ("512b", "B", 512),
        ("312T", "FLOP/s", 312e12),
        ("1.5PFLOP/s", "FLOP/s", 1.5e15),
        ("25GB/s", "B/s", 25e9),
        ("100mbit", "B/s", 12.5e6),
        ("1Gbit/s", "B/s", 125e6),
        ("5us", "s", 5e-6),
        ("20 ms", "s", 0.02),
        ("0.5", "", 0.5),
    ],
)
def test_a_quantity_is_a_number_and_a_unit(text, unit, value):
    assert quantity(text, unit) == pytest.approx(value, rel=1e-15)


def test_a_card_lies_over_the_one_that_it_names():
    assert Cluster.parse("dgx-a100:hosts=2,efficiency=0.4") == Cluster(
        **CLUSTERS["dgx-a100"] | {"hosts": 2, "efficiency": 0.4}
    )
    found = Cluster.parse(EXAMPLE)
    assert (found.ranks, found.flops, found.link(False), found.link(True)) == (
        16,
        312e12,
        Link(300e9),
        Link(25e9, 5e-6),
    )
    short = Transformer.parse("gpt2-xl:sequence=512")
    assert (short.layers, short.sequence, short.name) == (48, 512, "gpt2-xl:sequence=512")


@pytest.mark.parametrize(
    "parse, text, words",
    [
        (Cluster.parse, "dgx", "unknown cluster 'dgx': try 'dgx-"),
        (Cluster.parse, "dgx-a100:host=3", "has no key 'host'; did you mean hosts?"),
        (Cluster.parse, "hosts=2", "needs devices, memory, as in hosts=2,devices=8"),
        (Cluster.parse, "hosts=2,hosts=3", "hosts is given twice"),
        (Cluster.parse, "dgx-a100:hosts", "'hosts' is no key=value"),
        (Cluster.parse, "dgx-a100:hosts=0", "hosts: '0' must be a whole number of at least 1"),
        (Cluster.parse, "dgx-a100:memory=80", "memory: '80' is no such quantity: 80GB, say"),
        (Cluster.parse, "dgx-a100:between=0GB/s", "bandwidth is 0.0: use a number above 0"),
        (Cluster.parse, "dgx-a100:efficiency=2", "efficiency is 2.0: use a share of at most 1"),
        (Cluster.parse, "dgx-a100:flops=0T", "flops is 0.0: use a number above 0"),
        (Transformer.parse, "gpt4", "unknown model 'gpt4': try 'gpt"),
        (Transformer.parse, "layers=2", "needs width, heads, sequence, vocabulary, as in layers=24"),
        (Transformer.parse, "gpt2-xl:heads=3", "width 1600 is no multiple of heads 3"),
    ],
)
def test_a_card_that_makes_no_sense_is_refused_in_one_line(parse, text, words):
    with pytest.raises(ValueError) as refused:
        parse(text)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_what_a_cluster_does_not_say_is_asked_for_where_it_matters():
    bare = Cluster.parse("hosts=2,devices=2,memory=4GB")
    for ask, words in (
        (lambda: bare.link(False), "inside"),
        (lambda: bare.link(True), "between"),
        (lambda: bare.seconds(1), "flops"),
    ):
        with pytest.raises(ValueError, match=f"cluster: {words} is not given"):
            ask()


def test_a_ring_sends_parts_from_neighbour_to_neighbour():
    """Played: in each of 2(R-1) rounds every rank sends one part of R to the next."""
    link, ranks, size = Link(1e9, 1e-3), 5, 10e9
    assert link.ring(ranks, size) == pytest.approx(sum(link.seconds(size / ranks) for _ in range(2 * (ranks - 1))))
    assert link.ring(1, size) == 0


PLACED = [(p, d, places) for p in range(1, 7) for d in range(1, 9) for places in (1, 2, 3, 4, 8)]


@pytest.mark.parametrize("stages, replicas, places", PLACED)
def test_ranks_lie_where_counting_them_out_puts_them(stages, replicas, places):
    hosts = {}
    for number in range(stages * replicas):  # host by host, the replicas of a stage side by side
        hosts[divmod(number, replicas)] = number // places
    placed = Placement(stages, replicas, places)
    wanted = [tuple(hosts[s, r] != hosts[(s + 1) % stages, r] for s in range(stages)) for r in range(replicas)]
    assert [placed.crossings(replica) for replica in range(replicas)] == wanted
    assert set(placed.kinds) == set(wanted) and len(placed.kinds) == len(set(wanted))
    for stage in range(stages):
        assert placed.ring_crosses(stage) == (len({hosts[stage, r] for r in range(replicas)}) > 1)


def test_the_devices_of_a_layer_take_up_places():
    layout = Layout(stages=2, replicas=4, tensor=2, micro_batch=1, micro_batches=4)
    assert Placement.of(layout, Cluster.parse("dgx-a100")) == Placement(2, 4, 4)


@pytest.mark.parametrize("name", ["gpt2-small", "gpt2-medium", "layers=3,width=24,heads=2,sequence=7,vocabulary=11"])
def test_parameters_are_those_of_the_model_as_torch_builds_it(name):
    model = Transformer.parse(name)
    specs = gpt(model.layers, model.width, model.heads, model.vocabulary, model.sequence)
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in spec.build().parameters()) for spec in specs]
    assert model.parameters == sum(sizes[:-1])  # the head is the embedding once more
    assert sizes[2] == model.block_parameters and sizes[0] + sizes[1] == model.first_parameters
    assert sizes[-2] + sizes[-1] == model.last_parameters


PUBLISHED = {"gpt2-small": 0.124, "gpt2-medium": 0.355, "gpt2-large": 0.774, "gpt2-xl": 1.558, "gpt3-175b": 174.6}
PUBLISHED |= {"megatron-1.7b": 1.7, "megatron-3.6b": 3.6, "megatron-7.5b": 7.5, "megatron-18b": 18.4}
PUBLISHED |= {"megatron-39b": 39.1, "megatron-76b": 76.1, "megatron-145b": 145.6, "megatron-310b": 310.1}
PUBLISHED |= {"megatron-530b": 529.6, "megatron-1t": 1008.0}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_parameters_are_as_published(name):
    assert Transformer.parse(name).parameters / 1e9 == pytest.approx(
        PUBLISHED[name], abs=0.06 if PUBLISHED[name] > 1.6 else 6e-4
    )


def test_flops_are_eq_3_and_what_torch_multiplies():
    """96 B s l h² (1 + s/6h + V/16lh), and without recomputing what torch counts on a block and a head."""
    model = Transformer.parse("megatron-1t")
    blocks, h, s, v = model.layers, model.width, model.sequence, model.vocabulary
    wanted = 96 * 3072 * s * blocks * h**2 * (1 + s / (6 * h) + v / (16 * blocks * h))
    assert model.step_flops(3072, recompute=True) == pytest.approx(wanted)
    small = Transformer.parse("layers=2,width=32,heads=4,sequence=16,vocabulary=50")
    from torch.utils.flop_counter import FlopCounterMode

    layers = [spec.build() for spec in gpt(2, 32, 4, 50, 16)[:-1]]
    with FlopCounterMode(display=False) as counter:
        x = torch.randint(50, (3, 16))
        for layer in layers:
            x = layer(x)
        (x @ layers[0].weight.T).sum().backward()
    # The product with the embedding's gradient needs none further back; torch's fused attention multiplies its scores
    # once more on the way back, and a causal one counts as whole.
    again = 2 * 2 * 3 * 16**2 * 32
    assert counter.get_total_flops() in (
        small.step_flops(3, recompute=False),
        small.step_flops(3, recompute=False) + again,
    )


def test_activations_are_eq_2_of_the_paper():
    """s b h (34 + 5 a s / h) on one device; on T, all but ten bytes of a number are shared out."""
    model = Transformer.parse("gpt3-175b")
    each = model.sequence * model.width
    assert model.block_bytes(2) == pytest.approx(2 * each * (34 + 5 * 96 * 2048 / 12288))
    assert model.block_bytes(1, 8) == pytest.approx(each * (10 + 24 / 8 + 5 * 96 * 2048 / (12288 * 8)))
    assert math.isclose(model.last_bytes(1), 4 * each * (1 + 50257 / 12288))
