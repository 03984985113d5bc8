"""A token's experts come from a table of its vocabulary id; the gate only weighs them.

Letters: t tokens · d dim · e num_experts · k experts_per_token · v vocabulary.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_builders.errors import InputError
from moe_builders.routers.gate import gate_logits, real_rows
from moe_builders.routers.replay import ReplaySlot
from moe_builders.routers.scores import check_experts_per_token, log_softplus
from moe_builders.routing import Routing, TokenInfo, route_by_choice

HashScore = Literal["softmax", "sigmoid", "sqrtsoftplus"]


class HashRouter(nn.Module):
    """Each token takes the k experts that its vocabulary id stands for.

    Nothing of the selection is learned, so it cannot collapse; it is as even as the ids are. The
    weights are learned: the gate's scores of the chosen experts, normalised and scaled.

    Causal: a token's routing depends on that token alone.

    Args:
        dim: d.
        num_experts: e.
        experts_per_token: k, 1 ≤ k ≤ e.
        vocab_size: v, the number of rows a table must have; without a table it is not used.
        table: [v, k] int, the experts of every id, distinct in a row; a tensor or nested lists.
            It becomes a persistent buffer. None: (id · k + j) mod e for j = 0 … k - 1, computed
            as it is needed, for any id.
        score_function: "softmax" over all experts, "sigmoid" or √softplus per expert.
        normalize_weights: divide a token's weights by their sum (k > 1; with k = 1 every weight
            would be 1 and the gate would get no gradient). None: unless the scores are a softmax,
            as DeepSeek-V4 does.
        route_scale: multiplies the weights at the end.

    The routing's ``probs`` are the scores over their sum, also where all of them underflow.

    Raises:
        InputError: a number out of its range, or a table that does not fit them.

    Source: Roller et al. 2021 (2106.04426); weights and the default table: DeepSeek-V4's gate.
    """

    causal = True

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        experts_per_token: int,
        vocab_size: int | None = None,
        table: Tensor | Sequence[Sequence[int]] | None = None,
        score_function: HashScore = "softmax",
        normalize_weights: bool | None = None,
        route_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_experts_per_token(experts_per_token, num_experts)
        if score_function not in get_args(HashScore):
            raise InputError(
                f"score_function {score_function!r} is not one of {', '.join(get_args(HashScore))}"
            )
        if normalize_weights is None:
            normalize_weights = score_function != "softmax"
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.score_function = score_function
        self.normalize_weights = normalize_weights and experts_per_token > 1
        self.route_scale = route_scale
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.replay = ReplaySlot()
        self.table: Tensor | None
        rows = None
        if table is not None:
            rows = _checked_table(table, num_experts, experts_per_token, vocab_size)
        self.register_buffer("table", rows)

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """Route tokens.

        Args:
            x: [t, d].
            info: ``input_ids`` decides; masked tokens are routed nowhere, whatever their id.

        Raises:
            InputError: no input_ids, or not one a token.
        """
        logits = gate_logits(self.gate, real_rows(x, info.mask))  # [t, e]
        log_scores = _log_scores(logits, self.score_function)
        probs = log_scores.softmax(-1)
        own = self._experts_of(x.shape[0], info)  # [t, k]
        expert = info.decided(lambda: self.replay(own))
        weights = log_scores.gather(1, expert).exp()  # [t, k]
        if self.normalize_weights:
            # = the scores over their sum, but also where all of them underflow
            weights = log_scores.gather(1, expert).softmax(-1)
        if self.route_scale != 1.0:
            weights = weights * self.route_scale
        return route_by_choice(
            expert=expert, weights=weights, logits=logits, probs=probs, info=info
        )

    def _experts_of(self, t: int, info: TokenInfo) -> Tensor:
        """[t, k] int64."""
        ids = info.input_ids
        if ids is None:
            raise InputError(
                "HashRouter needs the tokens' vocabulary ids, but info.input_ids is None: a "
                "MoEDecoder provides them, a MoE by itself needs TokenInfo(input_ids=...)"
            )
        if ids.shape != (t,):
            raise InputError(
                f"info.input_ids has the shape {list(ids.shape)}, but there are {t} tokens: give "
                f"one id a token, [{t}]"
            )
        ids = ids.long()
        if info.mask is not None:
            ids = torch.where(info.mask, ids, 0)  # padding may hold any number
        if self.table is not None:
            return self.table[ids]
        choice = torch.arange(self.experts_per_token, device=ids.device)  # [k]
        return (ids[:, None] * self.experts_per_token + choice) % self.num_experts


def _log_scores(logits: Tensor, score_function: str) -> Tensor:
    """[t, e] -> [t, e] log of the scores; finite, also where the scores underflow."""
    if score_function == "softmax":
        return logits.log_softmax(-1)
    if score_function == "sigmoid":
        return F.logsigmoid(logits)
    return log_softplus(logits) / 2


def _checked_table(
    table: Tensor | Sequence[Sequence[int]], e: int, k: int, vocab_size: int | None
) -> Tensor:
    """[v, k] int64 on the default device, as a module's other tensors."""
    try:  # on the CPU, so that it can be read also where a model is built without memory
        rows = table if isinstance(table, Tensor) else torch.tensor(table, device="cpu")
    except (TypeError, ValueError) as error:
        shown = "" if not isinstance(table, str) else f"table is {table!r}, but "
        raise InputError(
            f"{shown or 'table '}must be [v, {k}] whole numbers, a list of rows"
            + ("" if shown else f": {error}")
        ) from None
    if rows.ndim != 2 or rows.shape[1] != k or rows.is_floating_point() or len(rows) == 0:
        raise InputError(
            f"table is {list(rows.shape)} of {rows.dtype}, but must be [v, {k}] whole numbers: "
            "the experts_per_token experts of each vocabulary id"
        )
    if vocab_size is not None and len(rows) != vocab_size:
        raise InputError(
            f"table has {len(rows)} rows, but vocab_size is {vocab_size}: give every id a row"
        )
    rows = rows.long()
    if not rows.is_meta:
        wrong = ((rows < 0) | (rows >= e)).any(-1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise InputError(
                f"table row {row} is {rows[row].tolist()}, but experts are numbered 0 to {e - 1}"
            )
        ordered = rows.sort(-1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
        if twice.any():
            row = int(twice.nonzero()[0])
            raise InputError(
                f"table row {row} is {rows[row].tolist()}, but a token's experts must be distinct"
            )
    return rows.to(torch.get_default_device())
