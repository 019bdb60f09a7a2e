"""The course as a learner has it: JupyterLab and pages in Chromium, with a mouse and a keyboard. ``make browser``.

What was on the screen at each point is kept in build/screenshots.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import psutil
import pytest
from conftest import processes_of, wait_until
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from playwright.sync_api import Locator, Page, expect, sync_playwright

import build_html
from pipetutor.figures.board import board
from pipetutor.processes.environment import free_port
from pipetutor.schedule.orders import build
from pipetutor.schedule.puzzles import PUZZLES
from pipetutor.schedule.simulate import Costs, simulate

pytestmark = [pytest.mark.browser, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "build" / "screenshots"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
MARK = "PIPETUTOR_BROWSER_TEST"  # in the environment of every process that a test starts, and so of all below it

# Seconds after which something hangs, on a slow machine with other work as well.
STARTED = 600  # for JupyterLab to come up, or for a launch to complete its first step
RUN = 1200  # for all cells of a notebook with few steps
SOON = 120  # for what a learner expects at once
A4_WIDTH = 718  # pixels between a browser's usual margins


def marked(place: Path) -> list[psutil.Process]:
    """Every living process of this test: by its environment, its command line or its working directory."""
    found = processes_of(place)
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(place) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in dict.fromkeys(found) if process.pid != os.getpid()]


def of_launches(place: Path) -> list[str]:
    """Supervisors and ranks: all that runs below a kernel, and all that has lost its parents."""
    found = []
    for process in marked(place):
        try:
            words = " ".join(process.cmdline())
            if "pipetutor." in words or "deepspeed" in words or any(_is_kernel(p) for p in process.parents()):
                found.append(f"{process.pid}: {words}")
        except psutil.Error:
            continue
    return found


def _is_kernel(process: psutil.Process) -> bool:
    return "ipykernel_launcher" in " ".join(process.cmdline())


@pytest.fixture
def place(tmp_path, monkeypatch) -> Iterator[Path]:
    """A directory for a server, its notebooks, its settings and a browser's; afterwards, none of them may run."""
    monkeypatch.setenv(MARK, str(tmp_path))
    for name in [name for name in os.environ if name.startswith(("JUPYTER", "IPYTHON"))]:
        monkeypatch.delenv(name)
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("JUPYTER_CONFIG_PATH", "JUPYTER_PATH"):  # as make lab has them
        monkeypatch.setenv(name, str(ROOT / "tools" / "jupyter"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    settings = {"ServerApp": {"port": free_port(), "port_retries": 0, "allow_root": os.getuid() == 0}}
    (tmp_path / "JUPYTER_CONFIG_DIR" / "jupyter_server_config.json").write_text(json.dumps(settings))
    (tmp_path / "notebooks").mkdir()
    yield tmp_path
    left = marked(tmp_path)
    for process in left:
        process.kill()
    assert not left, f"left running: {left}"


@contextmanager
def server(place: Path, command: list[str], cwd: Path) -> Iterator[dict]:
    """Run what starts a JupyterLab, and end it as its owner would; gives what Jupyter says about it."""
    with open(place / "server.log", "wb") as log:
        process = subprocess.Popen(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        about = wait_until(lambda: process.poll() is not None or _about(place), STARTED)
        assert about is not True, f"no server:\n{(place / 'server.log').read_text()[-3000:]}"
        yield about
        os.kill(about["pid"], 15)
        process.wait(SOON)
    finally:
        if process.poll() is None:
            for left in [process, *psutil.Process(process.pid).children(recursive=True)]:
                left.kill()
            process.wait()


def _about(place: Path) -> dict | None:
    for path in (place / "JUPYTER_RUNTIME_DIR").glob("jpserver-*.json"):
        try:
            return json.loads(path.read_text())
        except ValueError:  # half written
            return None
    return None


@contextmanager
def browser(place: Path, **settings: object) -> Iterator[Page]:
    """Give the page of a Chromium that nobody has used before; settings are Playwright's, of a context."""
    found = shutil.which("chromium")
    assert found, "Chromium is missing: apt-get install chromium"
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            place / "chromium",
            executable_path=found,
            args=FLAGS,
            env={**os.environ, "HOME": str(place)},
            **{"viewport": {"width": 1280, "height": 900}, **settings},
        )
        page = context.pages[0]
        page.set_default_timeout(SOON * 1000)
        try:
            yield page
        except BaseException:
            screenshot(page, "failed")
            raise
        finally:
            context.close()


@contextmanager
def jupyterlab(place: Path, name: str, notebook: nbformat.NotebookNode) -> Iterator[Page]:
    """Open a notebook in JupyterLab, in a browser, and wait for its kernel."""
    nbformat.write(notebook, place / "notebooks" / name)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser"]
    with server(place, command, place / "notebooks") as about, browser(place) as page:
        page.goto(f"{about['url']}lab/tree/{name}?token={about['token']}", timeout=STARTED * 1000)
        idle(page, STARTED)
        yield page


def screenshot(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.evaluate(DRAWN)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def idle(page: Page, seconds: float) -> None:
    """Wait for the notebook in front to have a kernel that does nothing."""
    kernel = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Toolbar-kernelName")
    expect(kernel).to_contain_text("Python 3", timeout=seconds * 1000)
    expect(_indicator(page)).to_have_attribute("data-status", "idle", timeout=seconds * 1000)


def _indicator(page: Page) -> Locator:
    return page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook-ExecutionIndicator")


def choose(page: Page, menu: str, *entries: str) -> None:
    """Click a menu of the menu bar and then an entry of it, or of the menu that opens beside it."""
    page.locator(".lm-MenuBar-itemLabel").get_by_text(menu, exact=True).click()
    for entry in entries:
        page.locator(".lm-Menu-itemLabel").get_by_text(entry, exact=True).click()


def read(name: str, upto: str | None = None, **parameters: object) -> nbformat.NotebookNode:
    """Read a notebook with other parameters, and without the cells after the first that holds ``upto``."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for parameter, value in parameters.items():
        cell.source, count = re.subn(rf"^{parameter} = .*$", f"{parameter} = {value}", cell.source, flags=re.M)
        assert count == 1, f"{name} has no parameter {parameter}"
    if upto:
        del notebook.cells[code_with(notebook, upto) + 1 :]
    return notebook


def code_with(notebook: nbformat.NotebookNode, words: str) -> int:
    return next(n for n, cell in enumerate(notebook.cells) if cell.cell_type == "code" and words in cell.source)


def cell_of(page: Page, number: int) -> Locator:
    return page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell").nth(number)


DRAWN = """
() => new Promise(done => {
  setTimeout(done, 2000);
  requestAnimationFrame(() => requestAnimationFrame(done));
})
"""
WATCH_BAR = r"""
cell => {
  window.bars = [];
  const look = () => {
    for (const pre of cell.querySelectorAll('pre')) {
      const found = pre.textContent.match(/(\d+)\/(\d+) steps \|([^|]*)\|/);
      if (!found || window.bars.at(-1)?.text === pre.textContent) continue;
      const busy = document.querySelector('.jp-Notebook-ExecutionIndicator').dataset.status === 'busy';
      const width = (found[3].match(/[^\s]/g) ?? []).length;
      window.bars.push({text: pre.textContent, done: +found[1], total: +found[2], width, busy});
    }
  };
  new MutationObserver(look).observe(cell, {subtree: true, childList: true, characterData: true});
}
"""
# JupyterLab moves the page while it measures cells: seen in one frame, the bar must still be there in the next one.
BAR_IN_SIGHT = """async () => {
  const bar = () => [...document.querySelectorAll(".jp-NotebookPanel:not(.lm-mod-hidden) pre")]
    .find(one => one.textContent.includes(" steps |"));
  bar()?.scrollIntoView({block: "center"});
  for (let frame = 0; frame < 20; frame += 1) await new Promise(requestAnimationFrame);
  const {top, bottom} = bar()?.getBoundingClientRect() ?? {top: -1, bottom: -1};
  return top > 0 && bottom < innerHeight;
}"""
BAR_MOVED_TWICE = "() => new Set(window.bars.filter(b => b.busy && b.done < b.total).map(b => b.done)).size >= 3"
PICTURE_SIZE = "image => image.complete && [image.naturalWidth, image.getBoundingClientRect().width]"


def test_the_first_notebook_is_run_from_the_menu(place):
    notebook = read("00_first_pipeline.ipynb", steps=8, train_batch=16, compare_steps=2)
    with jupyterlab(place, "00_first_pipeline.ipynb", notebook) as page:
        screenshot(page, "first-1-opened")
        launching = cell_of(page, code_with(notebook, "launch(stages=2"))
        launching.evaluate(WATCH_BAR)
        choose(page, "Run", "Run All Cells")
        page.wait_for_function(BAR_MOVED_TWICE, timeout=STARTED * 1000)
        screenshot(page, "first-2-run-all")
        bar = launching.locator("pre", has_text=" steps |")
        page.wait_for_function(BAR_IN_SIGHT, timeout=STARTED * 1000)
        screenshot(page, "first-2-running")
        assert of_launches(place)

        idle(page, RUN)
        bars = page.evaluate("window.bars")
        assert [bar["done"] for bar in bars] == sorted(bar["done"] for bar in bars), bars
        assert [bar["width"] for bar in bars] == sorted(bar["width"] for bar in bars), bars
        assert bars[0]["width"] == 0 and bars[-1]["width"] == 30 and bars[-1]["done"] == 8, bars
        assert bar.count() == 1, "one bar, changed in place"
        launching.scroll_into_view_if_needed()
        screenshot(page, "first-3-launched")

        _assert_all_ran(page, notebook)
        figures = page.locator(".jp-OutputArea-output img")
        assert figures.count() == sum("plots" in line for line in _last_lines(notebook))
        for number, figure in enumerate(figures.all()):
            figure.scroll_into_view_if_needed()
            screenshot(page, f"first-4-figure-{number}")
            natural, shown = figure.evaluate(PICTURE_SIZE)
            room = figure.evaluate("image => image.closest('.jp-OutputArea-output').clientWidth")
            assert natural > 300 and 300 < shown <= room, (natural, shown, room)
        assert not of_launches(place)
        page.locator(".jp-Notebook").evaluate("page => page.scrollTo(0, page.scrollHeight)")
        screenshot(page, "first-5-end")


def _last_lines(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source.splitlines()[-1] for cell in notebook.cells if cell.cell_type == "code"]


def _assert_all_ran(page: Page, notebook: nbformat.NotebookNode) -> None:
    prompts = [text.strip() for text in page.locator(".jp-CodeCell .jp-InputPrompt").all_text_contents()]
    count = sum(cell.cell_type == "code" for cell in notebook.cells)
    assert prompts == [f"[{n}]:" for n in range(1, count + 1)], prompts
    errors = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']")
    assert not errors.all_text_contents()


def test_the_slider_changes_the_figure(place):
    notebook = read("06_schedules.ipynb", upto="explore(")
    with jupyterlab(place, "06_schedules.ipynb", notebook) as page:
        choose(page, "Run", "Run All Cells")
        cell = cell_of(page, len(notebook.cells) - 1)
        micro_batches = cell.locator(".widget-inline-hbox", has_text="M").locator(".noUi-handle")
        expect(micro_batches).to_be_visible(timeout=RUN * 1000)
        idle(page, RUN)
        _assert_all_ran(page, notebook)
        picture = cell.locator(".widget-html img")
        picture.scroll_into_view_if_needed()
        screenshot(page, "slider-1")
        assert picture.evaluate(PICTURE_SIZE)[1] > 300

        before = picture.get_attribute("src")
        micro_batches.press("ArrowRight")
        expect(cell.locator(".widget-readout").nth(1)).to_have_text("9")
        expect(picture).not_to_have_attribute("src", before)
        screenshot(page, "slider-2-by-keyboard")

        before = picture.get_attribute("src")
        stages = cell.locator(".widget-inline-hbox", has_text="P").locator(".noUi-handle")
        box = stages.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + 300, box["y"] + box["height"] / 2, steps=5)
        page.mouse.up()
        expect(cell.locator(".widget-readout").nth(0)).to_have_text("8")
        expect(picture).not_to_have_attribute("src", before)
        idle(page, SOON)
        assert picture.evaluate(PICTURE_SIZE)[1] > 300
        seen, room = picture.bounding_box(), cell.locator(".jp-OutputArea").bounding_box()
        assert seen["x"] + seen["width"] <= room["x"] + room["width"], "the picture is cut off"
        screenshot(page, "slider-3-by-mouse")
        choose(page, "Settings", "Theme", "JupyterLab Dark")
        expect(page.locator("body")).to_have_attribute("data-jp-theme-name", "JupyterLab Dark")
        expect(page.locator("#jupyterlab-splash")).to_have_count(0)
        screenshot(page, "slider-4-dark")


def test_a_launch_that_is_interrupted_or_loses_its_kernel_leaves_nothing(place):
    """Both in one notebook, by the menu; in between it is run again, as if nothing had been."""
    notebook = read("00_first_pipeline.ipynb", upto="launch(stages=2", steps=10_000, train_batch=16)
    with jupyterlab(place, "00_first_pipeline.ipynb", notebook) as page:
        launching = cell_of(page, len(notebook.cells) - 1)
        for number, end in enumerate(["interrupt", "restart"], start=1):
            launching.evaluate(WATCH_BAR)
            choose(page, "Run", "Run All Cells")
            page.wait_for_function("() => window.bars.some(b => b.busy && b.done >= 2)", timeout=STARTED * 1000)
            launching.scroll_into_view_if_needed()
            screenshot(page, f"ended-{number}-launching")
            assert len([words for words in of_launches(place) if "pipetutor.train" in words]) >= 2
            if end == "interrupt":
                choose(page, "Kernel", "Interrupt Kernel")
                said = launching.locator(".jp-OutputArea-output").last
                expect(said).to_contain_text("KeyboardInterrupt")
                expect(said).to_contain_text("is interrupted, and all its processes have ended")
                idle(page, SOON)
                assert not of_launches(place), "the cell has ended, and its processes have not"
            else:
                choose(page, "Kernel", "Restart Kernel…")
                page.locator(".jp-Dialog-button.jp-mod-accept").click()
                wait_until(lambda: not of_launches(place), SOON)
                idle(page, STARTED)
            launching.scroll_into_view_if_needed()
            screenshot(page, f"ended-{number}-by-{end}")


TOO_WIDE = """
() => [...document.querySelectorAll('main, main *')]
  .filter(one => one.clientWidth && one.scrollWidth > one.clientWidth + 1)
  .map(one => `${one.tagName} ${one.className}: ${one.scrollWidth} > ${one.clientWidth}`)
"""
TABLE_LINES = """
() => {
  const pre = document.querySelector('.output_stdout pre'), range = document.createRange();
  range.selectNodeContents(pre);
  const height = parseFloat(getComputedStyle(pre).lineHeight);
  return Math.round((range.getBoundingClientRect().height) / height);
}
"""


def test_no_line_of_an_output_is_cut_on_screen_or_on_paper(place):
    """Long ones go on below, whatever they are made of; a table made of text keeps its lines."""
    words, word = " ".join(f"loss[{n}]={n * 0.37:.2f}" for n in range(60)), "/".join(["directory"] * 40)
    row = f"| {words[:300]} | {word} |"
    page_of = new_notebook(cells=[new_markdown_cell(f"# T\n\nA promise.\n\n| a | b |\n|---|---|\n{row}")])
    table = "\n".join(" ".join(f"{n * column:10}" for column in range(10)) for n in range(5))
    for text in (table, words, word):
        page_of.cells.append(new_code_cell("print(text)", outputs=[new_output("stream", name="stdout", text=text)]))
    page_of.cells.append(new_code_cell("1", outputs=[new_output("execute_result", {"text/plain": repr([words])})]))
    page_of.cells.append(new_code_cell("1 / 0", outputs=[new_output("error", traceback=[words, word])]))
    nbformat.write(page_of, place / "notebooks" / "00_wide.ipynb")
    assert build_html.build(place / "notebooks", place / "notebooks", place / "html") == []
    with browser(place) as page:
        page.goto((place / "html" / "00_wide.html").as_uri())
        for media, width in (("screen", 1280), ("print", A4_WIDTH)):
            page.emulate_media(media=media)
            page.set_viewport_size({"width": width, "height": 900})
            screenshot(page, f"wide-{media}")
            wide = page.evaluate(TOO_WIDE)
            assert not [one for one in wide if media == "print" or "DIV scroll" not in one], "a table can be scrolled"
            assert page.evaluate(TABLE_LINES) == 5


MENUS = ["File", "Edit", "View", "Run", "Kernel", "Tabs", "Settings", "Help"]


def test_make_lab_opens_the_map_and_its_first_link_a_notebook(place, monkeypatch):
    """``make lab`` in a copy of the project, whose workbook it fills; the copy's browser notes what it shall open."""
    copy, opened = place / "project", place / "opened"
    for name in ("notebooks", "pipetutor", "tools"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy2(ROOT / name, copy / name)
    (place / "note.sh").write_text(f'#!/bin/sh\nprintf %s "$1" > "{opened}"\n')
    (place / "note.sh").chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{place}/note.sh %s")
    monkeypatch.setenv("PYTHONPATH", str(copy))
    monkeypatch.delenv("JUPYTER_CONFIG_PATH")
    ready = place / "ready"  # this environment, as it is
    ready.touch()
    command = ["make", "lab", f"VENV={sys.prefix}", f"READY={ready}"]
    with server(place, command, copy), browser(place) as page:
        wait_until(lambda: opened.exists() and opened.read_text(), SOON)
        page.goto(opened.read_text(), timeout=STARTED * 1000)
        map_of_the_course = page.locator(".jp-MarkdownViewer .jp-RenderedMarkdown")
        expect(map_of_the_course.locator("h1")).to_contain_text("course map", timeout=STARTED * 1000)
        links = map_of_the_course.locator("table a")
        expect(links).to_have_count(len(list((ROOT / "notebooks").glob("*.ipynb"))))
        screenshot(page, "lab-1-map")
        assert page.locator(".lm-MenuBar-itemLabel").all_text_contents() == MENUS, "a learner needs no more"
        title = links.first.text_content().split(maxsplit=1)[1]
        links.first.click()
        expect(page.locator(".jp-NotebookPanel h1").first).to_contain_text(title, timeout=STARTED * 1000)
        idle(page, STARTED)
        screenshot(page, "lab-2-first-notebook")
        sources = {path.name: path.read_text() for path in (copy / "notebooks").glob("*.ipynb")}
        answered = [name for name, text in sources.items() if "BEGIN SOLUTION" in text]
        assert answered and not any("BEGIN SOLUTION" in (copy / "workbook" / name).read_text() for name in answered)
        assert not page.locator(".Toastify__toast").all_text_contents(), "nobody is asked about Jupyter news"


# --- the board ------------------------------------------------------------------------------------------------------

THREE = PUZZLES["twelve slots"]
GPIPE = "F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3\n.  F0 F1 F2 F3 .  .  B0 B1 B2 B3\n.  .  F0 F1 F2 F3 B0 B1 B2 B3"


def pages_with(place: Path, *boards: object) -> list[Path]:
    """Build the web pages of two lessons that both hold these boards, as ``make html`` does."""
    for name in ("00_one", "01_two"):
        outputs = [new_output("display_data", each._repr_mimebundle_()[0]) for each in boards]
        cells = [new_markdown_cell(f"# {name}\n\nA promise.")]
        cells += [new_code_cell("board(...)", outputs=[output]) for output in outputs]
        nbformat.write(new_notebook(cells=cells), place / "notebooks" / f"{name}.ipynb")
    assert build_html.build(place / "notebooks", place / "notebooks", place / "html") == []
    return [place / "html" / f"{name}.html" for name in ("00_one", "01_two")]


def offline(page: Page) -> list[str]:
    """Refuse every request but for files, and keep a list of what was asked for."""
    asked: list[str] = []
    page.context.on("request", lambda request: asked.append(request.url))
    page.context.route(re.compile("^(?!file:)"), lambda route: route.abort())
    page.context.on("weberror", lambda problem: asked.append(f"an error: {problem.error}"))
    return asked


def placed(board: Locator) -> str:
    """What a board's text says is placed, without the dots after a rank's last pass."""
    rows = board.locator("textarea").input_value().splitlines()
    return "\n".join(row.rstrip(" .") for row in rows)


def test_a_schedule_is_placed_by_mouse_and_a_link_carries_it_to_another_page(place):
    first, second = pages_with(place, board(THREE), board(ranks=2, micro_batches=2))
    with browser(place, permissions=["clipboard-read", "clipboard-write"]) as page:
        asked = offline(page)
        page.goto(first.as_uri())
        here = page.get_by_role("region", name="Board: Twelve slots")
        said = here.get_by_role("status")
        screenshot(page, "board-1-empty")

        def put(rank: int, *names: str) -> None:
            row = here.locator(f'[data-rank="{rank}"] .pt-ground')
            row.click(position={"x": row.bounding_box()["width"] - 5, "y": 10})
            for name in names:
                here.get_by_role("button", name=re.compile(f"^{name}\\b")).click()

        put(0, "F0", "B0")
        expect(said).to_have_text("B0 on rank 0 needs the gradient of B0 from rank 1, which is not placed yet.")
        put(0, "F0")
        expect(said).to_have_text("F0 is there already, on rank 0.")
        screenshot(page, "board-2-refused")
        put(0, "F1", "F2", "F3")
        for rank in (1, 2):
            put(rank, *(f"F{number}" for number in range(4)))
        for rank in (2, 1, 0):
            put(rank, *(f"B{number}" for number in range(4)))
        expect(said).to_have_text("B3 placed on rank 0. 12 slots: par met.")
        assert placed(here) == GPIPE
        expect(here.locator(".pt-facts")).to_contain_text("bubble: 33.33 %")
        here.get_by_role("row", name="rank 0").get_by_role("gridcell", name="waits").hover()
        cause = "Rank 0 waits 4 slots for the gradient of B0 from rank 1. Until then rank 2 runs F2, F3 and B0, then "
        expect(here.locator(".pt-info")).to_have_text(f"{cause}rank 1 runs B0.")
        screenshot(page, "board-3-par")

        def drag(rank: int, name: str, to: str) -> None:
            row = here.get_by_role("row", name=f"rank {rank}")
            start, end = (row.get_by_role("gridcell", name=re.compile(f"^{n},")).bounding_box() for n in (name, to))
            page.mouse.move(start["x"] + 20, start["y"] + 15)
            page.mouse.down()
            page.mouse.move(end["x"] + 20, end["y"] + 15, steps=4)
            page.mouse.move(end["x"] + 5, end["y"] + 15)
            page.mouse.up()

        drag(2, "B0", "F1")
        expect(said).to_have_text("B0 moved ahead of F1 on rank 2. 12 slots: par met.")
        drag(2, "B3", "F0")
        wrong = "B3 on rank 2 needs its forward pass F3, which would come after it."
        expect(said).to_have_text(f"B3 stays where it is: {wrong}")
        here.get_by_role("button", name="Play").click()
        expect(here.locator(".pt-info")).to_contain_text("Slot 2: rank 0 F1, rank 1 F0, rank 2 waits")
        here.get_by_role("button", name="Pause").click()
        here.get_by_role("button", name="Undo").click()
        assert placed(here) == GPIPE
        here.get_by_role("button", name="Copy link").click()
        expect(said).to_have_text("A link to this board as it is now is copied.")
        link = page.evaluate("navigator.clipboard.readText()")
        assert link == f"{first.as_uri()}#board=twelve-slots:" + "/".join(
            ",".join(row.replace(".", "").split()) for row in GPIPE.splitlines()
        )
        other = page.context.new_page()
        other.goto(second.as_uri() + "#" + link.split("#")[1])
        there = other.get_by_role("region", name="Board: Twelve slots")
        expect(there.get_by_role("status")).to_have_text("The text is placed. 12 slots: par met.")
        assert placed(there) == GPIPE and placed(other.locator(".pt-board").nth(1)) == "\n"
        expect(there.locator("svg[role=grid]")).to_be_in_viewport()
        assert all(url.startswith("file:") for url in asked), asked


def test_a_newcomer_sees_what_to_click_and_what_is_done(place):
    late = "F0 F1 F2 F3 B0 B1 B2 / F0 F1 F2 F3 B0 B1 B2 B3 / F0 F1 F2 F3 B0 B1 B2 B3"
    page_of, _ = pages_with(place, board(THREE, start=late), board(PUZZLES["two chunks"]))
    with browser(place) as page:
        page.goto(page_of.as_uri())
        here = page.get_by_role("region", name="Board: Twelve slots")
        numbers = here.locator("svg[role=grid] text.pt-soft").all_text_contents()
        assert numbers == [*map(str, range(1, 14)), "slot", "par"]
        for each in page.locator(".pt-board").all():
            grid, room = (each.locator(what).bounding_box()["width"] for what in ("svg[role=grid]", ".pt-scroll"))
            assert room - 1 <= grid <= room + 1, "the grid uses the width"

        info = here.locator(".pt-info")
        name = here.get_by_role("rowheader", name="rank 0")
        assert name.evaluate("name => getComputedStyle(name).cursor") == "pointer"
        here.get_by_role("rowheader", name="rank 1").click()
        expect(here.get_by_role("toolbar", name="Passes of rank 1")).to_have_count(1)
        expect(info).to_have_text("All passes of rank 1 are placed; another rank's are not")
        name.click()
        chosen = here.get_by_role("row", name="rank 0", selected=True).locator(".pt-name")
        other = here.locator('[data-rank="1"] .pt-name')
        paints = [each.evaluate("name => getComputedStyle(name).fill") for each in (chosen, other)]
        assert paints[0] != paints[1], "the name of the rank that is chosen stands out"
        expect(info).to_have_text("Here goes the next pass of rank 0")
        page.mouse.move(0, 0)
        here.get_by_role("button", name="B3").click()
        expect(info).to_have_text("Rank 0 ends here, and no rank later")

        chunks = page.get_by_role("region", name="Board: Two chunks")
        expect(chunks.get_by_role("status")).to_contain_text("or type a pass: 0F0.")
        chunks.get_by_text("Keys", exact=True).click()
        expect(chunks.locator(".pt-keys")).to_contain_text("0F0 0B0: place that pass where you are")
        chunks.get_by_role("rowheader", name="rank 0").click()
        page.keyboard.type("0F0")
        expect(chunks.get_by_role("status")).to_have_text("0F0 placed on rank 0.")


def test_a_link_to_a_board_that_is_not_there_is_told_of(place):
    timeline = board(simulate(build("1f1b", 2, 2), Costs.equal(2)), unit="slots")
    page_of, _ = pages_with(place, timeline, board(THREE), board(ranks=2, micro_batches=2))
    with browser(place) as page:
        page.goto(f"{page_of.as_uri()}#board=nope:F0/.")
        said = [page.get_by_role("region", name="Board").nth(number).get_by_role("status") for number in (1, 2)]
        expect(said[0]).to_have_text("The link is for a board that is not on this page.")
        expect(said[0]).to_be_in_viewport()
        expect(said[1]).to_contain_text("Choose a rank")
        page.goto(f"{page_of.as_uri()}#board=2x2:F0/.")  # as one follows a link within the page
        expect(said[1]).to_have_text("The text is placed.")
        page.goto(f"{page_of.as_uri()}#board=2x2:F0/%E0")
        expect(said[1]).to_contain_text('"%E0" is no pass')
        page.goto(f"{page_of.as_uri()}#board=nope")
        expect(said[0]).to_have_text("The link is for a board that is not on this page.")


def test_a_schedule_is_placed_without_a_mouse(place):
    page_of, _ = pages_with(place, board(THREE))
    with browser(place) as page:
        page.goto(page_of.as_uri())
        here = page.get_by_role("region", name="Board: Twelve slots")
        said = here.get_by_role("status")
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.getAttribute('role')") == "gridcell":
                break
        expect(here.get_by_role("gridcell", name="Here goes the next pass of rank 0")).to_be_focused()
        page.keyboard.type("F0B0")
        expect(said).to_have_text("B0 on rank 0 needs the gradient of B0 from rank 1, which is not placed yet.")
        page.keyboard.type("f1f2f3")
        for _ in range(2):
            page.keyboard.press("ArrowDown")
            page.keyboard.press("End")
            page.keyboard.type("F0F1F2F3")
        page.keyboard.type("B0B1B2B3")
        for _ in range(2):
            page.keyboard.press("ArrowUp")
            page.keyboard.press("End")
            page.keyboard.type("B0B1B2B3")
        expect(said).to_have_text("B3 placed on rank 0. 12 slots: par met.")
        assert placed(here) == GPIPE
        for _ in range(2):
            page.keyboard.press("ArrowLeft")
        expect(here.get_by_role("gridcell", name="B2, slot 11")).to_be_focused()
        page.keyboard.press("Alt+ArrowRight")
        expect(said).to_have_text("B2 moved to the end on rank 0. Complete in 13 slots; par is 12.")
        screenshot(page, "board-4-keys")
        page.keyboard.press("Delete")
        expect(said).to_have_text("B2 taken from rank 0.")
        page.keyboard.press("Control+z")
        page.keyboard.press("Control+z")
        expect(said).to_have_text("Undone. 12 slots: par met.")
        page.keyboard.press("Control+y")
        assert placed(here) != GPIPE
        page.keyboard.press("Tab")
        expect(here.get_by_role("toolbar", name="Passes of rank 0").locator(":focus")).to_have_count(1)
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        expect(here.get_by_role("button", name="B1, placed")).to_be_focused()
        page.keyboard.press("Enter")
        expect(said).to_have_text("B1 is there already, on rank 0.")
        page.keyboard.press("Tab")
        expect(here.get_by_role("button", name="Undo")).to_be_focused()
        here.get_by_role("textbox").fill("F0 F1 B0 B1\nF0 B0 F1 B1\nF0 B0 B1")
        here.get_by_role("button", name="Place this text").press("Enter")
        wrong = "B1 on rank 2 needs its forward pass F1, which is not placed yet."
        expect(said).to_have_text(wrong)
        here.get_by_role("textbox").fill("F0 F1 B0 / F0 F1 B0 / F0 B0 F1")
        here.get_by_role("button", name="Place this text").press("Enter")
        expect(said).to_have_text("The text is placed.")


def test_a_screen_reader_hears_a_board_in_order(place):
    page_of, _ = pages_with(place, board(THREE, start="F0 F1 / F0 / F0 B0"))
    with browser(place) as page:
        page.goto(page_of.as_uri())
        here = page.get_by_role("region", name="Board: Twelve slots")
        heard = here.aria_snapshot()
        wanted = [
            'gridcell "Here goes the next pass of rank 0"',
            'gridcell "Rank 1 waits 1 slot for the activation of F0 from rank 0. Until then rank 0 runs F0."',
            'row "rank 2"',
            "Micro-batches in flight, at most: rank 0 2, rank 1 1, rank 2 1",
            'toolbar "Passes of rank 0"',
            'group "forward, stage 0"',
            'button "F0, placed"',
            'button "F2"',
            'button "B0, not yet"',
            'status: "Choose a rank',
            'button "Undo" [disabled]',
            'button "▶ Play"',
            'slider "Cursor"',
            'textbox "The schedule as text, a row for each rank"',
            'button "Copy link"',
        ]
        places = [heard.find(words) for words in wanted]
        lost = [words for words, found in zip(wanted, places, strict=True) if found < 0]
        assert not lost and places == sorted(places), f"{lost}, {places} in\n{heard}"


def test_boards_are_seen_light_and_dark_large_and_small_and_without_a_script(place):
    timeline = simulate(build("1f1b", 4, 8), Costs((1,) * 4, (1,) * 4, (1,) * 4, message_bytes=(1,) * 3, bandwidth=2))
    v_shape = board(
        ranks=2, micro_batches=3, placement=(0, 1, 1, 0), split=True, cap=4, start="0F0 0F1 3F0 / 1F0 2F0"
    )
    boards = [board(THREE, start=build("1f1b", 3, 4)), v_shape, board(timeline, unit="slots")]
    page_of, _ = pages_with(place, *boards)
    for colours in ("light", "dark"):
        with browser(place, color_scheme=colours, reduced_motion="reduce") as page:
            page.goto(page_of.as_uri())
            for width in (1280, 400):
                page.set_viewport_size({"width": width, "height": 900})
                for each in page.get_by_role("region", name="Board").all():
                    room = each.bounding_box()
                    assert room["x"] >= 0 and room["x"] + room["width"] <= width
                page.evaluate(DRAWN)
                page.screenshot(path=SCREENSHOTS / f"board-{colours}-{width}.png", full_page=True)
            last = page.get_by_role("region", name="Board").nth(2)
            last.get_by_role("gridcell", name="Rank 3 waits").first.hover()
            cause = "Rank 3 waits 4 slots for the activation of micro-batch 0 from stage 2; meanwhile: F0 of stage 0"
            expect(last.locator(".pt-info")).to_contain_text(cause)
            page.get_by_role("button", name="Play").first.click()
            expect(page.locator(".pt-info").first).to_contain_text("Slot 2")
    with browser(place, java_script_enabled=False) as page:
        page.goto(page_of.as_uri())
        expect(page.get_by_role("img", name=re.compile("Twelve slots.*Placed: F0 F1 F2 B0"))).to_be_visible()
        page.screenshot(path=SCREENSHOTS / "board-without-script.png", full_page=True)
        expect(page.locator(".pt-board")).to_have_count(0)


def test_a_board_works_in_an_ordinary_page_of_nbconvert(place):
    """Which wants a network for other things, and has none here; its widgets' manager is not asked for."""
    pages_with(place, board(THREE))
    body, _ = HTMLExporter().from_filename(place / "notebooks" / "00_one.ipynb")
    (place / "plain.html").write_text(body)
    with browser(place) as page:
        asked = offline(page)
        page.goto((place / "plain.html").as_uri())
        here = page.get_by_role("region", name="Board: Twelve slots")
        here.get_by_role("button", name="F0").click()
        expect(here.get_by_role("status")).to_have_text("F0 placed on rank 0.")
        screenshot(page, "board-plain")
        assert not [url for url in asked if "widget" in url], asked


def test_what_is_placed_in_jupyterlab_is_there_in_python(place):
    sources = [
        "from pipetutor.figures.board import board\n\nyours = board(ranks=2, micro_batches=2)\nyours",
        "from pipetutor.schedule.rules import check\n\ncheck(yours.streams)\nprint(yours.text)",
        'yours.text = "F0 B0 F1 B1 / F0 B0 F1 B1"',
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=[new_code_cell(each) for each in sources], metadata={"kernelspec": kernel})
    with jupyterlab(place, "board.ipynb", notebook) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        cell_of(page, 0).locator(".jp-InputArea-editor").click()
        page.keyboard.press("Shift+Enter")
        here = cell_of(page, 0).get_by_role("region", name="Board")
        expect(here).to_have_count(1, timeout=STARTED * 1000)  # not also as a page without a kernel has it
        here.get_by_role("gridcell", name="Here goes the next pass of rank 0").click()
        page.keyboard.type("b0bf0f1")
        expect(here.get_by_role("status")).to_have_text("F1 placed on rank 0.")
        page.keyboard.press("ArrowDown")
        page.keyboard.type("F0B0F1B1")
        page.keyboard.press("ArrowUp")
        page.keyboard.press("End")
        page.keyboard.type("B0B1")
        expect(here.get_by_role("status")).to_have_text("B1 placed on rank 0. Complete in 6 slots.")
        assert page.locator(".jp-Notebook .jp-Cell").count() == len(sources), "JupyterLab took a key of the board"
        screenshot(page, "board-lab-1")
        cell_of(page, 1).locator(".jp-InputArea-editor").click()
        page.keyboard.press("Shift+Enter")
        expect(cell_of(page, 1).locator(".jp-OutputArea-output")).to_have_text(
            re.compile(r"^F0 F1 \. +B0 \. +B1\n\. +F0 B0 F1 B1 \.\s*$")
        )
        page.keyboard.press("Shift+Enter")
        expect(here.get_by_role("textbox")).to_have_value(re.compile(r"^F0 \. +\. +B0 F1"))
        choose(page, "Settings", "Theme", "JupyterLab Dark")
        expect(page.locator("body")).to_have_attribute("data-jp-theme-name", "JupyterLab Dark")
        expect(page.locator("#jupyterlab-splash")).to_have_count(0)
        screenshot(page, "board-lab-2-dark")
        hosts = {urlsplit(url).hostname for url in asked if url.startswith(("http", "ws"))}
        assert hosts <= {"localhost", "127.0.0.1"}, hosts
