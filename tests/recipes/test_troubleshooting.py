"""Every row of docs/troubleshooting.md comes about, and the program says what the page says."""

import pytest
from helpers_data import isolate_datasets
from helpers_troubleshooting import (
    PAGE,
    SETUPS,
    come_about,
    make_base,
    make_place,
    matches,
    rows_of,
    run,
    shown,
)  # fmt: skip

TEXT = PAGE.read_text(encoding="utf-8")
ROWS = rows_of(TEXT)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    make_base(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, base):
    """The folder that the page's examples are typed in."""
    isolate_datasets(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    make_place(tmp_path, base, TEXT)
    return tmp_path


def test_the_page_is_long_enough_and_uses_every_setup():
    assert len(ROWS) >= 45
    assert len({row.typed for row in ROWS}) == len(ROWS)
    unused = [words for words in SETUPS if not any(words in row.typed for row in ROWS)]
    assert not unused


def test_the_example_itself_trains(place, capsys):
    for config in ("my.yaml", "chats.yaml"):
        assert run(["--config", config, f"output_dir=out/{config}"], capsys)[0] == 0


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"line {row.number}")
def test_the_program_says_what_the_page_says(row, place, monkeypatch, capsys):
    argv = come_about(row, place, monkeypatch)
    code, err, out = run(argv, capsys)
    said = [shown(line, place) for line in ([*err[-1:]] if code == 2 else [*err, *out])]
    assert code == row.code, said
    assert any(matches(row.says, line) for line in said), said
    if code == 2:
        assert err[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("says", "line", "same"),
    [
        ("a … (b)", "a 12 (b)", True),
        ("a … (b)", "a 12 (b) c", False),
        ("a", "a", True),
        ("a", "b a", False),
        ("a.c", "abc", False),
    ],
)
def test_matching_by_hand(says, line, same):
    assert matches(says, line) is same
