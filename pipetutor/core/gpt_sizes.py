"""What is known of a gpt before any of it is built: its layers and how many parameters each has. No torch.

Width d, vocabulary V, inputs of up to T tokens:

    Embedding      V d             a row a token
    Positions      T d             a row a place
    Block          12 d² + 13 d    weights:  queries, keys and values 3 d², out of the attention d²,
                                             into the MLP 4 d², out of it 4 d²
                                   biases:   3 d + d + 4 d + d
                                   norms:    two of 2 d
    ...
    LayerNorm      2 d             a factor and a bias for each feature
    Embedding      V d             the same matrix once more: a last stage of its own holds a copy
"""

from pipetutor.core.partition import Layer
from pipetutor.data.sums import ALPHABET, LENGTH
from pipetutor.system.kinds import check

__all__ = ["gpt_sizes"]


def gpt_sizes(
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    vocabulary: int = len(ALPHABET),
    length: int = LENGTH,
    dropout: float = 0.0,
) -> list[Layer]:
    """Return the class name and the number of parameters of each layer of ``gpt`` with the same arguments.

    Raises:
        ValueError: one of them is no size that a gpt can have.

    >>> sum(layer.parameters for layer in gpt_sizes(layers=2, width=64)[:-1])  # the tied matrix once
    101376
    """
    sizes = {"layers": layers, "width": width, "heads": heads, "vocabulary": vocabulary, "length": length}
    for name, value in sizes.items():
        check(name, value, "count", "gpt: ")
    check("dropout", dropout, "share", "gpt: ")
    if width % heads:
        raise ValueError(f"gpt: width {width} is no multiple of heads {heads}: {width + -width % heads} is, say")
    embedding = Layer("Embedding", vocabulary * width, "embedding")
    block = Layer("Block", 12 * width**2 + 13 * width)
    return [
        embedding,
        Layer("Positions", length * width),
        *[block] * layers,
        Layer("LayerNorm", 2 * width),
        embedding,
    ]
