"""One true norm of all gradients, and clipping by it.

That sharded and replicated gradients count once on several processes is shown in
tests/distributed: weights after clipped steps do not depend on the split.
"""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from moe_builders.errors import InputError
from moe_builders.parallel.grad_norm import clip_gradients, global_grad_norm
from moe_builders.parallel.world import open_world


def parameters(*gradients):
    found = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient.clone()
        found.append(parameter)
    return found


def draw(dtype=torch.float64, scale=1.0):
    stream = torch.Generator().manual_seed(1)
    shapes = [(3, 4), (7,), (), (2, 3, 5), (0, 4)]
    return [scale * torch.randn(s, generator=stream, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_norm_is_torchs(scale):
    ours, theirs = parameters(*draw(scale=scale)), parameters(*draw(scale=scale))
    norm = global_grad_norm(ours)
    assert norm.dtype == torch.float64
    assert norm.shape == ()
    wanted = nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.testing.assert_close(norm, wanted, rtol=1e-12, atol=0)
    clip_gradients(ours, norm, 0.5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=0)


def test_clipping_by_hand():
    (p,) = parameters(torch.tensor([3.0, 4.0]))
    norm = global_grad_norm([p])
    assert float(norm) == 5
    clip_gradients([p], norm, 10.0)
    assert p.grad.tolist() == [3.0, 4.0], "a small one is left as it is"
    clip_gradients([p], norm, 2.5)
    assert p.grad.tolist() == pytest.approx([1.5, 2.0], rel=1e-5)
    assert p.grad.dtype == torch.float32


def test_infinity_leaves_every_bit():
    before = [*draw(torch.float32), torch.tensor([math.inf])]
    after = parameters(*before)
    clip_gradients(after, global_grad_norm(after), math.inf)
    assert all(torch.equal(p.grad, g) for p, g in zip(after, before, strict=True))


def test_small_gradients_of_narrow_types_do_not_underflow():
    """1e-30 squared is no number of fp32, and a sum of bf16 would stop at 256."""
    many = [torch.full((1000,), 1e-30), torch.full((100_000,), 1.0, dtype=torch.bfloat16)]
    tiny, flat = parameters(many[0]), parameters(many[1])
    assert float(global_grad_norm(tiny)) == pytest.approx(1e-30 * math.sqrt(1000), rel=1e-6)
    assert float(global_grad_norm(flat)) == pytest.approx(math.sqrt(100_000), rel=1e-12)
    clip_gradients(flat, global_grad_norm(flat), 1.0)
    assert flat[0].grad.dtype == torch.bfloat16


def test_parameters_without_a_gradient_are_passed_over():
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    unused = nn.Parameter(torch.ones(3))
    (p,) = parameters(torch.tensor([3.0, 4.0]))
    norm = global_grad_norm([frozen, p, unused])
    assert float(norm) == 5
    clip_gradients([frozen, p, unused], norm, 1.0)
    assert unused.grad is None


def test_no_gradient_at_all():
    with pytest.raises(InputError, match="no gradient to take the norm of: run backward first"):
        global_grad_norm([nn.Parameter(torch.ones(3))])
    with pytest.raises(InputError, match="no gradient"):
        global_grad_norm([])


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_that_would_stop_learning_is_refused(limit):
    (p,) = parameters(torch.ones(2))
    with pytest.raises(InputError, match=r"but must be above 0 \(null: no clipping\)"):
        clip_gradients([p], torch.tensor(1.0), limit)


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    broken = parameters(torch.tensor([1.0, math.inf]), torch.tensor([1.0]))
    assert math.isinf(float(global_grad_norm(broken)))
    broken = parameters(torch.tensor([1.0, math.nan]))
    assert math.isnan(float(global_grad_norm(broken)))


def test_sharded_gradients_on_one_process():
    with open_world(device="cpu") as world:
        plain = draw()
        sharded = [DTensor.from_local(g.clone(), world.mesh, [Shard(0)]) for g in plain if g.ndim]
        mixed = [*parameters(plain[2]), *parameters(*sharded)]
        wanted = parameters(*plain)
        norm = global_grad_norm(mixed)
        torch.testing.assert_close(norm, global_grad_norm(wanted), rtol=1e-12, atol=0)
        clip_gradients(mixed, norm, 0.1)
        clip_gradients(wanted, norm, 0.1)
        assert torch.equal(mixed[1].grad.to_local(), wanted[0].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-3, 1.0, 1e15, 1e30])
def test_matrices_of_a_cpu_keep_their_norm_at_any_scale(dtype, scale):
    """Their rows are added in fp32, which cannot square the smallest and largest of them."""
    stream = torch.Generator().manual_seed(2)
    matrices = [torch.randn(s, generator=stream) * scale for s in ((300, 700), (4, 30, 50))]
    found = parameters(*(matrix.to(dtype) for matrix in matrices))
    wanted = torch.stack([p.grad.double().square().sum() for p in found]).sum().sqrt()
    torch.testing.assert_close(global_grad_norm(found), wanted, rtol=1e-7, atol=0)


class Reductions(TorchDispatchMode):
    """The dtypes that numbers are reduced in, by how many there are."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.linalg_vector_norm.default:
            self.found[args[0].numel()] = (kwargs or {}).get("dtype")
        return func(*args, **(kwargs or {}))


def test_a_gpu_copies_no_matrix_to_fp64_and_waits_for_nothing():
    """torch's norm on a GPU makes a copy in any dtype but the gradient's own and fp32."""
    with FakeTensorMode(), Reductions() as seen:
        matrices = [torch.empty(4, 6, 50, device="cuda", dtype=torch.bfloat16),
                    torch.empty(8, 30, device="cuda")]  # fmt: skip
        gradients = [*matrices, torch.empty(7, device="cuda")]
        norm = global_grad_norm(parameters(*gradients))  # a value that is asked for would raise
    assert (norm.device.type, norm.dtype) == ("cuda", torch.float64)
    assert seen.found == {1200: torch.float32, 240: torch.float32, 7: torch.float64}


def test_a_matrix_of_zeros_has_no_norm():
    assert float(global_grad_norm(parameters(torch.zeros(3, 4)))) == 0


def test_a_matrix_that_is_not_finite_shows_in_the_norm():
    for value in (math.inf, math.nan):
        matrix = torch.ones(3, 4)
        matrix[1, 2] = value
        norm = float(global_grad_norm(parameters(matrix)))
        assert norm == value or (math.isnan(value) and math.isnan(norm))
