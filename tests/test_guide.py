"""docs/guide.md: every example gives what it shows, and no section needs another."""

import doctest
import re
import warnings
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"
if not GUIDE.is_file():
    pytest.skip("the tests are not in a checkout", allow_module_level=True)

# A fence would pass for the output of the example above it; an empty line ends that.
TEXT = re.sub("^```.*$", "", GUIDE.read_text(), flags=re.MULTILINE)
COMMON, *SECTIONS = re.split("^## ", TEXT, flags=re.MULTILINE)


def title(section):
    return section.partition("\n")[0]


@pytest.mark.parametrize("section", SECTIONS, ids=title)
def test_section(section):
    between = "\n" * TEXT[len(COMMON) : TEXT.index(section)].count("\n")  # the lines of a report
    parser, report = doctest.DocTestParser(), []
    test = parser.get_doctest(COMMON + between + section, {}, title(section), str(GUIDE), 0)
    assert len(test.examples) > len(parser.get_examples(COMMON))
    with warnings.catch_warnings():  # an example may set a filter
        doctest.DocTestRunner().run(test, out=report.append)
    assert not report, "".join(report)
