r"""Make web pages of the executed notebooks, in build/html: the course as it ran here, to read and to print.

    python tools/build_html.py      # make html, which runs first what has no executed copy

One page a lesson, the map (notebooks/index.md) and, where there is one, the glossary. nbconvert renders them with
the template in tools/html. A page needs no network, follows the reader's choice of light or dark, and can be used
with a screen reader: ``problems`` says what would keep it from that, and any is an error. It needs no script either:
the one that it may hold makes boards of figures.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urldefrag

import nbformat
from bs4 import BeautifulSoup, NavigableString, Tag
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook
from pygments.formatters import HtmlFormatter

import course
from pipetutor.figures.board import MOUNT

TEMPLATE = Path(__file__).parent / "html"
HYPHENATED = re.compile(r"(\S*-\S+)")
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
LOADING = {  # element -> attributes that make a browser fetch something
    "script": ["src"],
    "link": ["href"],
    "img": ["src", "srcset"],
    "source": ["src", "srcset"],
    "iframe": ["src"],
    "video": ["src", "poster"],
    "audio": ["src"],
    "embed": ["src"],
    "object": ["data"],
    "input": ["src"],
    "use": ["href", "xlink:href"],
    "image": ["href", "xlink:href"],
}


@dataclass
class Page:
    """A page to be: where it goes, what it is called, and the notebook that it shows."""

    href: str
    title: str
    notebook: NotebookNode


def style() -> str:
    """Return the style sheet, with the colours of code for light and for dark."""
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    plain = "\n.highlight { background: var(--field); }\n"
    layout = (TEMPLATE / "style.css").read_text()
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}{plain}{layout}"


def slug(text: str) -> str:
    """Return what the anchors of a heading have in common on GitHub, in JupyterLab and in nbconvert."""
    return re.sub(r"[^\w-]", "", text.strip().lower().replace(" ", "-"))


def pages(executed: Path, sources: Path) -> list[Page]:
    """Collect the pages: the map, the lessons in their order, the glossary.

    Raises:
        ValueError: a lesson was not executed.
    """
    lessons = course.lessons(sources)
    missing = [one.name for one in lessons if not (executed / one.path.name).exists()]
    if missing:
        raise ValueError(f"no executed copy of {', '.join(missing)}: make run")
    found = [
        Page(f"{one.name}.html", one.title, nbformat.read(executed / one.path.name, as_version=4)) for one in lessons
    ]
    for name, place in (("index", 0), ("glossary", len(found) + 1)):
        path = sources / f"{name}.md"
        if path.exists():
            text = path.read_text()
            title = re.search(r"^# (.+)$", text, re.MULTILINE)
            page = new_notebook(cells=[new_markdown_cell(text)])
            found.insert(place, Page(f"{name}.html", title[1] if title else name, page))
    return found


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Return a cell's outputs with each run of pieces of one stream as one, as JupyterLab shows them."""
    found: list[NotebookNode] = []
    for output in outputs:
        if found and output.output_type == "stream" and found[-1].get("name") == output.name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def render(found: list[Page]) -> dict[str, BeautifulSoup]:
    """Render the pages, each with links to its neighbours, and link them to each other."""
    exporter = HTMLExporter(
        template_name=TEMPLATE.name,
        extra_template_basedirs=[str(TEMPLATE.parent)],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        embed_images=True,
        preprocessors=[],
    )
    lessons = [page for page in found if page.href not in ("index.html", "glossary.html")]
    glossary = len(found) > len(lessons) and found[-1].href == "glossary.html"
    sheet, soups = style(), {}
    for page in found:
        place = lessons.index(page) if page in lessons else -1
        for cell in page.notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = joined(cell.outputs)
        about = {
            "href": page.href,
            "title": page.title if page.href == "index.html" else f"{page.title} · Pipetutor",
            "style": sheet,
            "glossary": glossary,
            "previous": lessons[place - 1] if place > 0 else None,
            "next": lessons[place + 1] if page.href != "glossary.html" and place + 1 < len(lessons) else None,
        }
        body, _ = exporter.from_notebook_node(page.notebook, resources={"page": about})
        soups[page.href] = BeautifulSoup(body, "html.parser")
        _polish(soups[page.href])
    for soup in soups.values():
        _link(soup, soups)
    return soups


