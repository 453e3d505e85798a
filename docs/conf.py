"""The site: README.md, docs/ and the docstrings, with links checked.

``sphinx-build -W -c docs . build/site`` builds it, from the root, so that one page may link another
wherever it lies, on the site as in the repository. Nothing is fetched while it builds.
"""

from pathlib import Path

from sphinx.application import Sphinx

import cbn

project = "cbn"
author = "The cbn developers"
release = cbn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**"]
exclude_patterns = [".*", "build"]
nitpicky = True  # a name that leads nowhere is an error
myst_heading_anchors = 3

# Docstrings say types in words, so signatures need not repeat them.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
numpydoc_show_class_members = False
# Every parameter is documented, under its own name, and every section is one that numpydoc knows.
numpydoc_validation_checks = {"GL06", "GL07", "GL08", "PR01", "PR02", "PR10", "SS01"}

html_theme = "furo"
html_title = f"cbn {release}"
html_copy_source = False

CONTENTS = """
```{toctree}
:hidden:
docs/guide
docs/reference/index
docs/numerics
docs/performance
docs/deployment
docs/architecture
CONTRIBUTING
CHANGELOG
```
"""


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Add the table of contents to the front page, where a forge would show it as code."""
    if page == root_doc:
        source[0] += CONTENTS


def add_index(app: Sphinx, error: Exception | None) -> None:
    """Lead from the address of the site to its front page."""
    if error is None and app.builder.format == "html":
        page = f'<meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
        Path(app.outdir, "index.html").write_text(page)


def setup(app: Sphinx) -> None:
    """Connect the two."""
    app.connect("source-read", add_contents)
    app.connect("build-finished", add_index)
