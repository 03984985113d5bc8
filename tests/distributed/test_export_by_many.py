"""Two, three and four (ep 2) processes write the same bytes as one, each a part of the files."""

import pytest
from helpers_export import CARRIED, CONFIGS, carried_rows, write_source
from helpers_train import on_ranks
from hf_helpers import read_tensors

from moe_builders.checkpoint import own
from moe_builders.hub import load_hf_model, save_hf_model


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Sources, their exports by one process, and by 2, 3 (8 experts: 3, 3, 2), 4 (ep 2)."""
    folder = tmp_path_factory.mktemp("exports")
    with carried_rows(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "MAX_FILE_BYTES", 120_000)
        for name in CONFIGS:
            source = write_source(folder / name, name)
            model, found = load_hf_model(source)
            save_hf_model(model, folder / f"{name}_1", source=found)
            own.save_model(model, folder / f"{name}_1_own")
    answers = {}
    for size, mesh in {2: (), 3: (), 4: (2, 2)}.items():
        cases = {
            name: ("helpers_export.export", str(folder / name), str(folder / f"{name}_{size}"),
                   *mesh)
            for name in CONFIGS
        }  # fmt: skip
        if size == 2:
            cases |= {
                kind: ("helpers_export.export_with_an_error", str(folder / "qwen3_moe"),
                       str(folder / kind), kind)
                for kind in ("write", "carried", "gone")
            }  # fmt: skip
        answers[size] = on_ranks(size, cases, folder)
    return folder, answers


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("suffix", ["", "_own"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_bytes_as_from_one_process(exports, name, size, suffix):
    folder, _ = exports
    alone, together = (bytes_of(folder / f"{name}_{n}{suffix}") for n in (1, size))
    assert together == alone
    assert sum(file.endswith(".safetensors") for file in alone) > size, "more than one round"
    if not suffix:
        tensors = read_tensors((folder / name).glob("*.safetensors"))
        written = read_tensors((folder / f"{name}_{size}").glob("*.safetensors"))
        assert written.keys() == tensors.keys()
        assert all(bool((written[n][1] == tensors[n][1]).all()) for n in tensors)
        assert (CARRIED in written) == (name == "qwen3_moe")


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_process_holds_its_file_and_a_part_of_one_parameter(exports, name, size):
    folder, answers = exports
    files = [file.stat().st_size for file in (folder / name).glob("*.safetensors")]
    tensors = [t.nbytes for _, t in read_tensors((folder / name).glob("*.safetensors")).values()]
    parameter = 8 * 64 * 64 * 4  # of 8 experts: in one tensor on disk, or in 16
    for peak in answers[size][name]["peak"]:
        assert 0 < peak <= max(files) + parameter + 1024  # and numbers on the way
        assert peak < sum(tensors) / 2
    # each element is sent once, or was where it was needed
    assert 0 < sum(answers[size][name]["received"]) < sum(tensors)


def test_what_the_second_process_cannot_do_is_raised_on_both(exports):
    folder, answers = exports
    wanted = {"write": "No space left on device", "carried": "the source is damaged",
              "gone": "which this model came from, is gone"}  # fmt: skip
    for kind, sentence in wanted.items():
        first, second = answers[2][kind]
        assert first == second
        assert sentence in first
        assert not list(folder.glob(f"{kind}*"))
        assert not list(folder.glob(f".{kind}*"))
