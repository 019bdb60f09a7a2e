"""Known transformers, and what they take, in closed forms: parameters, FLOPs, bytes.

A decoder in the manner of GPT-2, with L blocks, width h, a heads, inputs of s tokens, vocabulary V, and micro-batches
of b examples. Its flat list of layers is that of ``pipetutor.core.gpt``: embedding, positions, blocks, norm, head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipetutor.core.gpt_sizes import gpt_sizes
from pipetutor.core.partition import parameters_of
from pipetutor.planner.reading import read, whole_number
from pipetutor.system.kinds import shown

__all__ = ["TRANSFORMERS", "Transformer"]

EXAMPLE = "layers=24,width=2304,heads=24,sequence=2048,vocabulary=51200"
HALF = 2  # bytes of a number in 16 bits, as activations and messages are


@dataclass(frozen=True)
class Transformer:
    """A decoder.

    Attributes:
        layers: blocks L.
        width: of the vectors between them, h.
        heads: of each attention, a.
        sequence: tokens of an example, s.
        vocabulary: V.
        name: what it is called.

    Raises:
        ValueError: it has none of these sizes.

    >>> Transformer.parse("gpt2-small").parameters
    124439808
    """

    layers: int
    width: int
    heads: int
    sequence: int
    vocabulary: int
    name: str = "a transformer"

    def __post_init__(self) -> None:
        gpt_sizes(self.layers, self.width, self.heads, self.vocabulary, self.sequence)

    @classmethod
    def parse(cls, text: str) -> "Transformer":
        """Read a transformer: one of ``TRANSFORMERS``, ``gpt2-xl:sequence=512``, or as ``EXAMPLE``.

        Raises:
            ValueError: it is none; the message says what is wrong.
        """
        _, values = read(text, "model", TRANSFORMERS, KEYS, EXAMPLE)
        missing = [key for key in KEYS if key not in values]
        if missing:
            raise ValueError(f"model {shown(text)} needs {', '.join(missing)}, as in {EXAMPLE}")
        return cls(**values, name=text)

    @cached_property
    def block_parameters(self) -> int:
        """Of one block: 12 h² + 13 h."""
        return gpt_sizes(1, self.width, self.heads, self.vocabulary, self.sequence)[2].parameters

    @cached_property
    def first_parameters(self) -> int:
        """Of what stands ahead of the blocks: (V + s) h."""
        return (self.vocabulary + self.sequence) * self.width

    @cached_property
    def last_parameters(self) -> int:
        """Of what stands behind them, on a rank that does not hold the embedding as well: the norm's and V h."""
        return 2 * self.width + self.vocabulary * self.width

    @cached_property
    def parameters(self) -> int:
        """Of the model: 12 L h² + 13 L h + (V + s) h, as in arXiv:2104.04473, eq. 2, and the last norm's 2 h."""
        return parameters_of(gpt_sizes(self.layers, self.width, self.heads, self.vocabulary, self.sequence))

    def product_flops(self, examples: int) -> int:
        """FLOPs forward of a block's products with weights: 24 b s h²; twice that backward, a half for each."""
        return 24 * examples * self.sequence * self.width**2

    def attention_flops(self, examples: int) -> int:
        """FLOPs forward of a block's products without weights, scores and mixtures: 4 b s² h; backward twice."""
        return 4 * examples * self.sequence**2 * self.width

    def head_flops(self, examples: int) -> int:
        """FLOPs forward of the head: 2 b s h V; twice that backward, a half for each."""
        return 2 * examples * self.sequence * self.width * self.vocabulary

    def step_flops(self, examples: int, *, recompute: bool) -> int:
        """FLOPs of the matrix products of a step, as in arXiv:2104.04473, eq. 3, which counts recomputing.

        Args:
            examples: in the global batch B.
            recompute: whether each block computes its forward pass once more.

        >>> gpt3 = Transformer.parse("gpt3-175b")
        >>> round(gpt3.step_flops(1536, recompute=True) / 96 / 1536 / 2048 / 96 / 12288**2, 3)
        1.03
        """
        blocks = self.layers * (self.product_flops(examples) + self.attention_flops(examples))
        return (3 + recompute) * blocks + 3 * self.head_flops(examples)

    def output_bytes(self, examples: int) -> int:
        """Bytes of what a block hands on, and so of a message at a cut: 2 b s h."""
        return HALF * examples * self.sequence * self.width

    def block_bytes(self, examples: int, tensor: int = 1) -> float:
        """Bytes of activations that a block keeps on each of T devices, as in arXiv:2205.05198, eq. 2.

        Args:
            examples: in the micro-batch b.
            tensor: devices T that share the block.

        >>> small = Transformer.parse("gpt2-small")
        >>> small.block_bytes(1) / (1024 * 768)  # 34 + 5 a s / h
        114.0
        """
        each = 10 + 24 / tensor + 5 * self.heads * self.sequence / (self.width * tensor)
        return examples * self.sequence * self.width * each

    def first_bytes(self, examples: int) -> float:
        """Bytes that the embedding keeps, the mask of its dropout: b s h (arXiv:2205.05198, section 4.3)."""
        return float(examples * self.sequence * self.width)

    def last_bytes(self, examples: int, tensor: int = 1) -> float:
        """Bytes that norm, head and loss keep: 4 b s h (1 + V / (h T)) (arXiv:2205.05198, section 4.3)."""
        return 4.0 * examples * self.sequence * (self.width + self.vocabulary / tensor)


KEYS: dict[str, Callable[[str], Any]] = dict.fromkeys(
    ("layers", "width", "heads", "sequence", "vocabulary"), whole_number
)


def _gpt(layers: int, width: int, heads: int, sequence: int, vocabulary: int) -> dict[str, int]:
    return dict(zip(KEYS, (layers, width, heads, sequence, vocabulary), strict=True))


TRANSFORMERS: dict[str, dict[str, int]] = {
    # Radford et al., Language Models are Unsupervised Multitask Learners, table 2
    "gpt2-small": _gpt(12, 768, 12, 1024, 50257),
    "gpt2-medium": _gpt(24, 1024, 16, 1024, 50257),
    "gpt2-large": _gpt(36, 1280, 20, 1024, 50257),
    "gpt2-xl": _gpt(48, 1600, 25, 1024, 50257),
    # Brown et al., arXiv:2005.14165, table 2.1
    "gpt3-175b": _gpt(96, 12288, 96, 2048, 50257),
    # Narayanan et al., arXiv:2104.04473, table 1
    "megatron-1.7b": _gpt(24, 2304, 24, 2048, 51200),
    "megatron-3.6b": _gpt(30, 3072, 32, 2048, 51200),
    "megatron-7.5b": _gpt(36, 4096, 32, 2048, 51200),
    "megatron-18b": _gpt(40, 6144, 48, 2048, 51200),
    "megatron-39b": _gpt(48, 8192, 64, 2048, 51200),
    "megatron-76b": _gpt(60, 10240, 80, 2048, 51200),
    "megatron-145b": _gpt(80, 12288, 96, 2048, 51200),
    "megatron-310b": _gpt(96, 16384, 128, 2048, 51200),
    "megatron-530b": _gpt(105, 20480, 128, 2048, 51200),
    "megatron-1t": _gpt(128, 25600, 160, 2048, 51200),
}
