"""Gradients that are added up in place are those that autograd adds up, and need no memory of their own."""

import pytest
import torch
from conftest import FAST_SGD, SMALL, SMALL_SGD, TWICE_AS_FAST, equal_but_for_rounding, train
from torch import nn

from pipetutor.core import accumulate
from pipetutor.core.accumulate import accumulate_in_place

TINY = ["--model", "tiny", "--dropout", 0]


def twins(*shape):
    torch.manual_seed(1)
    stock = nn.Sequential(nn.Linear(shape[-1], 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 3, bias=False)))
    ours = nn.Sequential(nn.Linear(shape[-1], 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 3, bias=False)))
    ours.load_state_dict(stock.state_dict())
    accumulate_in_place([ours])
    return stock, ours


@pytest.mark.parametrize("shape", [(8, 5), (2, 4, 5)])
def test_three_micro_batches_give_the_gradients_of_autograd(shape):
    stock, ours = twins(*shape)
    assert [type(m).__name__ for m in ours.modules()] == [type(m).__name__ for m in stock.modules()]
    inputs = []
    for number in range(3):
        torch.manual_seed(number)
        values = torch.randn(*shape)
        for net in (stock, ours):
            x = values.clone().requires_grad_()
            net(x).square().sum().backward()
            inputs.append(x.grad)
    for ours_input, stock_input in zip(inputs[1::2], inputs[::2], strict=True):
        torch.testing.assert_close(ours_input, stock_input)
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_the_sum_stays_where_it_is_and_no_second_one_is_made():
    _, ours = twins(8, 5)
    ours(torch.randn(8, 5)).sum().backward()
    places = [p.grad.data_ptr() for p in ours.parameters()]
    handed_over = []
    for parameter in (ours[0].weight, ours[2][0].weight):
        parameter.register_hook(handed_over.append)
    ours(torch.randn(8, 5)).sum().backward()
    assert [p.grad.data_ptr() for p in ours.parameters()] == places
    assert not [g for g in handed_over if g is not None], "autograd made a gradient"


def test_frozen_parameters_and_subclasses_are_left_alone():
    class Special(nn.Linear):
        pass

    special = Special(5, 6)
    _, ours = twins(8, 5)
    ours[0].weight.requires_grad_(False)
    accumulate_in_place([special])
    assert type(special) is Special
    for _ in range(2):
        ours(torch.randn(8, 5)).sum().backward()
    assert ours[0].weight.grad is None and ours[0].bias.grad is not None


def test_under_autocast_gradients_are_those_of_autograd():
    """Products of 16 bits, a sum of 32: nothing is added up in place, and the bits are the same."""
    stock, ours = twins(8, 5)
    for number in range(2):
        torch.manual_seed(number)
        values = torch.randn(8, 5)
        for net in (stock, ours):
            with torch.autocast("cpu", torch.bfloat16):
                loss = net(values).square().sum()
            loss.backward()
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=name)


def test_two_stages_train_under_autocast(tmp_path):
    """As stock layers do, to the last bit; the first loss is that of fp32 within torch's bound for bf16."""
    arguments, common = [*TINY, "-s", 2], {"stages": 2}
    config = SMALL_SGD | {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    ours = train(tmp_path / "ours", *arguments, **common, config=config)
    stock = train(tmp_path / "stock", *arguments, **common, config=config, patch=stock_layers)
    exact = train(tmp_path / "fp32", *arguments, **common, config=SMALL_SGD)
    assert ours.losses == stock.losses != exact.losses
    assert ours.losses[0] == pytest.approx(exact.losses[0], rel=1.6e-2)


def said_which(directory):
    return [(directory / f"rank{rank}.txt").read_text().count("in place: True") for rank in (0, 1)]


def say_whether():
    from pipetutor.core import deepspeed_engines

    build = deepspeed_engines._DeepSpeed.__init__

    def told(self, net, *rest):
        found = any(isinstance(m, accumulate.Linear) for m in net.modules())
        print("in place:", found, flush=True)
        build(self, net, *rest)

    deepspeed_engines._DeepSpeed.__init__ = told


@pytest.mark.parametrize(
    "given, expected",
    [({}, [0, 1]), ({"zero_optimization": {"stage": 1}}, [0, 0]), ({"bf16": {"enabled": True}}, [0, 0])],
)
def test_who_needs_each_gradient_gets_it_from_autograd(given, expected, tmp_path):
    """ZeRO and bf16 take each gradient into a buffer of their own; stage 0 has no linear layer here."""
    config = SMALL | {"optimizer": {"type": "Adam", "params": {"lr": 1e-4}}} | given
    train(tmp_path, *TINY, "-s", 1, "--partition", "0,7,14", stages=2, config=config, patch=say_whether)
    assert said_which(tmp_path) == expected


def stock_layers():
    from pipetutor.core import deepspeed_engines

    deepspeed_engines.accumulate_in_place = lambda layers: None


def test_the_losses_are_those_of_stock_layers(tmp_path):
    """But for the rounding of a product that is added at once; the mistake beside it is a gradient twice as large."""
    arguments, batch = [*TINY, "-s", 3], {"train_batch_size": 8}
    ours = train(tmp_path / "ours", *arguments, stages=2, config=FAST_SGD | batch)
    stock = train(tmp_path / "stock", *arguments, stages=2, config=FAST_SGD | batch, patch=stock_layers)
    twice = train(tmp_path / "twice", *arguments, stages=2, config=TWICE_AS_FAST | batch)
    equal_but_for_rounding(ours.losses, stock.losses, twice.losses)
