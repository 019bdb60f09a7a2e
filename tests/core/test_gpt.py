"""The decoder: what each layer is, that no place sees a later one, and that both ends share a matrix."""

import inspect
import math

import pytest
import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import nn

from pipetutor.core.description import known_layers
from pipetutor.core.gpt import STD, Attention, Block, Embedding, gpt
from pipetutor.core.gpt_sizes import gpt_sizes
from pipetutor.core.model import build_model
from pipetutor.data.sums import ALPHABET, LENGTH


def built(**sizes) -> list[nn.Module]:
    """Return each layer as a module; the last is the first."""
    torch.manual_seed(1)
    first, *middle, _ = gpt(**sizes)
    embedding = first.build()
    return [embedding, *[spec.build() for spec in middle], embedding]


def logits(layers: list[nn.Module], tokens: torch.Tensor) -> torch.Tensor:
    for layer in layers[:-1]:
        tokens = layer(tokens)
    return gpt()[-1].forward_fn(layers[-1], tokens)


def random_tokens(count: int = 3, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(len(ALPHABET), (count, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "sizes",
    [{}, dict(layers=1, width=6, heads=3), dict(layers=3, width=40, heads=1, vocabulary=50, length=30, dropout=0.1)],
)
def test_the_closed_form_is_what_the_modules_have(sizes):
    layers = built(**sizes)
    name = "gpt:" + ",".join(f"{key}={value}" for key, value in sizes.items()) if sizes else "gpt"
    assert gpt_sizes(**sizes) == build_model(name).about() == list(known_layers(name))
    assert [layer.kind for layer in gpt_sizes(**sizes)[-2:]] == ["LayerNorm", "Embedding"]
    distinct = sum(parameter.numel() for parameter in nn.ModuleList(layers).parameters())
    assert distinct == sum(layer.parameters for layer in gpt_sizes(**sizes)[:-1])


def test_both_functions_take_the_same_sizes():
    assert inspect.signature(gpt).parameters == inspect.signature(gpt_sizes).parameters


def test_nothing_is_built_before_a_rank_asks():
    specs = gpt(layers=100, width=2**20, vocabulary=10**9)
    assert len(specs) == 104 and all(isinstance(spec, LayerSpec) for spec in specs)
    ends = [index for index, spec in enumerate(specs) if isinstance(spec, TiedLayerSpec)]
    assert ends == [0, 103] and {specs[end].key for end in ends} == {"embedding"}
    assert all(specs[end].tied_weight_attr == ["weight"] for end in ends)


def test_logits_have_the_shape_of_tokens_and_vocabulary():
    layers = built(vocabulary=20)
    assert logits(layers, random_tokens()).shape == (3, LENGTH, 20)
    assert logits(layers, random_tokens(1, 3)).shape == (1, 3, 20)


def test_a_later_token_changes_no_earlier_logits():
    layers, tokens = built(), random_tokens()
    before = logits(layers, tokens)
    for place in range(LENGTH):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % len(ALPHABET)
        after = logits(layers, changed)
        assert torch.equal(after[:, :place], before[:, :place])
        # and every later place sees it
        assert ((after[:, place:] - before[:, place:]).abs().amax((0, 2)) > 1e-6).all()


def test_without_its_mask_an_earlier_place_would_see_a_later_one(monkeypatch):
    from pipetutor.core import gpt as module

    masked = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(module, "scaled_dot_product_attention", lambda q, k, v, is_causal: masked(q, k, v))
    with pytest.raises(AssertionError):
        test_a_later_token_changes_no_earlier_logits()


def test_attention_is_torchs_own():
    width, heads = 24, 3
    torch.manual_seed(3)
    ours, theirs = Attention(width, heads, STD), nn.MultiheadAttention(width, heads, batch_first=True)
    theirs.in_proj_weight, theirs.in_proj_bias = ours.queries_keys_values.weight, ours.queries_keys_values.bias
    theirs.out_proj = ours.out
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, LENGTH, width)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    wanted, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(ours(x), wanted)


def test_the_head_is_the_embedding_and_both_ends_teach_it():
    layers = built()
    x = torch.randn(2, LENGTH, 128)
    assert torch.allclose(gpt()[-1].forward_fn(layers[0], x), x @ layers[0].weight.T)
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64)
    logits(layers, tokens).logsumexp(-1).sum().backward()
    # Token 0 alone is read, by the embedding; the head has a gradient for each token.
    assert (layers[0].weight.grad.abs().sum(1) > 0).all()
    layers[0].weight.grad = None
    layers[0](tokens).square().sum().backward()
    assert (layers[0].weight.grad.abs().sum(1) > 0).tolist() == [True] + [False] * (len(ALPHABET) - 1)


def test_weights_begin_as_in_gpt_2():
    layers = built(layers=8, width=128)
    into_the_stream = STD / math.sqrt(2 * 8)
    for block in (layer for layer in layers if isinstance(layer, Block)):
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        spreads = [linear.weight.std().item() for linear in linears]
        assert spreads == pytest.approx([STD, into_the_stream, STD, into_the_stream], rel=0.05)
        assert all((linear.bias == 0).all() for linear in linears)
    assert isinstance(layers[0], Embedding) and layers[0].weight.std().item() == pytest.approx(STD, rel=0.1)
    assert layers[1].weight.std().item() == pytest.approx(STD, rel=0.1)


def test_dropout_stands_where_each_part_is_added():
    block = built(dropout=0.25)[2]
    drops = [module for module in block.modules() if isinstance(module, nn.Dropout)]
    assert drops == [block.attention[-1], block.mlp[-1]] and {drop.p for drop in drops} == {0.25}


@pytest.mark.parametrize(
    "sizes, said",
    [
        (dict(layers=0), "gpt: layers is 0, but must be a whole number of at least 1: 2, say"),
        (dict(width=0), "gpt: width is 0, but must be"),
        (dict(heads=-1), "gpt: heads is -1, but must be"),
        (dict(vocabulary=1.5), "gpt: vocabulary is 1.5, but must be"),
        (dict(length="8"), "gpt: length is '8', but must be"),
        (dict(dropout=1), "gpt: dropout is 1, but must be a number from 0 and below 1"),
        (dict(width=130), "gpt: width 130 is no multiple of heads 4: 132 is, say"),
        (dict(width=2), "gpt: width 2 is no multiple of heads 4: 4 is, say"),
    ],
)
@pytest.mark.parametrize("function", [gpt, gpt_sizes])
def test_what_is_no_size_is_told_in_one_line(function, sizes, said):
    with pytest.raises(ValueError) as caught:
        function(**sizes)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