def _polish(soup: BeautifulSoup) -> None:
    seen: set[str] = set()
    for tag in soup.find_all(id=True):
        name, number = tag["id"], 2
        while tag["id"] in seen:
            tag["id"], number = f"{name}-{number}", number + 1
        seen.add(tag["id"])
        if (anchor := tag.find("a", class_="anchor-link")) and tag.name in HEADINGS:
            anchor["href"], anchor["aria-label"] = f"#{tag['id']}", "Link to this section"
    _one_module(soup)
    for pre in soup.find_all("pre"):
        pre["tabindex"] = "0"  # so that a long line can be scrolled without a mouse
    for pre in soup.select(".output_subarea pre"):
        for text in pre.find_all(string=HYPHENATED):  # whose words a browser would break: --flag into -- and flag
            words = [NavigableString(part) for part in HYPHENATED.split(text)]
            text.replace_with(*words)
            for word in words[1::2]:
                word.wrap(soup.new_tag("span", attrs={"class": "word"}))
    for table in soup.find_all("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "scroll"}))
    sections, title = soup.find_all("h2"), soup.find("h1")
    if len(sections) > 2 and title:
        entries = "".join(f'<li><a href="#{h["id"]}">{_words(h)}</a></li>' for h in sections if h.get("id"))
        contents = f'<details class="contents"><summary>On this page</summary><ul>{entries}</ul></details>'
        after = title.find_next_sibling("p") or title
        after.insert_after(BeautifulSoup(contents, "html.parser"))


def _one_module(soup: BeautifulSoup) -> None:
    """Leave one module for all boards of a page: that of today, at its end."""
    modules = soup.select("script[data-pipetutor-module]")
    for module in modules[1:]:
        module.decompose()
    if modules:
        modules[0].string = MOUNT
        soup.body.append(modules[0].extract())


def _words(heading: Tag) -> str:
    anchor = heading.find("a", class_="anchor-link")
    return "".join(str(part) for part in heading.contents if part is not anchor)


def _link(soup: BeautifulSoup, soups: dict[str, BeautifulSoup]) -> None:
    """Turn links to notebooks and markdown files into links to their pages, those to other files into plain text."""
    here = next(href for href, other in soups.items() if other is soup)
    for anchor in soup.find_all("a", href=True):
        path, fragment = urldefrag(anchor["href"])
        if re.match(r"[a-z]+:|//", path):
            continue
        target = re.sub(r"\.(ipynb|md)$", ".html", path.removeprefix("./")) or here
        if target not in soups:
            anchor.unwrap()
            continue
        ids = {slug(tag["id"]): tag["id"] for tag in soups[target].find_all(id=True)}
        end = f"#{ids.get(slug(fragment), fragment)}" if fragment else ""
        anchor["href"] = end if target == here and end else target + end


def fetched(soup: BeautifulSoup) -> Iterator[str]:
    """Yield everything that a browser would fetch for a page, or already holds in it (``data:``)."""
    for name, attributes in LOADING.items():
        for tag in soup.find_all(name):
            for attribute in attributes:
                if given := tag.get(attribute):
                    yield from re.split(r"\s*,\s+", given) if attribute == "srcset" else [given]
    sheets = [tag.get_text() for tag in soup.find_all("style")] + [tag["style"] for tag in soup.find_all(style=True)]
    for sheet in sheets:
        yield from re.findall(r"url\(\s*[\"']?([^\"')]+)", sheet)
        yield from re.findall(r"@import\s+[\"']([^\"']+)", sheet)


def scripts(soup: BeautifulSoup) -> list[Tag]:
    """Return the scripts of a page beside those of its boards."""
    of_boards = soup.select('[data-pipetutor-board] > script[type="application/json"]')
    known = {id(tag) for tag in of_boards}
    return [tag for tag in soup.find_all("script") if id(tag) not in known and tag.string != MOUNT]


def problems(soups: dict[str, BeautifulSoup]) -> list[str]:
    """Say what is wrong with the pages: requests, scripts, missing words for pictures, headings, links."""
    found = []
    ids = {href: [tag["id"] for tag in soup.find_all(id=True)] for href, soup in soups.items()}
    for href, soup in soups.items():
        said = [f"fetches {url[:80]}" for url in fetched(soup) if not url.startswith(("data:", "#"))]
        said += ["holds a script"] * bool(scripts(soup))
        said += ["holds the module of boards twice"] * (len(soup.select("script[data-pipetutor-module]")) > 1)
        pictures = soup.select('svg[role="img"]:not([aria-label])')
        said += [f"a picture without words for it: {str(tag)[:60]}" for tag in pictures]
        said += [
            f"a picture without words for it: {str(tag)[:60]}" for tag in soup.find_all("img") if not tag.get("alt")
        ]
        said += [f"{len(soup.find_all('h1'))} headings of the first order"] * (len(soup.find_all("h1")) != 1)
        said += [f"the heading {tag.get_text()!r} has no id" for tag in soup.find_all(HEADINGS) if not tag.get("id")]
        said += [f"the id {name} twice" for name in sorted(set(ids[href])) if ids[href].count(name) > 1]
        said += ["says no language"] * (not soup.html or not soup.html.get("lang"))
        for anchor in soup.find_all("a", href=True):
            target, fragment = urldefrag(anchor["href"])
            if not re.match(r"[a-z]+:|//", target):
                known = ids.get(target or href)
                if known is None or (fragment and fragment not in known):
                    said.append(f"a link that leads nowhere: {anchor['href']}")
        found += [f"{href}: {one}" for one in said]
    return found


def build(executed: Path, sources: Path, output: Path) -> list[str]:
    """Write the pages and return their problems."""
    soups = render(pages(executed, sources))
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob("*.html"):
        old.unlink()
    for href, soup in soups.items():
        (output / href).write_text(str(soup))
    return problems(soups)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executed", type=Path, default=course.ROOT / "build" / "notebooks")
    parser.add_argument("--output", type=Path, default=course.ROOT / "build" / "html")
    options = parser.parse_args()
    try:
        said = build(options.executed, course.NOTEBOOKS, options.output)
    except ValueError as problem:
        sys.exit(str(problem))
    print(f"{len(list(options.output.glob('*.html')))} pages in {options.output}; begin at index.html")
    if said:
        sys.exit("\n".join(said))
