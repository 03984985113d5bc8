"""docs/sources.md holds every row of the five systems and names only what exists."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/sources.md").read_text()
ROWS = {"M": 24, "A": 47, "R": 24, "S": 26, "T": 33}
FINDINGS = {"F": 13, "P": 6}
WORK = ("LoRA on experts",)
HERE = re.compile(rf"built|later: ({'|'.join(WORK)})|not built: \S.{{10,}}")
TABLE = [
    [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in PAGE.splitlines()
    if re.match(r"\| [A-Z]\d+ \|", line)
]
BY_ID = {cells[0]: cells for cells in TABLE}
SOURCES = [cells for cells in TABLE if cells[0][0] in ROWS]
CITED = sorted(set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", PAGE)))
A_TEST = re.compile(r"`tests/[\w/]+\.py::test_\w+`")
FILES = sorted(set(re.findall(r"`((?!tests/)[\w/]+\.py)`", PAGE)))


@functools.cache
def functions_of(path):
    tree = ast.parse((ROOT / path).read_text())
    functions = (node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return {name for name in functions if name.startswith("test_")}


def test_every_row_is_there_once_and_in_order():
    wanted = [f"{letter}{n}" for letter, last in (ROWS | FINDINGS).items()
              for n in range(1, last + 1)]  # fmt: skip
    assert [cells[0] for cells in TABLE] == wanted


@pytest.mark.parametrize("cells", SOURCES, ids=[cells[0] for cells in SOURCES])
def test_a_row_says_what_became_of_it(cells):
    assert len(cells) == 4, "a | inside a cell would cut it"
    _, what, here, where = cells
    assert what
    assert HERE.fullmatch(here), here
    assert here != "built" or A_TEST.search(where), "built is what a test holds"


@pytest.mark.parametrize("row", [f"F{n}" for n in range(1, 14)] + [f"P{n}" for n in range(1, 7)])
def test_findings_name_a_test(row):
    cells = BY_ID[row]
    assert len(cells) == (4 if row[0] == "F" else 3)
    assert all(cells)
    assert A_TEST.search(cells[-1])


def test_enough_is_cited():
    assert len(CITED) > 150
    assert len(FILES) > 20
    assert PAGE.count("`tests/") == len(A_TEST.findall(PAGE)), "a file alone says too little"


@pytest.mark.parametrize("cited", CITED)
def test_cited_tests_exist(cited):
    path, _, name = cited.partition("::")
    assert (ROOT / path).is_file(), path
    assert name in functions_of(path)


@pytest.mark.parametrize("path", FILES)
def test_cited_files_exist(path):
    assert (ROOT / "moe_builders" / path).is_file()
