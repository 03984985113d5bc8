"""Streams: the same rows on any number of processes, in windows, and from any place on."""

import json
import tracemalloc
from collections import Counter

import datasets
import pytest
import torch
from helpers_data import CHATML, chat_node, text_node, write_jsonl, write_tokenizer
from test_resume_sized import all_same, samples_of
from torch.utils.data._utils.pin_memory import pin_memory

from moe_builders.data.batch import Batch
from moe_builders.data.build import build_loader
from moe_builders.data.loader import Batching, total_steps
from moe_builders.data.order import permutation
from moe_builders.data.stream_loader import StreamLoader
from moe_builders.data.tokenizer import HFTokenizer
from moe_builders.errors import InputError

N = 23
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return HFTokenizer(write_tokenizer(tmp_path_factory.mktemp("tok"), template=CHATML))


def texts(n=N, word="w"):
    """Texts of unequal length that all differ."""
    return [f"{word}{i} " + "ab " * (i * 7 % 5) for i in range(n)]


@pytest.fixture
def file(tmp_path):
    return write_jsonl(tmp_path / "texts.jsonl", [{"text": t} for t in texts()])


def stream(path, **changes):
    return text_node(path, streaming=True, **changes)


def loader_of(node, tokenizer, *, seed=3, shuffle=True, long_samples="truncate", window=5,
              validation=False, **changes):  # fmt: skip
    batching = Batching(**({"batch_size": 1, "max_seq_len": 12, "pad_id": 0} | changes))
    return build_loader(node, tokenizer, batching, seed=seed, shuffle=shuffle,
                        long_samples=long_samples, shuffle_window=window,
                        validation=validation)  # fmt: skip


def rows_of(steps):
    return [batch.tokens[i][batch.mask[i]].tolist()
            for step in steps for batch in step for i in range(len(batch.tokens))]  # fmt: skip


