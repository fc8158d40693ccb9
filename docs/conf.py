"""Configuration of the site that `make docs` builds; CONTRIBUTING.md says how."""

from __future__ import annotations

import sys
from pathlib import Path

import rnnkernels

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "rnnkernels"
version = release = rnnkernels.__version__
copyright = "the authors of rnnkernels, Apache-2.0"
root_doc = "index"
exclude_patterns = ["_extensions"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "repository_pages",
]

# Every reference has to lead somewhere: -W makes what this finds an error.
nitpicky = True
# torch, Python and NumPy are documented elsewhere, and a build does not ask the network where.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|np|pathlib|collections|typing|types|contextlib|triton|onnx)\..*"),
    (r"py:.*", r"(int|float|bool|str|bytes|object|None|optional|Ellipsis|ellipsis|EllipsisType)"),
    (r"py:exc", r"[A-Z]\w*(Error|Exception|Warning)"),
    (r"py:class", r"(Tensor|PackedSequence|ndarray|Path|Iterator|Callable|Any|Axes)"),
    # Names of types that stand for a few of Python's, and what is inside of the package.
    (r"py:class", r"(dict\[str|tuple\[.*|Array|.*\._Norms|.*\.LayerWeights)"),
    (r"py:class", r"(GradClip|Truncate|Zoneout)"),
    (r"py:class", r"rnnkernels\.streaming\._(chunks\.S|runner\.K)"),
    (r"py:class", r".*\.DefinedCell"),
    (r"py:data", r"rnnkernels\.cells\.CELLS"),
]

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "html_image"]

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
autosummary_generate = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Call"]
default_role = "code"
highlight_language = "text"  # of a block that names none
rst_prolog = ".. highlight:: python\n\n"  # of those in docstrings

copybutton_exclude = ".linenos, .gp, .go"

html_theme = "pydata_sphinx_theme"
html_title = f"rnnkernels {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
# Pages without others below them have no use for a list of these.
html_sidebars = {page: [] for page in ("install", "quickstart")}
html_theme_options = {
    "logo": {"text": "rnnkernels"},
    "header_links_before_dropdown": 8,
    "navigation_with_keys": False,
    "show_nav_level": 1,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "navbar_end": ["theme-switcher"],
}
