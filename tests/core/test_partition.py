"""Bounds: ours are DeepSpeed's, for every model, method and number of stages."""

import itertools

import pytest

from pipetutor.core.partition import balanced, bounds_for, catalog, uniform

MODELS = ["alexnet", "vgg11", "vgg16_bn", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stages", range(1, 9))
def test_bounds_are_deepspeeds(model, stages):
    from deepspeed.runtime import utils

    weights = [layer.parameters for layer in catalog()[model]]
    assert uniform(len(weights), stages) == utils.partition_uniform(len(weights), stages)
    assert balanced(weights, stages) == [int(b) for b in utils.partition_balanced(weights, stages)]


def test_every_method():
    alexnet = catalog()["alexnet"]
    assert bounds_for(alexnet, 2, "parameters") == [0, 19, 22]
    assert bounds_for(alexnet, 2, "uniform") == [0, 11, 22]
    assert bounds_for(alexnet, 2, "0,16,22") == bounds_for(alexnet, 2, " 0, 16 ,22") == [0, 16, 22]
    assert bounds_for(alexnet, 2, "type:conv|linear") == bounds_for(alexnet, 2, "type:CONV|LINEAR")
    assert bounds_for(alexnet, 1, "parameters") == [0, 22]
    with pytest.raises(ValueError, match=r"'profile' needs measured costs: pipetutor\.costs\.profile\.choose"):
        bounds_for(alexnet, 2, "profile")


@pytest.mark.parametrize("model", MODELS)
def test_no_stage_is_without_weights(model):
    layers = catalog()[model]
    for stages in range(1, 5):
        for method in ("parameters", "uniform"):
            try:
                bounds = bounds_for(layers, stages, method)
            except ValueError as error:
                assert "weights" in str(error)
                continue
            for low, high in itertools.pairwise(bounds):
                assert any(layer.parameters for layer in layers[low:high])
