"""Rotary frequencies for contexts longer than the pretrained one, in Hugging Face's spelling.

A scaling is the mapping ``rope_scaling`` or ``rope_parameters`` of a config.json without rope_theta
and partial_rotary_factor. Formulas, defaults and the order of fp32 operations are those of
transformers (``modeling_rope_utils``), so that frequencies are equal to the last bit.

Letters: r rotary dims of a head (even).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_builders.errors import InputError

_ORIGINAL = "original_max_position_embeddings"
_MSCALES = frozenset({"mscale", "mscale_all_dim"})
_BETAS = frozenset({"beta_fast", "beta_slow"})

# rope_type -> (keys it needs, keys it may have), without rope_type itself. Dynamic scaling reads
# neither betas nor mscales; HunYuan's config.json carries them all the same.
SCALING_KEYS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset({"alpha"}) | _BETAS | _MSCALES),
    "yarn": (
        frozenset({"factor"}),
        frozenset({_ORIGINAL, "attention_factor", "truncate"}) | _BETAS | _MSCALES,
    ),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
        frozenset({_ORIGINAL}),
    ),
    "longrope": (
        frozenset({"short_factor", "long_factor"}),
        frozenset({_ORIGINAL, "factor", "attention_factor"}),
    ),
}

_AT_LEAST = {"factor": 1, "alpha": 1, "mscale": 0, "mscale_all_dim": 0, _ORIGINAL: 2}
_ABOVE_0 = _BETAS | {"attention_factor", "low_freq_factor", "high_freq_factor"}
_LISTS = ("short_factor", "long_factor")


def is_number(value: Any) -> bool:
    """A finite int or float (true and false are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def yarn_mscale(scale: float, mscale: float) -> float:
    """0.1 · mscale · ln(scale) + 1; 1 where nothing is stretched (scale ≤ 1).

    Source: Peng et al. 2023 (2309.00071) eq. 22; mscale as in DeepSeek-V2's configs.
    """
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def checked_scaling(
    scaling: Mapping[str, Any] | None, *, dims: int, max_seq_len: int | None
) -> dict[str, Any]:
    """A scaling with every value checked and every default of transformers filled in.

    Args:
        scaling: Hugging Face's mapping; None or no rope_type: default. A value of None counts as
            left out.
        dims: r.
        max_seq_len: HF's ``max_position_embeddings``.

    Returns:
        rope_type, and what ``inverse_frequency`` and ``attention_factor`` read for this type.

    Raises:
        InputError: unknown type or key, key missing, value outside its limits.
    """
    given = dict(scaling or {})
    kind = given.pop("rope_type", "default")
    if kind not in tuple(SCALING_KEYS):
        raise InputError(f"rope_type is {kind!r}, but must be one of {', '.join(SCALING_KEYS)}")
    needed, optional = SCALING_KEYS[kind]
    missing, unknown = sorted(needed - set(given)), sorted(set(given) - needed - optional)
    if unknown:
        raise InputError(
            f"rope_scaling of type {kind} has {', '.join(unknown)}, but knows only "
            f"{', '.join(sorted(needed | optional)) or 'rope_type'}: leave it out"
        )
    if missing:
        raise InputError(f"rope_scaling of type {kind} lacks {', '.join(missing)}: add it")
    for name, value in given.items():
        _check_value(name, value, dims)
    # null counts as left out; truncate is a plain switch and was checked to be one
    found: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    _fill(kind, found, max_seq_len)
    still = sorted(needed - set(found))
    if still:
        raise InputError(f"rope_scaling of type {kind} has no value for {', '.join(still)}: add it")
    if kind == "dynamic" and dims < 4:
        raise InputError(f"rope_type dynamic needs at least 4 rotary dims, not {dims}")
    return {"rope_type": kind, **found}


def attention_factor(rule: Mapping[str, Any]) -> float:
    """What cos and sin are multiplied by (``rule``: of ``checked_scaling``)."""
    kind = rule["rope_type"]
    if kind not in ("yarn", "longrope"):
        return 1.0
    if "attention_factor" in rule:
        return float(rule["attention_factor"])
    factor = rule["factor"]
    if kind == "longrope":
        ratio = math.log(max(factor, 1)) / math.log(rule[_ORIGINAL])
        return math.sqrt(1 + ratio)
    if rule.get("mscale") and rule.get("mscale_all_dim"):
        return yarn_mscale(factor, rule["mscale"]) / yarn_mscale(factor, rule["mscale_all_dim"])
    return yarn_mscale(factor, 1)


def inverse_frequency(
    rule: Mapping[str, Any],
    *,
    dims: int,
    base: float,
    device: torch.device,
    length: Tensor | None = None,
    long: bool = False,
) -> Tensor:
    """Radians per position of each pair: [r/2] fp32.

    Args:
        rule: of ``checked_scaling``.
        dims: r.
        base: HF's ``rope_theta``.
        device: of the result.
        length: [] sequence length, read by dynamic scaling; None: up to max_seq_len.
        long: LongRoPE's factors for beyond the original context.
    """
    kind = rule["rope_type"]
    exponent = torch.arange(0, dims, 2, dtype=torch.int64, device=device).float() / dims
    if kind == "yarn":
        return _yarn(rule, base**exponent, dims, base)
    if kind == "longrope":
        factors = rule["long_factor" if long else "short_factor"]
        stretch = torch.tensor(factors, dtype=torch.float32, device=device)
        return 1.0 / (stretch * base**exponent)
    if kind == "dynamic":
        return 1.0 / (_dynamic_base(rule, dims, base, length) ** exponent)
    frequency = 1.0 / (base**exponent)
    if kind == "linear":
        return frequency / rule["factor"]
    return _llama3(rule, frequency) if kind == "llama3" else frequency


def _check_value(name: str, value: Any, dims: int) -> None:
    if name == "truncate":
        if not isinstance(value, bool):
            raise InputError(f"rope_scaling's truncate is {value!r}, but must be true or false")
    elif name in _LISTS:
        if (
            not isinstance(value, list | tuple)
            or len(value) != dims // 2
            or not all(is_number(item) and item > 0 for item in value)
        ):
            shown = f"{len(value)} values" if isinstance(value, list | tuple) else repr(value)
            raise InputError(
                f"rope_scaling's {name} is {shown}, but must be a list of {dims // 2} numbers "
                f"above 0, one for each two of the {dims} rotary dims"
            )
    elif value is not None:
        least = _AT_LEAST.get(name, 0)
        above = name in _ABOVE_0
        if not is_number(value) or value < least or (above and value == least):
            limit = f"above {least}" if above else f"of at least {least}"
            raise InputError(f"rope_scaling's {name} is {value!r}, but must be a number {limit}")


def _fill(kind: str, found: dict[str, Any], max_seq_len: int | None) -> None:
    """Add what transformers takes where a key is left out."""

    def longest(absent: str) -> int:
        if max_seq_len is None:
            raise InputError(
                f"rope_scaling of type {kind} without {absent} needs max_seq_len: "
                f"give one of them (HF: max_position_embeddings)"
            )
        return max_seq_len

    if kind in ("yarn", "llama3", "longrope") and _ORIGINAL not in found:
        found[_ORIGINAL] = longest(_ORIGINAL)
    if kind == "yarn" and "factor" not in found:
        found["factor"] = longest("factor") / found[_ORIGINAL]
        _check_value("factor", found["factor"], 0)
    if kind == "yarn":
        found.setdefault("truncate", True)
        found.setdefault("beta_fast", 32)
        found.setdefault("beta_slow", 1)
        _check_order(found, "beta_slow", "beta_fast")
    if kind == "longrope" and not {"factor", "attention_factor"} & set(found):
        found["factor"] = longest("factor and attention_factor") / found[_ORIGINAL]
    if kind == "llama3":
        _check_order(found, "low_freq_factor", "high_freq_factor")
    if kind == "dynamic" and "alpha" not in found:
        found["max_seq_len"] = longest("alpha")


def _check_order(found: Mapping[str, Any], small: str, large: str) -> None:
    if small in found and large in found and found[large] < found[small]:
        raise InputError(
            f"rope_scaling's {large} is {found[large]}, but must not be below {small} "
            f"({found[small]}): exchange them"
        )


def _dynamic_base(
    rule: Mapping[str, Any], dims: int, base: float, length: Tensor | None
) -> float | Tensor:
    """NTK-aware base: stretched by a fixed alpha, or by how far the length is past the limit."""
    power = dims / (dims - 2)
    if "alpha" in rule:
        return base * rule["alpha"] ** power
    factor, limit = rule["factor"], rule["max_seq_len"]
    longest = limit if length is None else length.clamp(min=limit).float()
    return base * ((factor * longest / limit) - (factor - 1)) ** power


def _yarn(rule: Mapping[str, Any], wavelength: Tensor, dims: int, base: float) -> Tensor:
    """Fast pairs keep their frequency, slow ones are stretched, between them a ramp (over pairs).

    Source: Peng et al. 2023 (2309.00071) section 3.2.
    """

    def pair_with(turns: float) -> float:
        """Index of the pair that turns this often over the original context."""
        return (dims * math.log(rule[_ORIGINAL] / (turns * 2 * math.pi))) / (2 * math.log(base))

    low, high = pair_with(rule["beta_fast"]), pair_with(rule["beta_slow"])
    if rule["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by 0
    pair = torch.arange(dims // 2, dtype=torch.float32, device=wavelength.device)
    kept = 1 - ((pair - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rule["factor"] * wavelength) * (1 - kept) + 1.0 / wavelength * kept


def _llama3(rule: Mapping[str, Any], frequency: Tensor) -> Tensor:
    """Long waves are stretched by the factor, short ones kept, those between interpolated."""
    factor, original = rule["factor"], rule[_ORIGINAL]
    low, high = rule["low_freq_factor"], rule["high_freq_factor"]
    wave = 2 * math.pi / frequency
    found = torch.where(wave > original / low, frequency / factor, frequency)
    if high == low:  # no waves between (Llama 4 Scout)
        return found
    share = (original / wave - low) / (high - low)
    between = (1 - share) * found / factor + share * found
    return torch.where((wave >= original / high) & (wave <= original / low), between, found)
