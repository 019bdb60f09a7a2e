"""The embedded text: sums of two numbers below 100, one a line, such as ``37+85=122``.

A model that reads ``37+85=`` and writes the answer, character by character, can be marked as at school: right or
wrong. Every number has a fixed width (``07+05=012``), so that each sum has as many characters as any other and each
answer three. Of all 10,000 sums, half are held out, which a seed chooses: a table learned by heart is no help with
them. A sum is held out with its mirror: had a model seen ``85+37``, then ``37+85`` would show that it can swap, and
not that it can add. So ``a+a``, which has none, is always for training.
As with the drawn shapes, only whole-number arithmetic decides a byte. No torch: the launcher reads the sizes here.
"""

from collections.abc import Iterable
from pathlib import Path

__all__ = ["ALPHABET", "ANSWER", "LENGTH", "decode", "encode", "write"]

DIGITS = 2
ANSWER = DIGITS + 1  # characters of each answer
LENGTH = len("37+85=122") - 1  # tokens of each input: the last character of a sum is only ever predicted
ALPHABET = "0123456789+="
TEST = 2_500  # pairs that are held out, each in both orders
SEED = 1138


def encode(text: str) -> list[int]:
    """Return the token of each character.

    Raises:
        ValueError: a character is not in the alphabet.

    >>> encode("37+85=122")
    [3, 7, 10, 8, 5, 11, 1, 2, 2]
    """
    if unknown := set(text) - set(ALPHABET):
        raise ValueError(f"no token for {min(unknown)!r} in {text!r}: sums are made of {ALPHABET}")
    return [ALPHABET.index(character) for character in text]


def decode(tokens: Iterable[int]) -> str:
    """Return the text of tokens; one that stands for no character, such as -100 in a label, is a dot.

    >>> decode([3, 7, 10, 8, 5, 11, 1, 2, 2]), decode([-100, -100, 1, 2, 2])
    ('37+85=122', '..122')
    """
    return "".join(ALPHABET[token] if 0 <= token < len(ALPHABET) else "." for token in tokens)


def split() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the pairs of numbers to learn and those that are held out, either in an order of its own."""
    import numpy as np  # here: who only asks for the sizes is to have them in milliseconds

    rng = np.random.Generator(np.random.PCG64(SEED))
    unequal = [(a, b) for b in range(10**DIGITS) for a in range(b)]
    held = {unequal[index] for index in rng.permutation(len(unequal))[:TEST]}
    every = [(int(index) // 10**DIGITS, int(index) % 10**DIGITS) for index in rng.permutation(10 ** (2 * DIGITS))]
    train = [(a, b) for a, b in every if (min(a, b), max(a, b)) not in held]
    return train, [(a, b) for a, b in every if (min(a, b), max(a, b)) in held]


def write(folder: Path) -> None:
    """Write ``train.txt`` and ``test.txt``, a sum a line, into a folder.

    Args:
        folder: an existing directory; 100 kB are written.
    """
    for name, pairs in zip(("train.txt", "test.txt"), split(), strict=True):
        lines = (f"{a:0{DIGITS}}+{b:0{DIGITS}}={a + b:0{ANSWER}}\n" for a, b in pairs)
        (folder / name).write_bytes("".join(lines).encode())
