"""The sums: right, apart, the same bytes everywhere, and asked for the answer alone."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pipetutor.data import sums
from pipetutor.data.fetch import FILES, DataError, prepare
from pipetutor.data.sums import ALPHABET, ANSWER, LENGTH, decode, encode
from pipetutor.data.text import IGNORED, Sums


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    prepare("sums", directory)
    return directory


def lines(data_dir, name):
    return (data_dir / FILES["sums"].folder / name).read_text().splitlines()


def test_every_sum_is_there_once_and_its_answer_is_right(data_dir):
    pairs = set()
    for line in lines(data_dir, "train.txt") + lines(data_dir, "test.txt"):
        (a, b), answer = line.split("=")[0].split("+"), line.split("=")[1]
        assert int(a) + int(b) == int(answer)
        assert (len(a), len(b), len(answer)) == (2, 2, ANSWER) and len(line) == LENGTH + 1
        pairs.add((int(a), int(b)))
    assert pairs == {(a, b) for a in range(100) for b in range(100)}


def test_neither_a_held_out_sum_nor_its_mirror_is_for_training(data_dir):
    questions = [{line.split("=")[0] for line in lines(data_dir, name)} for name in ("train.txt", "test.txt")]
    train, test = questions
    assert (len(train), len(test)) == (5_000, 5_000)
    mirrors = {"+".join(reversed(question.split("+"))) for question in test}
    assert mirrors == test and not train & test


def test_the_bytes_do_not_depend_on_numpys_own_generator(data_dir, tmp_path):
    np.random.seed(7)
    sums.write(tmp_path)
    for name in FILES["sums"].md5:
        assert (tmp_path / name).read_bytes() == (data_dir / FILES["sums"].folder / name).read_bytes()


def test_other_bytes_are_refused_after_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "SEED", 1)
    with pytest.raises(DataError, match=r"train\.txt is damaged or altered: its md5 is"):
        prepare("sums", tmp_path)
    assert not (tmp_path / FILES["sums"].folder).exists()


def test_text_becomes_tokens_and_text_again(data_dir):
    for text in ["", ALPHABET, "37+85=122"]:
        assert decode(encode(text)) == text
    assert sorted(encode(ALPHABET)) == list(range(len(ALPHABET)))
    assert decode(torch.tensor([IGNORED, 3, 7, len(ALPHABET)])) == ".37."
    with pytest.raises(ValueError, match=r"^no token for '-' in '37-85=': sums are made of 0123456789\+=$"):
        encode("37-85=")


@pytest.mark.parametrize("train, name", [(True, "train.txt"), (False, "test.txt")])
def test_an_example_asks_for_the_answer_alone(data_dir, train, name):
    dataset, text = Sums(data_dir, train), lines(data_dir, name)
    assert len(dataset) == len(text) and dataset.targets.shape == dataset.inputs.shape == (len(text), LENGTH)
    for index in (0, 1, len(text) - 1):
        tokens, label = dataset[index]
        assert tokens.dtype == label.dtype == torch.int64 and tokens.shape == label.shape == (LENGTH,)
        assert decode(tokens) == text[index][:-1]
        assert decode(label) == "....." + text[index][-ANSWER:]
        assert torch.equal(label, dataset.targets[index])
    assert ((dataset.targets != IGNORED).sum(1) == ANSWER).all()


def test_rows_at_once_are_a_micro_batch(data_dir):
    dataset, order = Sums(data_dir, True), [5, 3, 8, 1]
    (collated,) = DataLoader(dataset, batch_size=4, sampler=order)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(dataset[order], collated, strict=True))


def test_neither_the_text_nor_the_sizes_load_torch():
    code = "import sys, pipetutor.data.sums, pipetutor.core.gpt_sizes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
