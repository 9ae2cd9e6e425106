"""What a caller gives as an option: numbers of the right kind, or a sentence."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar

import numpy as np

_P = ParamSpec("_P")
_R = TypeVar("_R")

Options: TypeAlias = tuple[bool, float | None, tuple[int, int], float, int | None, bool]

_MAX_INTEGER = 2**63 - 1

_UNSUPPORTED = {
    "alibi": "ALiBi is not supported",
    "block_table": "paged K and V are not supported",
    "bias": "biases of the scores are not supported",
    "dropout": "attention dropout is not supported",
    "mask": "masks come from the plan's documents, causal and the window",
    "s_aux": "attention sinks are not supported",
    "sink": "attention sinks are not supported",
}

# What other libraries call these options.
_ELSEWHERE = {
    "causal": ("is_causal",),
    "group": ("process_group", "cp_group"),
    "kv_heads_per_stage": ("heads_k_stride",),
    "plan": ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k"),
    "return_attn_probs": ("return_lse", "return_softmax_lse"),
    "return_lse": ("return_attn_probs", "return_softmax_lse"),
    "softmax_scale": ("scale", "scaling", "sm_scale"),
    "window": ("window_size", "sliding_window"),
    "window_size": ("window", "sliding_window"),
}


def refuses_unknown(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, with a sentence for a keyword that it does not have."""
    signature = inspect.signature(function)
    known = tuple(signature.parameters)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name in kwargs:
            if name not in known:
                error = _unknown(function.__name__, name, known)
                _tell_caller_group(error, signature, args, kwargs)
                raise error
        return function(*args, **kwargs)

    return call


def tell_group(error: Exception, group: Any) -> None:
    """Tells the ranks of a group that this one is about to raise, so that none waits for it."""
    from zigzag_attention import _core
    from zigzag_attention.communicator import communicator_of

    try:
        communicator = communicator_of(group)
    except (TypeError, ValueError, RuntimeError):
        return  # no group that one could tell
    if communicator.size > 1:
        _core.refuse(communicator._core, str(error))


def _tell_caller_group(
    error: Exception, signature: inspect.Signature, args: Any, kwargs: dict[str, Any]
) -> None:
    """As `tell_group`, for the group among the arguments of a call."""
    own = {name: value for name, value in kwargs.items() if name in signature.parameters}
    try:
        given = signature.bind_partial(*args, **own).arguments
    except TypeError:
        return
    # A plan for one rank needs no group, whatever torch.distributed has.
    if "plan" not in signature.parameters or getattr(given.get("plan"), "world_size", 1) > 1:
        tell_group(error, given.get("group"))


def _unknown(function: str, name: str, known: tuple[str, ...]) -> Exception:
    for part, sentence in _UNSUPPORTED.items():
        if part in name:
            return ValueError(f"{name} was given to {function}; {sentence}")
    here = [own for own in known if name in _ELSEWHERE.get(own, ())]
    here = here or difflib.get_close_matches(name, known, 1)
    meant = f"; {here[0]} is what it has" if here else f"; it takes {', '.join(known)}"
    return TypeError(f"{function} has no option {name}{meant}")


class Names(NamedTuple):
    """The names of the options that the functions name differently."""

    window: str
    stage: str


def integer(value: Any, name: str) -> int:
    """An integer of Python or NumPy; floats, text and bools are mistakes."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {value!r}; it must be an integer")
    if not -_MAX_INTEGER <= value <= _MAX_INTEGER:
        raise ValueError(f"{name} is {value}; it must fit into 64 bits")
    return int(value)


def truth(value: Any, name: str) -> bool:
    """True or False themselves: what merely counts as one of them may mean something else."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r}; it must be True or False")
    return bool(value)


def real(value: Any, name: str) -> float:
    """A number of any library, as a float."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name} is {value}; it must be a finite number") from None
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is {value!r}; it must be a number") from error


def window(value: Any, name: str = "window") -> tuple[int, int]:
    """(left, right), each at least -1."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} is {value!r}; it must be (left, right)")
    if len(value) != 2:
        raise ValueError(f"{name} is {value!r}; it must be (left, right)")
    left, right = integer(value[0], f"{name}[0]"), integer(value[1], f"{name}[1]")
    if left < -1 or right < -1:
        raise ValueError(
            f"{name} is ({left}, {right}); a side must be -1 (no bound) or a number of tokens"
        )
    return left, right


def mask(causal: Any, sides: Any, name: str = "window") -> tuple[bool, tuple[int, int]]:
    """causal and window. A key is seen when both allow it: a causal right side is 0 at most."""
    causal, (left, right) = truth(causal, "causal"), window(sides, name)
    return causal, (left, min(right, 0) if causal else right)


def attention_options(options: Options, last: Any, names: Names) -> Options:
    """The options of a call whose last tensor, v or a packed one, is `last`."""
    causal, scale, sides, softcap, stage, deterministic = options
    causal, sides = mask(causal, sides, names.window)
    if stage is not None:
        stage = integer(stage, names.stage)
        kv_heads = last.shape[-2] if last.ndim > 1 else 1
        if stage < 1 or kv_heads % stage != 0:
            raise ValueError(
                f"{names.stage} is {stage}; it must be None (automatic) or a divisor of the "
                f"{kv_heads} KV heads"
            )
    return (
        causal,
        None if scale is None else real(scale, "softmax_scale"),
        sides,
        real(softcap, "softcap"),
        stage,
        truth(deterministic, "deterministic"),
    )
