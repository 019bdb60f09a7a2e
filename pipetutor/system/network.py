"""The network interfaces by which the ranks of this host reach others."""

import os
import socket

__all__ = ["check_network"]


def check_network(backend: str) -> None:
    """Refuse network interfaces that this host does not have: gloo takes a list of them, NCCL one of its prefixes."""
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    given, here = os.environ.get(variable, ""), [name for _, name in socket.if_nameindex()]
    if not given or given.startswith("^"):  # NCCL's: all but these
        return
    wanted, exact = given.removeprefix("=").split(","), backend == "gloo" or given.startswith("=")
    found = [name for name in wanted if name in here or (not exact and any(each.startswith(name) for each in here))]
    if not found or (backend == "gloo" and found != wanted):
        raise ValueError(
            f"{variable} is {given}, but this host has no such network interface: use one of {', '.join(here)}, or "
            "unset it"
        )
