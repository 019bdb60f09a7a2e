"""Every figure says in words what it shows, with its numbers, and a notebook keeps that as alternative text."""

import base64
import inspect
from pathlib import Path

import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib.figure import Figure

from pipetutor import Run
from pipetutor.core.partition import catalog
from pipetutor.costs.table import LayerCost, LayerCosts
from pipetutor.figures import plots, plots_links, plots_plan, plots_timeline
from pipetutor.schedule.orders import build
from pipetutor.schedule.simulate import Costs, simulate
from pipetutor.tracing.trace import Step

RUN = Run(
    directory=Path("here"),
    command="deepspeed",
    stages=2,
    replicas=1,
    losses=[2.3, 2.0, 1.5],
    seconds=[1.0, 0.5, 0.5],
    first_step=1,
    evaluations=[],
    train_batch=8,
    micro_batch=2,
    micro_batches=4,
    bounds=[0, 19, 22],
    layers=[layer.kind for layer in catalog()["alexnet"]],
    status="finished",
    details={"parameters": [layer.parameters for layer in catalog()["alexnet"]]},
)
LAYERS = tuple(LayerCost("Linear", 0.001 * n, 0.001 * n, 0, 0, 10, 10, (), False) for n in (1, 3, 2))
COSTS = LayerCosts("alexnet", 8, 2, 1, LAYERS, 0, 0, 0, 0, 0, 1, 0, Path("here"))
GPIPE, PLAIN = (simulate(build(name, 2, 4), Costs.equal(2)) for name in ("gpipe", "1f1b"))
GPIPE.spans["memory"] = GPIPE.spans["memory"] * 1e6 + 5e6
CERTIFIED = [
    {
        "model": "vgg",
        "stages": 2,
        "micro_batches": 4,
        "replicas": 1,
        "control": control,
        "way": "",
        "gradient": {"relative": value},
    }
    for control, value in ((None, 2e-7), (None, 0.0), ("summed", 3.0))
]

# Every function: how it is called, and words that its description must have.
FIGURES = {
    plots.sample_images: (([(np.zeros((3, 3)), "disc"), (np.zeros((3, 3)), "cross")],), ["2 images", "disc, cross"]),
    plots.losses: (({"two stages": RUN}, 2.303), ["two stages from 2.3 to 1.5", "guessing: 2.3"]),
    plots.stages: ((RUN,), ["stage 0 holds layers 0 to 18, 40.2 million", "Layer 16 alone has 37.8 million"]),
    plots.layer_costs: (
        (COSTS, [0, 2, 3]),
        ["Linear 1, with 6 of 12 ms", "stage 0 takes 8 ms", "stage 1 takes 4 ms"],
    ),
    plots.passes: (
        ([[[0, 2, 4], [1, 3]], [[3, 1, 2], [0, 4]]], 2),
        ["2 passes", "by 2 replicas", "fill no micro-batch: 0 or 1"],
    ),
    plots.layers: ((COSTS, 2), ["Layers 0 to 1 of 3 have 67% of the weights", "67% of the time"]),
    plots.certificate: ((CERTIFIED, 1e-5), ["in 2 pipelines: 2.0e-07", "in 1 that are wrong on purpose: 3.0e+00"]),
    plots_timeline.timelines: (({"1F1B": PLAIN}, "units"), ["1F1B: 15 units, of which a rank waits 20%"]),
    plots_timeline.accounting: (({"1F1B": PLAIN},), ["1F1B, rank 0: 12000 ms of compute"]),
    plots_timeline.memory: (({"GPipe": Step(1, GPIPE, [5_000_000] * 2, [0, 0])},), ["GPipe, rank 1: 4 MB"]),
    plots_timeline.activations: (
        ({"GPipe": {2: 2e6, 8: 8e6}}, {"GPipe": {2: 2.1e6}}),
        ["8 MB with M = 8", "2.1 with 2"],
    ),
    plots_links.step_times: (
        ({"2 stages": {1e7: 2.5, 1e9: 1.5}}, {"2 stages": {1e8: 1.75, float("inf"): 1.25}}),
        ["2.5 s at 10mbit and 1.5 s at 1gbit", "runs 1.75 s at 100mbit, 1.25 s at unlimited"],
    ),
    plots_plan.step_parts: (
        ({"1": {}, "2": {"compute": 2.0, "bubble": 0.5}, "4": {"compute": 2.0, "bubble": 1.5}}, "stages"),
        ["1 does not fit; 2: 2.5 s, of which compute 2, bubble 0.5; 4: 3.5 s", "The shortest: 2."],
    ),
}


def figures():
    """Every public function of the modules that returns a figure."""
    for module in (plots, plots_links, plots_plan, plots_timeline):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and inspect.signature(function).return_annotation is Figure:
                yield pytest.param(function, id=name)


@pytest.mark.parametrize("function", list(figures()))
def test_a_figure_says_what_it_shows(function):
    assert function in FIGURES, f"say in tests/test_descriptions.py how {function.__name__} is called"
    arguments, words = FIGURES[function]
    description = function(*arguments).description
    for said in words:
        assert said in description, f"{said!r} is not in {description!r}"
    assert description[0].isupper() or description[0].isdigit()
    assert description.endswith(".") and "nan" not in description and "\n" not in description


def test_a_notebook_keeps_it_as_alternative_text():
    figure = plots.losses({"two stages": RUN})
    content, about = DisplayFormatter().format(figure)
    assert base64.b64decode(content["image/png"]).startswith(b"\x89PNG")
    assert about["image/png"]["alt"] == figure.description
