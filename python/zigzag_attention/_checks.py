"""What a caller gives as an option: numbers of the right kind, or a sentence."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np

Options: TypeAlias = tuple[bool, float | None, tuple[int, int], float, int | None, bool]

_MAX_INTEGER = 2**63 - 1


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
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} is {value!r}; it must be (left, right)")
    left, right = integer(value[0], f"{name}[0]"), integer(value[1], f"{name}[1]")
    if left < -1 or right < -1:
        raise ValueError(
            f"{name} is ({left}, {right}); a side must be -1 (no bound) or a number of tokens"
        )
    return left, right


def mask(causal: Any, sides: Any) -> tuple[bool, tuple[int, int]]:
    """causal and window, which must not contradict one another."""
    causal, (left, right) = truth(causal, "causal"), window(sides)
    if causal and right > 0:
        raise ValueError(
            f"window is ({left}, {right}), but a causal query sees no later key; give a right side "
            "of 0 or -1, or causal=False"
        )
    return causal, (left, right)


def attention_options(options: Options, last: Any, names: Names) -> Options:
    """The options of a call whose last tensor, v or a packed one, is `last`."""
    causal, scale, sides, softcap, stage, deterministic = options
    if names.window == "window":
        causal, sides = mask(causal, sides)
    else:
        # The drop-ins' callers are used to a right side that causal overrides.
        causal, sides = truth(causal, "causal"), window(sides, names.window)
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