def test_a_stream_holds_what_the_sized_set_holds(tokenizer, file):
    """In windows that are shuffled by seed, pass and number."""
    whole = [tokenizer.encode(t) for t in texts()]
    loader = loader_of(stream(file), tokenizer, shuffle=False, max_seq_len=64)
    assert isinstance(loader, StreamLoader)
    assert rows_of(loader.steps(epochs=2)) == whole * 2
    shuffled = rows_of(loader_of(stream(file), tokenizer, max_seq_len=64).steps(epochs=2))
    wanted = []
    for number in range(2):
        for start in range(0, N, 5):
            size = min(5, N - start)
            order = permutation(size, seed=3, key=[number, 1, start // 5])
            wanted += [whole[start + at] for at in order]
    assert shuffled == wanted
    other = rows_of(loader_of(stream(file), tokenizer, seed=4, max_seq_len=64).steps(epochs=1))
    assert sorted(other) == sorted(whole)
    assert other != shuffled[:N]


def test_packed_rows_of_a_stream_are_those_of_the_sized_set(tokenizer, file):
    for split in (True, False):
        for long_samples in ("truncate", "split"):
            node = {"packed": True, "split_across_pack": split}
            options = {"shuffle": False, "long_samples": long_samples, "max_seq_len": 10}
            steps = loader_of(stream(file, **node), tokenizer, **options).steps(epochs=1)
            sized = loader_of(text_node(file, **node), tokenizer, **options).steps(epochs=1)
            assert all_same(list(steps), list(sized)), "windows leave no border"


def test_unpacked_split_streams_give_every_part_a_row(tokenizer, file):
    options = {"shuffle": False, "long_samples": "split", "max_seq_len": 6}
    sized = list(loader_of(text_node(file), tokenizer, **options).steps(epochs=1))
    assert len(sized) > N
    assert all_same(list(loader_of(stream(file), tokenizer, **options).steps(epochs=1)), sized)
    assert sum(batch.num_cut for step in sized for batch in step) == sum(
        len(tokenizer.encode(t)) > 6 for t in texts()
    )


def test_longer_samples_of_a_stream_are_refused(tokenizer, file):
    with pytest.raises(InputError, match=r"dataset: sample \d+ has \d+ tokens, but max_seq_len is"):
        list(loader_of(stream(file), tokenizer, long_samples="refuse",
                       max_seq_len=8).steps(epochs=1))  # fmt: skip


@pytest.fixture
def kinds(tmp_path, file):
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": t} for t in texts(7, "other")])
    pack = {"packed": True, "split_across_pack": False}
    return {
        "plain": stream(file), "packed": stream(file, packed=True), "whole": stream(file, **pack),
        "split": stream(file),
        "mixed": [stream(file, weight=2), text_node(other, weight=1)],
        "mixed packed": [stream(file, weight=2, **pack), stream(other, weight=1, **pack)],
    }  # fmt: skip


KINDS = ("plain", "packed", "whole", "split", "mixed", "mixed packed")


@pytest.mark.parametrize("kind", KINDS)
def test_any_step_can_be_gone_back_to(tokenizer, kinds, kind):
    options = {"long_samples": "split"} if kind == "split" else {}
    epochs, stops = (1, 30) if "mixed" in kind else (2, None)

    def steps_of(loader, n=None):
        steps = loader.steps(epochs=epochs)
        return list(steps) if n is None else [next(steps) for _ in range(n)]

    straight = steps_of(loader_of(kinds[kind], tokenizer, accumulation=2, **options), stops)
    for stop in range(len(straight) + 1):
        first = loader_of(kinds[kind], tokenizer, accumulation=2, **options)
        before = steps_of(first, stop)
        kept = first.state_dict()
        state = json.loads(json.dumps(kept))
        next(first.steps(epochs=epochs), None)
        assert kept == state, "nothing changes it afterwards"
        second = loader_of(kinds[kind], tokenizer, accumulation=2, **options)
        assert second.load_state_dict(state) == []
        rest = steps_of(second, stops and stops - stop)
        assert all_same([*before, *rest], straight)


@pytest.mark.parametrize("kind", ["packed", "mixed"])
def test_reading_ahead_disturbs_nothing(tokenizer, kinds, kind):
    """One process reads the stream, however many are asked for; its place is not the run's."""
    straight = loader_of(kinds[kind], tokenizer).steps(epochs=1)
    numbers = torch.get_rng_state()
    straight = [next(straight) for _ in range(12)]
    assert torch.equal(torch.get_rng_state(), numbers), "nobody else's random numbers are drawn"
    first = loader_of(kinds[kind], tokenizer, num_workers=2, prefetch_factor=3)
    assert first.notes == ["a stream is read ahead by one process: num_workers (2) counts as 1"]
    steps = first.steps(epochs=1)
    before = [next(steps) for _ in range(4)]
    assert first._source.state() == first._beginning, "another process reads"
    for num_workers in (0, 1):
        second = loader_of(kinds[kind], tokenizer, num_workers=num_workers)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        rest = second.steps(epochs=1)
        assert all_same([*before, *[next(rest) for _ in range(8)]], straight)
    steps.close()


def test_what_a_gpu_run_does_to_batches_leaves_the_place_alone(tokenizer, kinds, monkeypatch):
    """torch's loader takes each item apart to pin its tensors."""
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: ("pinned", batch))
    loader = loader_of(kinds["packed"], tokenizer)
    item = next(loader._items(loader._beginning, accumulation=1))
    (step, place) = pin_memory(item)
    assert [kind for kind, _ in step] == ["pinned"]
    assert place is item[1]


@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_same_rows(tokenizer, kinds, kind, size):
    """Whatever their number, and they take up each other's places."""

    def ranks(count, batch_size=1):
        return [loader_of(kinds[kind], tokenizer, rank=rank, size=count, batch_size=batch_size)
                for rank in range(count)]  # fmt: skip

    order = samples_of(ranks(1))
    together = ranks(size, batch_size=2)
    assert samples_of(together) == order[: len(order) // (2 * size) * 2 * size]
    assert len({json.dumps(rank.state_dict()) for rank in together}) == 1
    first = ranks(1)[0]
    steps = first.steps(epochs=1)
    for _ in range(3):
        next(steps)
    others = ranks(size)
    for other in others:
        other.load_state_dict(first.state_dict())
    assert samples_of(others) == order[3:][: (len(order) - 3) // size * size]


def test_only_own_rows_are_tokenized(tokenizer, file, monkeypatch):
    seen = []
    encode = HFTokenizer.encode

    def watched(self, text, **options):
        seen.append(text)
        return encode(self, text, **options)

    monkeypatch.setattr(HFTokenizer, "encode", watched)
    loader = loader_of(stream(file), tokenizer, rank=1, size=2, shuffle=False)
    seen.clear()
    list(loader.steps(epochs=1))
    assert seen == texts()[1:22:2]


def test_validation_takes_everything_once_each_time(tokenizer, file, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": t} for t in texts(4, "other")])
    whole = [tokenizer.encode(t)[:12] for t in [*texts(), *texts(4, "other")]]
    nodes = [stream(file), stream(other)]
    for num_workers in (0, 1):
        ranks = [loader_of(nodes, tokenizer, rank=rank, size=2, batch_size=4, validation=True,
                           num_workers=num_workers) for rank in range(2)]  # fmt: skip
        for _ in range(2):
            batches = [list(rank) for rank in ranks]
            assert [len(own) for own in batches] == [4, 4], "27 rows, 8 at a time"
            shares = [rows_of([own]) for own in batches]
            found = [row for pair in zip(*shares, strict=True) for row in pair]
            assert found == [*whole, *[[]] * 5]


def test_proportions_of_an_endless_mixture(tokenizer, tmp_path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(n)])
             for name, n in (("a", 9), ("b", 4), ("c", 6))]  # fmt: skip
    nodes = [stream(files[0], weight=5), stream(files[1], weight=1), text_node(files[2], weight=2)]
    for shuffle in (True, False):
        steps = loader_of(nodes, tokenizer, shuffle=shuffle).steps(epochs=1)
        words = [tokenizer.decode(row) for row in rows_of(next(steps) for _ in range(640))]
        assert Counter(word[0] for word in words) == {"a": 400, "b": 80, "c": 160}
        for start in range(0, 640, 64):
            assert Counter(w[0] for w in words[start : start + 64]) == {"a": 40, "b": 8, "c": 16}
        for name, n in (("a", 9), ("b", 4), ("c", 6)):
            own = [word for word in words if word[0] == name]
            for start in range(0, len(own) - n, n):
                assert sorted(own[start : start + n]) == [f"{name}{i}" for i in range(n)]
        pattern = ["".join(w[0] for w in words[at : at + 64]) for at in (0, 64)]
        assert (pattern[0] != pattern[1]) == shuffle


def test_memory_does_not_grow_with_the_stream(tokenizer, tmp_path):
    """A stream without an end: only its windows are held."""

    class Endless:
        column_names = ("text",)

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

        def __iter__(self):
            while True:
                self.at += 1
                yield {"text": f"{self.at} number", "unused": "x" * 2000 + str(self.at)}

    node = stream(write_jsonl(tmp_path / "one.jsonl", [{"text": "x"}]), packed=True)
    loader = loader_of(node, tokenizer, window=20, max_seq_len=64)
    loader._source.dataset._data = endless = Endless()
    endless.at = 0
    loader._source._beginning = loader._source._source = {"at": 0}
    loader._beginning = loader._state = loader._source.state()
    steps = loader.steps(epochs=1)
    tracemalloc.start()
    held = []
    for n in range(2000):
        next(steps)
        if n % 200 == 199:
            held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert endless.at >= 1000, "many windows"
    assert max(held[1:]) < 2 * 20 * 2100 + 200_000
    assert max(held[5:]) < 1.5 * max(held[:5])


BAD = {
    "missing file": (lambda f: stream(f"{f}.old"), r"cannot be built from .*jsonl.old: Unable to"),
    "missing column": (lambda f: stream(f, column="txt"),
                       r"dataset: sample \d has no 'txt'; its columns are text"),
    "part of a split": (lambda f: stream(f, split="train[:50%]"),
                        r"dataset.split is 'train\[:50%\]', but a stream has no length to take a"),
    "by word": (lambda f: text_node(f, streaming="yes"), "streaming is 'yes', but must be true or"),
    "another builder": (lambda f: {"_component_": "helpers_train.RaggedDataset",
                                   "streaming": True},
                        "dataset.streaming is for builders that hand it on to datasets.load_data"),
    "takes anything": (lambda f: {"_component_": "test_streams.Sized", "streaming": True},
                       "test_streams.Sized has built a Sized that does not stream: use torchtune"),
    "list without weights": (lambda f: [stream(f), text_node(f)],
                             "dataset: a list with a stream in it needs a weight in each"),
    "packing": (lambda f: [stream(f, weight=1, packed=True), text_node(f, weight=1)],
                "must agree on packed, split_across_pack"),
}  # fmt: skip


class Sized:
    def __init__(self, tokenizer, **anything):
        pass


@pytest.mark.parametrize("case", BAD)
def test_bad_streams_are_one_sentence(tokenizer, file, case):
    node, says = BAD[case]
    with pytest.raises(InputError, match=says) as caught:
        loader_of(node(file), tokenizer)
    assert "\n" not in str(caught.value)


def test_validation_streams_and_sized_sets_do_not_mix(tokenizer, file):
    with pytest.raises(InputError, match=r"dataset\[1\] is no stream, but others of the list are"):
        loader_of([stream(file), text_node(file)], tokenizer, validation=True)


FILES = {"empty": b"", "blank lines": b"\n\n", "empty texts": b'{"text": ""}\n' * 3}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("packed", [True, False])
def test_streams_of_nothing(tokenizer, tmp_path, case, packed):
    (tmp_path / "bad.jsonl").write_bytes(FILES[case])
    node = stream(tmp_path / "bad.jsonl", packed=packed, add_eos=False)
    plain = HFTokenizer(write_tokenizer(tmp_path / "tok", add_bos_token=False))
    says = "no token of the first 3 rows" if case == "empty texts" and not packed else (
        r"dataset holds no samples in .*bad.jsonl")  # fmt: skip
    with pytest.raises(InputError, match=says):
        loader_of(node, plain)


def test_a_broken_line_in_the_middle(tokenizer, tmp_path):
    """Found when its window is read; the sentence names the file."""
    lines = [json.dumps({"text": "x", "unused": "x" * 3000}) for _ in range(9000)]
    lines[7000] = '{"text": '
    path = tmp_path / "late.jsonl"
    path.write_text("\n".join(lines))
    loader = loader_of(stream(path), tokenizer, window=3000, batch_size=1000)
    steps = loader.steps(epochs=1)
    assert len([next(steps) for _ in range(6)]) == 6
    says = r"dataset cannot be read from .*late.jsonl after sample 6[1-9]\d\d: "
    with pytest.raises(InputError, match=says) as caught:
        next(steps)
    assert "\n" not in str(caught.value)


def test_a_broken_sample_is_named_by_its_number_in_the_file(tokenizer, tmp_path):
    rows = [{"text": "a"}] * 13 + [{"text": None}]
    path = write_jsonl(tmp_path / "late.jsonl", rows)
    with pytest.raises(InputError, match=r"^dataset: sample 13: its text is null"):
        list(loader_of(stream(path), tokenizer).steps(epochs=1))


def test_what_a_place_in_a_stream_depends_on(tokenizer, file):
    first = loader_of(stream(file), tokenizer)
    next(first.steps(epochs=1))
    state = first.state_dict()
    (sentence,) = loader_of(stream(file), tokenizer, seed=4).load_state_dict(state)
    assert sentence.startswith("seed was 3 and is now 4: the samples come in another order")
    for changes, says in [({"window": 6}, "shuffle_window was 5 .* is now 6"),
                          ({"max_seq_len": 13}, "max_seq_len was 12 .* is now 13")]:  # fmt: skip
        with pytest.raises(InputError, match=f"cannot be found again: {says}"):
            loader_of(stream(file), tokenizer, **changes).load_state_dict(state)
    with pytest.raises(InputError, match=r"the kind of data \(sized or stream\) was stream when"):
        loader_of(text_node(file), tokenizer).load_state_dict(state)


def test_number_of_steps(tokenizer, file):
    loader = loader_of(stream(file), tokenizer)
    assert loader.steps_per_epoch is None
    assert total_steps(loader, epochs=2, max_steps=5) == 5
    with pytest.raises(InputError, match="max_steps is missing: nobody knows how long a stream"):
        total_steps(loader, epochs=1, max_steps=None)
    mixed = loader_of([stream(file, weight=1), stream(file, weight=1)], tokenizer)
    with pytest.raises(InputError, match="epochs is 2, but a mixture with a stream in it has no e"):
        total_steps(mixed, epochs=2, max_steps=5)
    with pytest.raises(InputError, match="the stream holds fewer rows than the 24 of one step"):
        list(loader_of(stream(file), tokenizer, batch_size=24).steps(epochs=1))
    assert len(list(loader_of(stream(file), tokenizer, batch_size=24).steps(epochs=2))) == 1


def test_chats_stream_too(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 4)
    options = {"max_seq_len": 64, "shuffle": False}
    steps = list(loader_of(chat_node(path, streaming=True), tokenizer, **options).steps(epochs=1))
    assert all_same(steps, list(loader_of(chat_node(path), tokenizer, **options).steps(epochs=1)))
    assert all(step[0].num_labels > 0 for step in steps)


def test_several_parquet_files_stream_with_a_reader(tokenizer, tmp_path):
    for number in range(3):
        part = datasets.Dataset.from_dict({"text": texts()[number * 8 : number * 8 + 8]})
        part.to_parquet(tmp_path / f"{number}.parquet")
    node = text_node(tmp_path / "*.parquet", source="parquet", streaming=True)
    straight = list(loader_of(node, tokenizer, num_workers=1).steps(epochs=2))
    assert len(straight) == 2 * N
    first = loader_of(node, tokenizer)
    steps = first.steps(epochs=2)
    before = [next(steps) for _ in range(11)]
    second = loader_of(node, tokenizer, num_workers=1)
    second.load_state_dict(first.state_dict())
    assert all_same([*before, *second.steps(epochs=2)], straight)
    assert torch.equal(straight[0][0].tokens, before[0][0].tokens)
