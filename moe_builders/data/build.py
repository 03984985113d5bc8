"""From a config's ``dataset`` to a loader of steps, whether it is sized, mixed or a stream."""

from typing import Any

from datasets import IterableDataset

from moe_builders.data.datasets import build_dataset, build_set, check_labels, without_limit
from moe_builders.data.documents import is_torchtune
from moe_builders.data.loader import Batching, SizedLoader, StepLoader
from moe_builders.data.nodes import SetNode, build_component, no_samples, read_nodes
from moe_builders.data.position import stamp
from moe_builders.data.stream_loader import StreamLoader
from moe_builders.data.streams import Chain, DocumentStream, MixedSource, SizedSource
from moe_builders.data.tokenizer import HFTokenizer
from moe_builders.errors import InputError


def build_loader(
    node: Any,
    tokenizer: HFTokenizer,
    batching: Batching,
    *,
    seed: int = 0,
    shuffle: bool = True,
    long_samples: str = "truncate",
    shuffle_window: int = 1024,
    path: str = "dataset",
    validation: bool = False,
    show: bool = False,
) -> StepLoader:
    """The loader of a data set, or of a list of them.

    Args:
        node: a component, or a list of them; see ``build_dataset``.
        tokenizer: handed to the components.
        batching: how rows become batches.
        seed: of the order.
        shuffle: a new order every epoch.
        shuffle_window: documents of a stream that are shuffled among themselves.
        long_samples: what happens to samples longer than max_seq_len: "truncate", "split" or
            "refuse".
        path: where in the config, for messages.
        validation: to be iterated over as a whole, in order.
        show: draw a progress bar while rows are packed.

    Raises:
        InputError: see ``build_dataset``; fewer rows than one step takes.
    """
    sets = read_nodes(node, path=path, validation=validation)
    cutting: dict[str, Any] = {"max_seq_len": batching.max_seq_len, "long_samples": long_samples}
    if not any(one.streaming for one in sets):
        rows = build_dataset(
            node, tokenizer, path=path, validation=validation, show=show, **cutting
        )
        return SizedLoader(
            rows, batching, seed=seed, shuffle=shuffle and not validation, validation=validation,
            long_samples=long_samples,
        )  # fmt: skip
    sources: list[DocumentStream | SizedSource] = []
    passes = 1 if len(sets) == 1 or validation else None
    for which, one in enumerate(sets):
        order: dict[str, Any] = {
            "seed": seed, "which": which, "shuffle": shuffle and not validation,
        }  # fmt: skip
        if one.streaming:
            sources.append(
                _stream(one, tokenizer, window=shuffle_window, passes=passes, **cutting, **order)
            )
        elif validation:
            raise InputError(
                f"{one.path} is no stream, but others of the list are: a validation list is either "
                "streamed as a whole or not at all"
            )
        else:
            sources.append(SizedSource(build_set(one, tokenizer, show=show, **cutting), **order))
    mark = stamp(
        kind="stream", packed=sets[0].packed, seed=seed, shuffle=shuffle,
        shuffle_window=shuffle_window, weights=[one.weight for one in sets],
        sets=["stream" if one.streaming else "sized" for one in sets],
        rows=[len(s.rows) for s in sources if isinstance(s, SizedSource)], **cutting,
    )  # fmt: skip
    if validation:
        source = Chain(sources)
    elif len(sets) > 1:
        weights = [one.weight or 0 for one in sets]
        source = MixedSource(sources, weights, seed=seed, shuffle=shuffle)
    else:
        (source,) = sources
        assert isinstance(source, DocumentStream)
    return StreamLoader(source, batching, packed=sets[0].packed, stamp=mark, validation=validation)


def _stream(one: SetNode, tokenizer: HFTokenizer, **options: Any) -> DocumentStream:
    """A streamed set, its first rows looked at."""
    dataset = build_component(one, without_limit(tokenizer, options["max_seq_len"]))
    if dataset is None:
        raise no_samples(one.path, one.files)
    if not (is_torchtune(dataset) and isinstance(dataset._data, IterableDataset)):
        raise InputError(
            f"{one.path}.streaming is true, but {one.component['_component_']} has built a "
            f"{type(dataset).__name__} that does not stream: use torchtune's "
            "text_completion_dataset, chat_dataset or instruct_dataset, or set streaming to false"
        )
    source = DocumentStream(
        dataset, packed=one.packed, split_across_pack=one.split, path=one.path, files=one.files,
        **options,
    )  # fmt: skip
    beginning = source.state()
    makers = iter(source.take, None)
    check_labels(
        (make() for make in makers), [dataset], path=one.path, max_seq_len=options["max_seq_len"]
    )
    source.load_state(beginning)
    return source
