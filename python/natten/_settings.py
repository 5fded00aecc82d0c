# SPDX-License-Identifier: MIT
"""What the switches of `natten.context` are set to. Knows nothing of the package, so that everyone may ask."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from natten._errors import reject


class MemoryUsagePreference(Enum):
    """How much memory backward passes may take for parallelism."""

    Default = 0
    Strict = 1
    Unrestricted = 2


# Of the autotuner, per setting.
LEAST_STEPS = {
    "warmup_steps_forward": 0,
    "warmup_steps_backward": 0,
    "steps_forward": 1,
    "steps_backward": 1,
}

# Called after a change: what forgets the choices that were made under the old settings.
after_change: list[Callable[[], None]] = []


class _Watched(type):
    """Of classes whose attributes are settings: assigned directly they are checked, too, and choices made anew."""

    _defaults: dict[str, Any]

    def __setattr__(cls, name: str, value: Any) -> None:
        cls.set(**{name: value})

    def __delattr__(cls, name: str) -> None:
        message = f"{cls.__name__}.{name} is a setting: reset() puts all of them back"
        raise AttributeError(message)

    def set(cls, **values: Any) -> None:
        """Changes settings, all at once.

        Raises:
            AttributeError: If there is no such setting.
            ValueError: If a value is of the wrong type.
        """
        for name, value in values.items():
            if name not in cls._defaults:
                message = (
                    f"{cls.__name__} has no setting {name!r}: it has {', '.join(cls._defaults)}"
                )
                raise AttributeError(message)
            kind = type(cls._defaults[name])
            if kind is type(None) and value is not None:
                kind = bool  # the settings without a default are switches
            least = LEAST_STEPS.get(name)
            if type(value) is not kind or (least is not None and value < least):
                limit = "" if least is None else f" of at least {least}"
                wanted = f"a value of type {kind.__name__}{limit}"
                reject(f"{cls.__name__}.{name}", repr(value), wanted)
        for name, value in values.items():
            type.__setattr__(cls, name, value)
        for call in after_change:
            call()

    def reset(cls) -> None:
        """Puts every setting back to its default."""
        cls.set(**cls._defaults)


class _Settings(metaclass=_Watched):
    """Class attributes that can be put back to what they were at import."""

    def __init_subclass__(cls) -> None:
        defaults = {name: vars(cls)[name] for name in vars(cls)["__annotations__"]}
        type.__setattr__(cls, "_defaults", defaults)


class NattenContext(_Settings):
    """The switches, as class attributes.

    Attributes:
        is_fused_na_enabled: Whether modules run fused wherever that computes what they are asked for.
        is_kv_parallelism_enabled: Without effect: the backward kernels are parallel over keys without atomics.
        is_deterministic_mode_enabled: Whether the autotuner is refused; everything else is deterministic anyway.
        use_flex_attention: Without effect: FlexAttention is always one of the candidates.
        force_flex_attention: Whether "auto" means backend "flex" for fused attention.
        training_memory_preference: Without effect: no memory is traded for parallelism.
        is_gemm_na_enabled: Whether unfused operations may run on backend "gemm"; if not, "naive" runs them.
        is_tiled_na_enabled: Without effect: the tiled kernels are those of "gemm" for older GPUs.
        is_tf32_in_gemm_na_enabled: Whether unfused float32 operations on GPUs may round to TF32; None: as torch does.
        is_flex_compile_allowed: Without effect: FlexAttention is compiled on GPUs, and not on CPUs.
        is_flex_compile_backprop_allowed: Without effect, for the same reason.
    """

    is_fused_na_enabled: bool = True
    is_kv_parallelism_enabled: bool = True
    is_deterministic_mode_enabled: bool = False
    use_flex_attention: bool = True
    force_flex_attention: bool = False
    training_memory_preference: MemoryUsagePreference = MemoryUsagePreference.Default
    is_gemm_na_enabled: bool = True
    is_tiled_na_enabled: bool = True
    is_tf32_in_gemm_na_enabled: bool | None = None
    is_flex_compile_allowed: bool = False
    is_flex_compile_backprop_allowed: bool = False


class AutotunerContext(_Settings):
    """What `use_autotuner` sets, as class attributes.

    Attributes:
        enabled_for_forward: Whether forward passes on GPUs search for their tile shapes.
        enabled_for_backward: Whether backward passes do.
        thorough_mode_forward: Whether all tile shapes are timed, not only the cheapest few.
        thorough_mode_backward: The same for backward passes.
        warmup_steps_forward: Runs before the timed ones.
        warmup_steps_backward: The same for backward passes.
        steps_forward: Timed runs of each tile shape.
        steps_backward: The same for backward passes.
    """

    enabled_for_forward: bool = False
    enabled_for_backward: bool = False
    thorough_mode_forward: bool = False
    thorough_mode_backward: bool = False
    warmup_steps_forward: int = 5
    warmup_steps_backward: int = 5
    steps_forward: int = 5
    steps_backward: int = 5
