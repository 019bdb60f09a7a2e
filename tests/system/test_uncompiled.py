"""A rank starts without torch's compiler, and whoever wants the compiler finds it."""

import subprocess
import sys

import pytest
from conftest import HANGS, SMALL, in_ranks

from pipetutor import launch


def code(text: str) -> str:
    """Run this in a process of its own, and return what it prints."""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "stages, replicas, optimizer, zero, save, loaded",
    [
        (2, 1, "AdamW", 0, 1, "sympy"),  # torch's checkpoints have symbolic shapes in their way
        (0, 2, "SGD", 0, None, ""),
        (0, 2, "AdamW", 1, None, ""),
    ],
)
def test_a_rank_trains_without_the_compiler(runs, monkeypatch, stages, replicas, optimizer, zero, save, loaded):
    """Each says at its end which parts of the compiler it has loaded."""
    in_ranks(
        runs.parent,
        monkeypatch,
        """
        import atexit, sys
        from pathlib import Path
        def note():
            loaded = {"sympy", "torch._inductor"} & sys.modules.keys()
            Path(f"loaded_by_rank{os.environ['RANK']}").write_text(" ".join(sorted(loaded)))
        atexit.register(note)
        """,
    )
    config = SMALL | {"optimizer": {"type": optimizer, "params": {"lr": 0.01}}, "zero_optimization": {"stage": zero}}
    common = dict(model="mobilenet_v3_small", eval_every=2, save_every=save, config=config, runs_dir=runs)
    run = launch(stages, replicas, steps=2, **common)
    assert len(run.losses) == 2
    assert [(runs.parent / f"loaded_by_rank{rank}").read_text() for rank in (0, 1)] == [loaded, loaded]


def test_the_compiler_comes_when_it_is_wanted():
    said = code(
        """
        import sys
        from pipetutor.system.uncompiled import torchvision
        import torch
        before = "sympy" in sys.modules
        parameter = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW([parameter], lr=0.5)
        (2 * parameter).backward(torch.ones(2))
        optimizer.step()
        still = "sympy" in sys.modules
        double = torch.compile(lambda x: 2 * x, backend="eager")
        print(before, still, parameter.tolist(), double(torch.ones(2)).tolist(), torch._dynamo.__file__ is not None)
        from torch.fx.experimental.symbolic_shapes import ShapeEnv
        optimizer.step()
    """.replace("\n        ", "\n")
    )
    assert said.split(" ", 2)[:2] == ["False", "False"]
    assert said.endswith("[2.0, 2.0] True\n")


@pytest.mark.parametrize(
    "wanted",
    [
        "from torch._dynamo import config as it",
        "import torch._dynamo.utils; from torch._dynamo.utils import counters as it",
        "from torch.fx.experimental.symbolic_shapes import ShapeEnv as it",
        "import torch; it = torch._dynamo.optimize",
        "from torchvision.ops.roi_align import is_compile_supported; it = is_compile_supported('cpu')",
    ],
)
def test_every_way_to_it_leads_to_the_real_modules(wanted):
    assert code(f"from pipetutor.system.uncompiled import torchvision\n{wanted}\nprint(it is not None)") == "True\n"


def test_one_that_is_loaded_already_stays():
    said = code("""
import torch._dynamo, torch.fx.experimental.symbolic_shapes, sys
before = sys.modules["torch._dynamo"], sys.modules["torch.fx.experimental.symbolic_shapes"]
import pipetutor.system.uncompiled
print(before == (sys.modules["torch._dynamo"], sys.modules["torch.fx.experimental.symbolic_shapes"]))
""")
    assert said == "True\n"
