"""The embedded text as torch sees it: tokens to read, and at each the token to write next."""

from pathlib import Path

import torch
from torch.utils.data import Dataset

from pipetutor.data.fetch import FILES
from pipetutor.data.sums import ANSWER, encode

__all__ = ["IGNORED", "Sums"]

IGNORED = -100  # what cross-entropy leaves out of the mean unless it is told otherwise


class Sums(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """(input, label) pairs of int64 tokens: at ``=`` and behind, the label is the answer's next character.

        input    3    7    +    8    5    =    1    2
        label    .    .    .    .    .    1    2    2        . IGNORED, the question: nothing is asked there

    An index may also be a list of indices: its rows are a micro-batch already, with no need to collate.

    Args:
        data_dir: where ``prepare("sums", data_dir)`` has written.
        train: the sums to learn, or else those that are held out.

    Attributes:
        inputs: all inputs, (N, T).
        targets: all labels, (N, T).
    """

    def __init__(self, data_dir: str | Path, train: bool):
        lines = Path(data_dir, FILES["sums"].folder, "train.txt" if train else "test.txt").read_text().split()
        tokens = torch.tensor(encode("".join(lines))).view(len(lines), -1)
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
        self.targets[:, :-ANSWER] = IGNORED

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int | list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index], self.targets[index]
