"""A model as a list: its weights do not depend on who builds what, and what cannot be cut is refused."""

import itertools
import re
import textwrap

import pytest
import torch
from conftest import SMALL_SGD, run
from torch import nn

from pipetutor.core.config import read_config
from pipetutor.core.crossing import check_model, crossing
from pipetutor.core.deepspeed_engines import Pipeline
from pipetutor.core.model import build_model
from pipetutor.core.tied import Tied, TiedSums
from pipetutor.core.torch_engine import TorchPipeline
from pipetutor.schedule.orders import build
from pipetutor.schedule.rules import placement
from pipetutor.schedule.text import parse

GPT = "gpt:layers=3,width=16"
TOKENS = torch.empty(2, 8, dtype=torch.int64, device="meta")


@pytest.mark.parametrize("name", [GPT, "alexnet", "mobilenet_v3_small"])
def test_a_part_has_the_weights_of_the_whole_and_nothing_else(name):
    whole = build_model(name, 7)
    count = len(whole.layers)
    cuts = [0, 1, count // 2, count]
    for low, high in itertools.pairwise(cuts):
        part = build_model(name, 7, held=[range(low, high)])
        assert part.about() == whole.about() and part.names == whole.names
        assert part.state().keys() == whole.state().keys()
        mine = part.state(low, high)
        torch.testing.assert_close(mine, whole.state(low, high), rtol=0, atol=0)
        rest = [tensor for key, tensor in part.state().items() if key not in mine]
        assert rest and all(tensor.is_meta for tensor in rest)


def test_a_seed_makes_the_weights():
    first, again, other = (build_model(GPT, seed).state() for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    differ = [key for key, tensor in first.items() if not torch.equal(tensor, other[key])]
    assert "embedding.weight" in differ and "2.mlp.1.weight" in differ


def test_no_two_matrices_begin_alike():
    blocks = [tensor for key, tensor in build_model(GPT).state().items() if key.endswith("mlp.1.weight")]
    assert len(blocks) == 3 and not any(torch.equal(*pair) for pair in itertools.combinations(blocks, 2))


@pytest.mark.parametrize("held", [None, [], [range(2)]])
def test_random_numbers_stand_at_the_seed_afterwards(held):
    build_model(GPT, 5, held=held)
    found = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(found, torch.rand(3))


def test_the_list_is_the_module():
    model = build_model(GPT)
    tokens = torch.randint(12, (2, 8), generator=torch.Generator().manual_seed(0))
    x = tokens
    for layer in model.layers:
        x = layer(x)
    assert torch.equal(x, model.whole(tokens)) and x.shape == (2, 8, 12)
    assert model.state().keys() == model.whole.state_dict().keys()
    assert len(set(map(id, model.whole.parameters()))) == len(model.state())


def test_gradients_of_tied_places_are_added_up_apart_and_come_to_the_same():
    tokens = torch.randint(12, (2, 8), generator=torch.Generator().manual_seed(0))
    together, apart = build_model(GPT), build_model(GPT)
    sums = TiedSums(apart.layers)
    for model in (together, apart):
        for _ in range(2):
            model.whole(tokens).square().sum().backward()
    (embedding,) = (layer.module for layer in apart.layers[:1])
    without = embedding.weight.grad.clone()
    sums.add()
    wanted = together.whole.embedding.weight.grad
    torch.testing.assert_close(embedding.weight.grad, wanted)
    assert (without - wanted).abs().max() > 1000 * (embedding.weight.grad - wanted).abs().max()
    sums.add()
    torch.testing.assert_close(embedding.weight.grad, wanted), "nothing is added twice"


def test_the_places_of_a_tied_module_train_one_memory():
    model = build_model(GPT)
    TiedSums(model.layers)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    before = model.whole(tokens)
    with torch.no_grad():
        model.whole.embedding.weight.mul_(2)
    x = model.layers[-2](torch.zeros(1, 8, 16))
    torch.testing.assert_close(model.layers[-1](x), torch.nn.functional.linear(x, model.whole.embedding.weight))
    assert not torch.equal(before, model.whole(tokens))


CONFIG = read_config(SMALL_SGD)
BOUNDS = {1: [0, 7], 2: [0, 3, 7], 4: [0, 2, 3, 5, 7]}


def rank(engine, stages, order=None):
    """Train three steps; return losses, the tied weight where it is held, and what was observed of its gradients."""
    bounds, order = BOUNDS[stages], order or build("1f1b", stages, 2)
    mine = [s for s, holder in enumerate(placement(order)) if holder == torch.distributed.get_rank()]
    model = build_model(GPT, 3, held=[range(bounds[stage], bounds[stage + 1]) for stage in mine])
    if engine == "torch":
        pipe = TorchPipeline(model, order, bounds, CONFIG, TOKENS)
    else:
        pipe = Pipeline(model, stages, ",".join(map(str, bounds)), CONFIG)
    seen = []
    pipe.observe(lambda i, peers: seen.append(tuple(peers)) if i.name == "ReduceTiedGrads" else None, lambda: None)
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.randint(12, (2, 2, 8), generator=generator) for _ in itertools.count())
    losses = [pipe.train_batch(map(list, tokens)).item() for _ in range(3)]
    return losses, pipe.state().get("embedding.weight"), seen


@pytest.mark.parametrize("engine", ["deepspeed", "torch"])
def test_tied_weights_stay_equal_and_losses_do_not_depend_on_the_stages(engine, tmp_path):
    torch.set_num_threads(1)
    found = {stages: run(tmp_path, stages, rank, engine, stages) for stages in BOUNDS}
    losses = [ranks[0][0] for ranks in found.values()]
    assert losses[0] == losses[1] == losses[2] and losses[0][0] != losses[0][-1]
    for stages, ranks in found.items():
        first, last = ranks[0][1], ranks[-1][1]
        assert torch.equal(first, last)
        assert all(weight is None for _, weight, _ in ranks[1:-1])
        assert not torch.equal(first, build_model(GPT, 3).whole.embedding.weight), "it learns"
        if stages > 1:
            assert ranks[0][2] == 3 * [(stages - 1,)] and ranks[-1][2] == 3 * [(0,)]


@pytest.mark.parametrize("split", [False, True])
def test_a_rank_that_holds_both_ends_adds_up_what_is_tied(split, tmp_path):
    """A split backward pass makes gradients of the parameters that it is told of: of both places."""
    torch.set_num_threads(1)
    order = "0F0 3F0 3B0 0B0 0F1 3F1 3B1 0B1 / 1F0 2F0 2B0 1B0 1F1 2F1 2B1 1B1"
    order = parse(re.sub(r"(\d)B(\d)", r"\1I\2 \1W\2", order) if split else order)
    (losses, weight, _), (again, nothing, _) = run(tmp_path, 2, rank, "torch", 4, order)
    ((wanted, embedding, _),) = run(tmp_path, 1, rank, "torch", 1)
    assert losses == again == wanted and torch.equal(weight, embedding) and nothing is None


OWN = """
    import itertools
    import torch
    from functools import partial
    from deepspeed.pipe import LayerSpec, TiedLayerSpec
    from torch import nn
    calls = itertools.count()

    class Biased(nn.Linear):
        pass

    def good(): return [nn.Linear(4, 4), torch.tanh, LayerSpec(nn.Linear, 4, 2)]
    def partly(): return [nn.Linear(4, 2), partial(torch.flatten, start_dim=1)]
    def unbuilt(): return [nn.Linear(4, 4), LayerSpec(nn.Linear, 4)]
    def with_loss(): return nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), nn.MSELoss()
    def number(): return 3
    def empty(): return []
    def classes(): return [nn.Linear(4, 4), nn.ReLU]
    def text(): return [nn.Linear(4, 4), "relu"]
    def misfit(): return [nn.Linear(4, 4), nn.Linear(5, 4)]
    def two(): return [nn.Linear(4, 4), lambda x: (x, x), nn.Linear(4, 2)]
    def whole(): return [nn.Linear(4, 4), lambda x: x.argmax(1), nn.Linear(4, 2)]
    def shared():
        layer = nn.Linear(4, 4)
        return [layer, nn.ReLU(), layer]
    def shared_weight():
        first, last = nn.Linear(4, 4), nn.Linear(4, 4)
        last.weight = first.weight
        return [first, last]
    def lazy(): return [nn.LazyLinear(4)]
    def half_tied(): return [TiedLayerSpec("a", Biased, 4, 4), TiedLayerSpec("a", Biased, 4, 4)]
    def digit(): return [TiedLayerSpec("0", nn.Linear, 4, 4, bias=False)]
    def other_each_time(): return [nn.Linear(4, 3 + next(calls))]
    def bad_loss(): return [nn.Linear(4, 2)], 7
    def long_loss(): return [nn.Linear(4, 2)], nn.CrossEntropyLoss(reduction="none")
    def odd_loss(): return [nn.Linear(4, 2)], nn.BCELoss()
    def sums_up(): return [nn.Linear(4, 2)], nn.CrossEntropyLoss(reduction="sum")
    def two_classes(): return [nn.Linear(4, 2)]
    def asks(): return [nn.Linear(4, 4), lambda x: x if x.sum().item() > 0 else -x, nn.Linear(4, 2)]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of a learner's own, in the working directory."""
    monkeypatch.chdir(tmp_path)
    name = f"own_{abs(hash(tmp_path)):x}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(OWN))
    return name


def test_a_list_of_ones_own_is_a_model(own):
    model = build_model(f"{own}:good")
    assert [tuple(layer) for layer in model.about()] == [("Linear", 20, ""), ("tanh", 0, ""), ("Linear", 10, "")]
    assert list(model.state()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    check_model(model, torch.empty(2, 4), torch.zeros(2, dtype=torch.int64))
    assert build_model(f"{own}:partly").about()[1].kind == "partial"
    model = build_model(f"{own}:with_loss")
    assert isinstance(model.loss_fn, nn.MSELoss) and len(model.layers) == 2


@pytest.mark.parametrize(
    "name, words",
    [
        ("unbuilt", r"layer 1: Linear cannot be built: TypeError: .*out_features"),
        ("number", r"returns a int, and a pipeline cuts a list of layers"),
        ("empty", r"returns an empty list"),
        ("classes", r"layer 1 is the class ReLU, and must be .*; write ReLU\(\.\.\.\)"),
        ("text", r"layer 1 is a str"),
        ("misfit", r"layer 1 \(Linear\) does not take \(2, 4\) float32 of layer 0: RuntimeError"),
        ("two", r"layer 1 \(<lambda>\) gives a tuple, and one tensor passes from layer to layer"),
        ("whole", r"layer 1 \(<lambda>\) gives \(2,\) int64, and no gradient"),
        ("shared", r"layers 0 and 2 share their weight, .*TiedLayerSpec of one key"),
        ("shared_weight", r"layers 0 and 1 share their weight"),
        ("lazy", r"layer 0 \(LazyLinear\) learns the shape of its weight from data"),
        ("half_tied", r"layer 0: Biased has the parameters weight, bias, and tied are weight"),
        ("digit", r"the key '0' of a tied layer must be a name"),
        ("bad_loss", r"the loss must be a module or a function, and is a int"),
        ("long_loss", r"the loss gives \(2,\) float32, and must give one number"),
        ("odd_loss", r"the loss does not take \(2, 2\) float32 of the last layer with labels \(2,\) int64"),
        ("asks", r"layer 1 \(<lambda>\) cannot be tried without numbers.*: make each tensor .* a buffer"),
        ("sums_up", r"the loss is .* for a micro-batch and .* for the same twice: it must be the mean"),
        ("two_classes", r"the loss does not take \(2, 2\) float32 .*: IndexError: Target 2 is out of bounds"),
        ("other_each_time", r"another model each time"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(own, name, words):
    with pytest.raises(ValueError, match=words) as refusal:
        model = build_model(f"{own}:{name}", held=[range(1)])
        check_model(model, torch.empty(2, 4), torch.full((2,), 2 * (name == "two_classes")))
    assert "\n" not in str(refusal.value)


def test_what_crosses_has_the_shapes_of_a_real_pass_and_no_memory():
    model = build_model("mobilenet_v3_small", held=[])
    found = crossing(model, torch.empty(2, 3, 64, 64))
    real, x = build_model("mobilenet_v3_small"), torch.randn(2, 3, 64, 64)
    for layer, tensor in zip(real.layers, found[1:], strict=True):
        x = layer(x)
        assert tensor.is_meta and tensor.shape == x.shape and tensor.dtype == x.dtype


def test_dropout_is_set_for_a_list_as_well():
    model = build_model("gpt:layers=1,dropout=0.3", dropout=0.1)
    assert {module.p for module in model.whole.modules() if isinstance(module, nn.Dropout)} == {0.1}
    assert not any(isinstance(layer, Tied) and layer.key != "embedding" for layer in model.layers)
