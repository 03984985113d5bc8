"""What is found behind an error of datasets: by hand."""

import pytest

from moe_builders.data.repairs import broken_line, builder_of, unknown_argument

TEXTS = "torchtune.datasets.text_completion_dataset"


@pytest.mark.parametrize(
    ("source", "builder"),
    [
        ("jsonl", "json"), ("txt", "text"), ("json", None), ("csv", None), ("org/name", None),
        ("a.jsonl", "json"), ("b.dat", None), ("folder.json", None), ("gone.jsonl", None),
        (None, None), (3, None),
    ],
)  # fmt: skip
def test_the_reader_that_a_source_means(tmp_path, monkeypatch, source, builder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    for name in ("a.jsonl", "b.dat"):
        (tmp_path / name).touch()
    assert builder_of(source) == builder


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"a": 1}\n\n{"a": 2}\n', None),
        ('{"a": 1}\n\n{"a": \n', "line 3 is not JSON (Expecting value): mend it"),
        ('[\n{"a": 1}\n]\n', None),
        ('{\n"a": 1\n}\n', None),
        ('\n{"a": 1}\nend\n', "line 3 is not JSON (Expecting value): mend it"),
        ("", None),
    ],
)
def test_the_line_that_is_no_json(tmp_path, content, says):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    assert broken_line({"source": "json", "data_files": str(path)}) == says
    assert broken_line({"source": "text", "data_files": str(path)}) is None


@pytest.mark.parametrize("several", [list, lambda paths: {"train": paths[:1], "test": paths[1]}])
def test_the_file_is_named_among_several(tmp_path, several):
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"a": 1}\nx\n')
    says = broken_line({"source": "json", "data_files": several(paths)})
    assert says == f"line 2 of {paths[1]} is not JSON (Expecting value): mend it"
    assert broken_line({"source": "json", "data_files": str(tmp_path / "gone*.jsonl")}) is None
    assert broken_line({"source": "json"}) is None


@pytest.mark.parametrize(
    "message",
    ["BuilderConfig JsonConfig doesn't have a 'colum' key.",
     "JsonConfig.__init__() got an unexpected keyword argument 'colum'"],
)  # fmt: skip
def test_an_argument_that_nobody_knows(message):
    says = unknown_argument(message, {"_component_": TEXTS})
    assert says == "there is no argument 'colum' (did you mean 'column'?)"
    assert unknown_argument("something else", {"_component_": TEXTS}) is None
