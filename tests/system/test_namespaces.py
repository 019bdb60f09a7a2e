"""What is said of a link is what the system is told, and what a machine lacks for it is said."""

import os
import subprocess
from pathlib import Path

import pytest

from pipetutor.system import namespaces
from pipetutor.system.links import Link, parse_links
from pipetutor.system.namespaces import alone, check_hosts, limits

MEGABIT = 1e6


@pytest.mark.parametrize(
    ("text", "rate", "delay"),
    [
        ("100mbit", 100 * MEGABIT, 0),
        ("1gbit 5ms", 1000 * MEGABIT, 0.005),
        ("1.5mbit 250us", 1.5 * MEGABIT, 0.00025),
        ("64kbit", 64e3, 0),
        ("unlimited", float("inf"), 0),
        ("unlimited 1s", float("inf"), 1),
    ],
)
def test_a_link_has_a_rate_and_a_delay_and_says_so_again(text, rate, delay):
    link = Link.parse(text)
    assert (link.rate, link.delay) == (pytest.approx(rate), pytest.approx(delay))
    assert Link.parse(str(link)) == link


@pytest.mark.parametrize(
    "text", ["fast", "", "100", "100 mbit 5", "-1mbit", "100mbyte", 7, "1bit", "2000gbit", "1mbit 11s"]
)
def test_what_is_no_link_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"^link .*(: '100mbit', |a rate is at least|a delay is at most)"):
        Link.parse(text)


def test_each_pair_of_hosts_has_its_link():
    slow, fast, free = Link.parse("1mbit"), Link.parse("1gbit"), Link()
    assert parse_links(1, None) == {}
    assert parse_links(2, None) == {(0, 1): free}
    assert parse_links(3, "1mbit") == dict.fromkeys([(0, 1), (0, 2), (1, 2)], slow)
    named = {"0-1": "1gbit", "2-0": "1mbit"}
    assert parse_links(3, named) == {(0, 1): fast, (0, 2): slow, (1, 2): free}
    assert parse_links(3, "0-1 1gbit, others 1mbit") == {(0, 1): fast, (0, 2): slow, (1, 2): slow}


@pytest.mark.parametrize("given", ["0-2 1mbit", "0-0 1mbit", "0-1 1mbit, 1-0 1gbit", {"0": "1mbit"}, {1: "1mbit"}])
def test_a_pair_that_is_not_there_is_refused(given):
    with pytest.raises(ValueError, match=r"name two of the hosts 0 to 1, each pair once, or others: '100mbit'"):
        parse_links(2, given)


def test_a_bucket_lets_through_the_rate_and_a_delay_stands_before_it():
    assert limits(Link(), "eth0") == []
    ((_, *words),) = limits(Link.parse("100mbit"), "eth0")
    assert words[:5] == ["qdisc", "add", "dev", "eth0", "root"] and words[words.index("rate") + 1] == "100000000bit"
    delayed, shaped = limits(Link.parse("100mbit 5ms"), "eth0")
    assert "netem" in delayed and "5000us" in delayed and "tbf" in shaped and "1:" in shaped


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A machine with all that hosts need, whose unshare fails as ``tmp_path / 'says'`` says."""
    for name in namespaces.TOOLS:
        (tmp_path / name).write_text(f"#!/bin/sh\ncat {tmp_path}/says >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(namespaces, "PATH", str(tmp_path))
    (tmp_path / "says").write_text("unshare: unshare failed: Operation not permitted\n")
    return tmp_path


def test_a_tool_that_is_missing_is_named_with_its_package(tools, monkeypatch):
    (tools / "tc").unlink()
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(
        ValueError, match=r"need tc, which this one lacks: install iproute2 \(apt-get install iproute2\)"
    ):
        check_hosts([Link()])


def test_a_system_that_forbids_says_what_would_allow(tools, monkeypatch):
    with pytest.raises(ValueError, match=r"\(unshare: unshare failed: Operation not permitted\): a container allows"):
        check_hosts([Link()])
    (tools / "forbids").write_text("1\n")
    monkeypatch.setattr(namespaces, "SETTINGS", {str(tools / "forbids"): ("1", "0")})
    with pytest.raises(ValueError, match=r"sudo sysctl -w \S*forbids=0 allows them, or leave hosts out$"):
        check_hosts([Link()])


def test_a_kernel_that_delays_no_packets_is_told_from_one_that_forbids(tools):
    (tools / "unshare").write_text('#!/bin/sh\ncase "$*" in *netem*) echo unknown >&2; exit 2;; esac\n')
    check_hosts([Link.parse("1gbit")])
    with pytest.raises(ValueError, match=r"this kernel delays no packets \(unknown\): give the link without a delay"):
        check_hosts([Link.parse("1gbit 5ms")])


def test_who_is_alone_has_a_network_of_their_own():
    here = os.stat("/proc/self/ns/net").st_ino
    try:
        check_hosts([Link.parse("1gbit")])
    except ValueError as refused:
        pytest.skip(str(refused))
    said = subprocess.run([*alone(), "stat", "-Lc", "%i %u", "/proc/self/ns/net"], capture_output=True, text=True)
    assert int(said.stdout.split()[0]) != here
    assert not [name for name in os.listdir("/sys/class/net") if name.startswith("end")], "the trial left nothing"
    assert Path("/proc/self/ns/net").stat().st_ino == here
