"""What documents link to outside of docs/: other documents become the pages that they are on this
site, sources become pages with their text, records of measurements files to download."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.highlighting import PygmentsBridge
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: Documents of the repository, and the pages that hold them.
PAGES = {
    "README.md": "index",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "tests/README.md": "tests",
}
#: The folders that links of such pages start from.
FOLDERS = {page: (ROOT / name).parent for name, page in PAGES.items() if page != "index"}
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".cu": "cpp", ".cuh": "cpp"}


class LeadsIntoRepository(SphinxTransform):
    """Takes what MyST made of such links, before Sphinx collects downloads."""

    default_priority = 20

    def apply(self, **_: Any) -> None:
        made = addnodes.download_reference, addnodes.pending_xref
        for node in [n for kind in made for n in self.document.findall(kind)]:
            path = self.target(node) if node.get("reftype") == "myst" else None
            if path is None or path.suffix == ".json":
                continue
            if path.is_relative_to(DOCS):
                page = path.relative_to(DOCS).with_suffix("").as_posix()
                anchor = node.get("reftargetid") or node["reftarget"].partition("#")[2] or None
                node.attributes.update(refdomain="doc", reftarget=page, reftargetid=anchor)
                continue
            name = path.relative_to(ROOT).as_posix()
            reference = addnodes.pending_xref(
                "", *node.children, refdomain=None, reftype="repository", reftarget=name,
                refdoc=self.env.docname, refexplicit=True, refwarn=True,
                anchor=node.get("reftargetid") if name != "README.md" else None,
            )  # fmt: skip
            node.replace_self(reference)
            if name not in PAGES:
                collected(self.env).setdefault(self.env.docname, set()).add(name)

    def target(self, node: nodes.Element) -> Path | None:
        """The file or folder that only we know: outside of docs/, or linked to from outside. MyST
        leaves the suffix of a document away."""
        page = self.env.docname
        start = FOLDERS.get(page, Path(self.env.doc2path(page)).parent)
        link = node["reftarget"].partition("#")[0] + ".md" * (node["refdomain"] == "doc")
        path = (start / link).resolve()
        inside = path.is_relative_to(ROOT) and (page in FOLDERS or not path.is_relative_to(DOCS))
        return path if inside and path.exists() else None


def collected(env: BuildEnvironment) -> dict[str, set[str]]:
    """Of each document, the sources that it links to."""
    if not hasattr(env, "repository_links"):
        env.repository_links = {}
    return env.repository_links


def forget(_: Sphinx, env: BuildEnvironment, docname: str) -> None:
    collected(env).pop(docname, None)


def merge(_: Sphinx, env: BuildEnvironment, docnames: list[str], other: BuildEnvironment) -> None:
    collected(env).update({name: collected(other).get(name, set()) for name in docnames})


def resolve(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    if node["reftype"] != "repository":
        return by_last_name(app, env, node) if node["refdomain"] == "py" else None
    page = PAGES.get(node["reftarget"], f"source/{node['reftarget']}")
    uri = app.builder.get_relative_uri(node["refdoc"], page)
    uri += f"#{node['anchor']}" * bool(node["anchor"])
    return nodes.reference("", "", *node.children, internal=True, refuri=uri)


def by_last_name(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref
) -> nodes.reference | None:
    """A class or function as its own module names it, by the public name that it is found under."""
    last = node["reftarget"].rpartition(".")[2]
    objects = env.domains.python_domain.objects
    found = [n for n in objects if n.startswith("rnnkernels.") and n.rpartition(".")[2] == last]
    if not found or not node["reftarget"].startswith(("rnnkernels.", last)):
        return None
    name = min(found, key=lambda n: (n.count("."), n))
    entry = objects[name]
    uri = app.builder.get_relative_uri(node["refdoc"], entry.docname)
    return nodes.reference("", "", *node.children, internal=True, refuri=f"{uri}#{entry.node_id}")


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    names = set().union(*collected(app.env).values())
    folders = {name for name in names if (ROOT / name).is_dir()}
    for folder in sorted(folders):
        files = sorted(p for p in (ROOT / folder).iterdir() if p.suffix in LANGUAGES)
        names.update(path.relative_to(ROOT).as_posix() for path in files)
        links = "\n".join(
            f'<li><a href="{posixpath.basename(folder)}/{path.name}.html">{path.name}</a></li>'
            for path in files
        )
        yield page(folder, f"<ul>\n{links}\n</ul>")
    bridge: PygmentsBridge = app.builder.highlighter  # type: ignore[attr-defined]
    for name in sorted(names - folders):
        text = (ROOT / name).read_text("utf-8")
        language = LANGUAGES.get(Path(name).suffix, "text")
        yield page(name, bridge.highlight_block(text, language, location=name))


def page(name: str, body: str) -> tuple[str, dict[str, Any], str]:
    context = {"title": name, "body": f"<h1>{name}</h1>\n{body}", "theme_secondary_sidebar": []}
    return f"source/{name}", context, "page.html"


def adapt_docstring(_: Sphinx, *described: Any) -> None:
    """A docstring names a document as a file; here it is a page. A summary that ends with a formula
    is a sentence of its own, since lists of names show it alone."""
    lines = described[-1]
    end = lines.index("") if "" in lines else len(lines)
    if end and lines[end - 1].endswith("::"):
        lines[end - 1 : end] = [lines[end - 1].removesuffix("::") + ".", "", "::"]
    lines[:] = [re.sub(r"\bdocs/(\w+)\.md\b", r":doc:`/\1`", line) for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_transform(LeadsIntoRepository)
    app.connect("autodoc-process-docstring", adapt_docstring)
    app.connect("env-purge-doc", forget)
    app.connect("env-merge-info", merge)
    app.connect("missing-reference", resolve)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "env_version": 1}
