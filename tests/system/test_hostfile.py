"""A hostfile that DeepSpeed would read, and each line that it would not."""

import pytest

from pipetutor.system.hostfile import read_hostfile


def test_hosts_are_read_in_their_order(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two machines\n\n second slots=4  # the faster one\nfirst slots=2\n")
    assert list(read_hostfile(path).items()) == [("second", 4), ("first", 2)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("first\n", r"has in line 1 'first': give each host a line such as: first slots=2"),
        ("first slots=2\nfirst slots=2\n", "has in line 2 first a second time"),
        ("first slots=0\n", "has in line 1 'first slots=0'"),
        ("-oProxyCommand=x slots=1\n", "has in line 1 '-oProxyCommand=x slots=1'"),
        ("# none\n", "has no hosts"),
        (b"\xff\xfe", "it is no text"),
        (None, "No such file or directory"),
    ],
)
def test_what_is_no_hostfile_is_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "hosts"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=words) as refused:
        read_hostfile(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)
