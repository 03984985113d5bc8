"""Parts of sharded tensors on the processes that ask for them; one launch of four."""

import torch
from helpers_train import on_ranks

from moe_builders.parallel.gather import Wanted, gather_boxes, gather_wanted


def test_one_process_slices_what_it_has():
    tensor = torch.arange(12).view(4, 3)
    found = gather_boxes(tensor, [(slice(1, 3), slice(0, 2))])
    assert torch.equal(found, tensor[1:3, :2])
    assert found.data_ptr() == tensor[1:].data_ptr()
    assert gather_wanted([None]) is None
    assert torch.equal(gather_wanted([Wanted(torch.tensor(2.0), ())]), torch.tensor(2.0))


def test_four_processes_get_their_boxes_and_nothing_more(tmp_path):
    """HSDP, experts' parallelism under FSDP2 with uneven and empty shards, any dtype."""
    answers = on_ranks(4, {"boxes": ("helpers_gather.boxes_on_processes",)}, tmp_path)
    assert answers["boxes"] == {"wrong": [], "warned": []}
