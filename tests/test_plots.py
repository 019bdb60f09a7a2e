"""Figures show what the run recorded, as pictures that a notebook displays."""

from pathlib import Path

import numpy as np
import pytest

from pipetutor import Run, plots
from pipetutor.partition import catalog


@pytest.fixture
def run():
    return Run(
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
        parts=[0, 19, 22],
        layers=[layer.kind for layer in catalog()["alexnet"]],
        status="finished",
        details={"model": "alexnet"},
    )


def test_losses(run):
    figure = plots.losses({"one": run, "other": run}, chance=2.3)
    axes = figure.axes[0]
    assert [list(line.get_ydata()) for line in axes.lines[:2]] == [run.losses] * 2
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_stages(run):
    axes = plots.stages(run).axes[0]
    words = [text.get_text() for text in axes.texts]
    assert words == ["stage 0\n40.2 M", "stage 1\n16.8 M"]
    assert len(axes.patches) == 22 + 2 and axes.get_xticklabels()[16].get_text() == "Linear 16"


def test_sample_images():
    figure = plots.sample_images([(np.zeros((32, 32, 3), dtype=np.uint8), "disc")] * 11)
    assert [a.get_title() for a in figure.axes].count("disc") == 11


def test_rate_leaves_the_first_step_out(run):
    assert run.samples_per_second == 16
