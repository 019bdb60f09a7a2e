"""A small decoder in the manner of GPT-2, as a list of layers that a pipeline cuts.

Nothing is built here: each entry says what to build, and a rank builds those of its own stage. One matrix stands at
both ends: it turns tokens into vectors on the first stage and vectors into scores of tokens on the last.
"""

from typing import Any

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

from pipetutor.core.gpt_sizes import gpt_sizes
from pipetutor.data.sums import ALPHABET, LENGTH

__all__ = ["Attention", "Block", "gpt", "head"]

STD = 0.02  # of initial weights, as in GPT-2


class Embedding(nn.Embedding):
    """From tokens (N, T) to vectors (N, T, width)."""

    def reset_parameters(self) -> None:
        """Draw the vectors as GPT-2 does."""
        nn.init.normal_(self.weight, std=STD)


class Positions(nn.Module):
    """Adds to each vector one that is learned for its place; inputs may be shorter than ``length``."""

    def __init__(self, length: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, width))
        nn.init.normal_(self.weight, std=STD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, T, width) for (N, T, width)."""
        return x + self.weight[: x.shape[1]]


def _linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    """Return a linear layer with weights of a given spread, and no bias at first."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Each place mixes in what it finds at itself and at earlier places, by as many patterns as there are heads."""

    def __init__(self, width: int, heads: int, std: float):
        super().__init__()
        self.heads = heads
        self.queries_keys_values = _linear(width, 3 * width, STD)
        self.out = _linear(width, width, std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, T, width) for (N, T, width)."""
        # (N, T, 3, heads, width of a head) becomes three of (N, heads, T, width of a head).
        split = self.queries_keys_values(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = split.unbind()
        mixed = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention and an MLP, each normalised ahead and added to what came in.

    Args:
        width: of the vectors.
        heads: of the attention.
        layers: blocks in the whole decoder: the more add up, the less each adds at first.
        dropout: probability, on what either part adds.
    """

    def __init__(self, width: int, heads: int, layers: int, dropout: float):
        super().__init__()
        std = STD / (2 * layers) ** 0.5
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads, std), nn.Dropout(dropout))
        self.mlp = nn.Sequential(
            *(nn.LayerNorm(width), _linear(width, 4 * width, STD), nn.GELU()),
            *(_linear(4 * width, width, std), nn.Dropout(dropout)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, T, width) for (N, T, width)."""
        x = x + self.attention(x)
        return x + self.mlp(x)


def head(embedding: Embedding, x: torch.Tensor) -> torch.Tensor:
    """Return how well each token of the vocabulary would come next: logits (N, T, vocabulary) for (N, T, width)."""
    return linear(x, embedding.weight)


def gpt(
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    vocabulary: int = len(ALPHABET),
    length: int = LENGTH,
    dropout: float = 0.0,
) -> list[Any]:
    """Return a decoder as the list ``[embedding, positions, *blocks, norm, head]``; embedding and head are tied.

    Args:
        layers: number of blocks.
        width: of the vectors that one layer sends to the next; a multiple of ``heads``.
        heads: of each attention.
        vocabulary: number of tokens.
        length: the longest input, in tokens.
        dropout: probability in each block.

    Returns:
        What to build, ``layers`` + 4 entries; together they make logits (N, T, vocabulary) of tokens (N, T).

    Raises:
        ValueError: a size is none; see ``gpt_sizes``.

    >>> len(gpt(layers=2))
    6
    """
    gpt_sizes(layers, width, heads, vocabulary, length, dropout)
    tied = ("embedding", Embedding, vocabulary, width)
    return [
        TiedLayerSpec(*tied, tied_weight_attr="weight"),
        LayerSpec(Positions, length, width),
        *[LayerSpec(Block, width, heads, layers, dropout) for _ in range(layers)],
        LayerSpec(nn.LayerNorm, width),
        TiedLayerSpec(*tied, forward_fn=head, tied_weight_attr="weight"),
    ]
