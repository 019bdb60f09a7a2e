"""The course as a learner has it: JupyterLab in Chromium, with a mouse and a keyboard. ``make browser`` runs these.

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

import nbformat
import psutil
import pytest
from conftest import processes_of, wait_until
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from playwright.sync_api import Locator, Page, expect, sync_playwright

import build_html
from pipetutor.processes.environment import free_port

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
def browser(place: Path) -> Iterator[Page]:
    """Give the page of a Chromium that nobody has used before."""
    found = shutil.which("chromium")
    assert found, "Chromium is missing: apt-get install chromium"
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            place / "chromium",
            executable_path=found,
            args=FLAGS,
            viewport={"width": 1280, "height": 900},
            env={**os.environ, "HOME": str(place)},
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
        bar.scroll_into_view_if_needed()
        expect(bar).to_be_in_viewport()
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
