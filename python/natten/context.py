# SPDX-License-Identifier: MIT
"""Switches and queries of both generations of the package, and what they mean here.

Switches hold for the whole process, all its threads, and the processes that it forks; a process that is spawned has those
of the import. Setting an attribute of `NattenContext` or `AutotunerContext` is the same as calling its switch. Where there is nothing to switch they are kept and can be asked for, and change
nothing; each says so. For a choice that ends with a block of code, and concerns one thread, there is
`natten.use_backend`.
"""

from __future__ import annotations

from typing import Any

from natten import _C, _dispatch
from natten._capabilities import (
    has_bfloat,
    has_cuda,
    has_fna,
    has_fp32_gemm,
    has_fp64_gemm,
    has_fused_na,
    has_gemm,
    has_half,
    has_tf32_gemm,
)
from natten._errors import ArgumentError, reject
from natten._settings import (
    LEAST_STEPS,
    AutotunerContext,
    MemoryUsagePreference,
    NattenContext,
)

__all__ = [
    "AutotunerContext",
    "MemoryUsagePreference",
    "NattenContext",
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "are_deterministic_algorithms_enabled",
    "disable_autotuner",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "disable_gemm_na",
    "disable_tf32",
    "disable_tiled_na",
    "enable_gemm_na",
    "enable_tf32",
    "enable_tiled_na",
    "force_flex_attention",
    "get_memory_usage_preference",
    "has_bfloat",
    "has_cuda",
    "has_fna",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_fused_na",
    "has_gemm",
    "has_half",
    "has_tf32_gemm",
    "is_autotuner_enabled",
    "is_autotuner_enabled_for_backward",
    "is_autotuner_enabled_for_forward",
    "is_autotuner_thorough_for_backward",
    "is_autotuner_thorough_for_forward",
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
    "is_fna_enabled",
    "is_fused_na_enabled",
    "is_gemm_na_enabled",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "is_tf32_in_gemm_na_enabled",
    "is_tiled_na_enabled",
    "release_scratch_memory",
    "set_memory_usage_preference",
    "use_autotuner",
    "use_deterministic_algorithms",
    "use_flex_attention",
    "use_fna",
    "use_fused_na",
    "use_gemm_na",
    "use_kv_parallelism_in_fused_na",
    "use_tf32_in_gemm_na",
    "use_tiled_na",
]


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        reject(name, repr(value), "True or False")
    return value


# Fused attention ----------------------------------------------------------------------------------------------------


def use_fused_na(
    mode: bool = True,
    kv_parallel: bool = True,
    use_flex_attention: bool = False,
    force_flex_attention: bool = False,
) -> None:
    """Whether modules compute attention fused, without weights in memory. On at import.

    Functions are what they are called, `natten.na2d` fused and `natten.functional.na2d_qk` not. A module that needs
    weights (dropout of attention weights, in training) runs unfused in any case.

    Args:
        mode: Whether to. If not, modules compute weights, softmax and output one after the other.
        kv_parallel: See `use_kv_parallelism_in_fused_na`.
        use_flex_attention: Kept without effect, as FlexAttention is always one of the candidates.
        force_flex_attention: Whether fused attention on "auto" is backend "flex".

    Raises:
        ValueError: If an argument is not a bool.
    """
    # All are looked at before any is set.
    mode = _flag("mode", mode)
    kv_parallel = _flag("kv_parallel", kv_parallel)
    force = _flag("force_flex_attention", force_flex_attention)
    flex = _flag("use_flex_attention", use_flex_attention)
    NattenContext.set(
        is_fused_na_enabled=mode,
        is_kv_parallelism_enabled=kv_parallel,
        force_flex_attention=mode and force,
        use_flex_attention=flex or force,
    )


def is_fused_na_enabled() -> bool:
    """Whether modules run fused where they can."""
    return NattenContext.is_fused_na_enabled


def use_flex_attention() -> None:
    """`use_fused_na` with FlexAttention among the candidates, where it always is."""
    use_fused_na(use_flex_attention=True)


def force_flex_attention() -> None:
    """Makes "auto" mean backend "flex" for fused attention, until `use_fused_na` is called again."""
    use_fused_na(use_flex_attention=True, force_flex_attention=True)


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    """Kept without effect: backward kernels are parallel over keys, deterministic, and take no memory for it."""
    NattenContext.set(is_kv_parallelism_enabled=_flag("mode", mode))


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    """What `use_kv_parallelism_in_fused_na` was given; True at import."""
    return NattenContext.is_kv_parallelism_enabled


use_fna = use_fused_na
is_fna_enabled = is_fused_na_enabled


# FlexAttention is compiled wherever that can be relied on, which is on GPUs: compiling for a CPU takes it half a minute.


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> None:
    """Kept without effect: FlexAttention is compiled on GPUs, and not on CPUs.

    Args:
        mode: Whether to compile it.
        backprop: Whether to compile its backward pass.
    """
    mode, backprop = _flag("mode", mode), _flag("backprop", backprop)
    NattenContext.set(
        is_flex_compile_allowed=mode, is_flex_compile_backprop_allowed=mode and backprop
    )


def allow_flex_compile_backprop(mode: bool = True) -> None:
    """Kept without effect, as `allow_flex_compile`."""
    NattenContext.set(is_flex_compile_backprop_allowed=_flag("mode", mode))


def disable_flex_compile() -> None:
    """``allow_flex_compile(False)``."""
    allow_flex_compile(False)


def disable_flex_compile_backprop() -> None:
    """``allow_flex_compile_backprop(False)``."""
    allow_flex_compile_backprop(False)


def is_flex_compile_allowed() -> bool:
    """What `allow_flex_compile` was given; False at import."""
    return NattenContext.is_flex_compile_allowed


def is_flex_compile_backprop_allowed() -> bool:
    """What `allow_flex_compile_backprop` was given; False at import."""
    return NattenContext.is_flex_compile_backprop_allowed


# Memory and determinism ---------------------------------------------------------------------------------------------


def set_memory_usage_preference(pref: str = "default") -> None:
    """Kept without effect: no kernel trades memory for parallelism.

    Args:
        pref: ``"default"``, ``"strict"`` or ``"unrestricted"``.

    Raises:
        ValueError: If it is none of these.
    """
    names = {preference.name.lower(): preference for preference in MemoryUsagePreference}
    if not isinstance(pref, str) or pref not in names:
        reject("pref", repr(pref), f"one of {', '.join(map(repr, names))}")
    NattenContext.set(training_memory_preference=names[pref])


def get_memory_usage_preference() -> MemoryUsagePreference:
    """What `set_memory_usage_preference` was given."""
    return NattenContext.training_memory_preference


def is_memory_usage_default() -> bool:
    """Whether the preference is "default", as at import."""
    return NattenContext.training_memory_preference is MemoryUsagePreference.Default


def is_memory_usage_strict() -> bool:
    """Whether the preference is "strict"."""
    return NattenContext.training_memory_preference is MemoryUsagePreference.Strict


def is_memory_usage_unrestricted() -> bool:
    """Whether the preference is "unrestricted"."""
    return NattenContext.training_memory_preference is MemoryUsagePreference.Unrestricted


def release_scratch_memory() -> int:
    """Returns to the system what kernels for the CPU keep from call to call, so that memory is not made anew for each.

    That is at most 16 MB a thread, and a few usually. What a call in another thread is using is returned when it ends. Later
    calls take new memory. A forked child has nothing of its parent's.

    Returns:
        The bytes that were kept or in use.

    Example:
        >>> _ = natten.release_scratch_memory()
        >>> natten.release_scratch_memory()
        0
    """
    return _C.release_scratch()


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Turns the autotuner off for good, whose choice may differ from run to run. Off at import.

    All kernels are deterministic, forward and backward, whatever this is set to.
    """
    NattenContext.set(is_deterministic_mode_enabled=_flag("mode", mode))
    if mode:
        disable_autotuner()


def are_deterministic_algorithms_enabled() -> bool:
    """What `use_deterministic_algorithms` was given."""
    return NattenContext.is_deterministic_mode_enabled


# Autotuner ----------------------------------------------------------------------------------------------------------


def use_autotuner(
    forward_pass: bool | None = None,
    backward_pass: bool | None = None,
    thorough_mode_forward: bool | None = None,
    thorough_mode_backward: bool | None = None,
    warmup_steps_forward: int | None = None,
    warmup_steps_backward: int | None = None,
    steps_forward: int | None = None,
    steps_backward: int | None = None,
) -> None:
    """Lets fused kernels on GPUs search for their tile shapes, by time. Off at import; None leaves a setting as it is.

    Without it, tile shapes are chosen by their exact cost. With it, the first call of a problem on a kind of GPU times
    the cheapest tile shapes (in thorough mode all of them), and remembers the fastest on disk, in
    ``$NATTEN_CACHE_DIR`` or ``natten`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. On the CPU there is nothing to search, and nothing happens.

    Args:
        forward_pass: Whether forward passes search.
        backward_pass: Whether backward passes do.
        thorough_mode_forward: Whether forward passes time all tile shapes.
        thorough_mode_backward: Whether backward passes do.
        warmup_steps_forward: Runs of each tile shape before the timed ones, at least 0.
        warmup_steps_backward: The same for backward passes.
        steps_forward: Timed runs of each tile shape, at least 1.
        steps_backward: The same for backward passes.

    Raises:
        ValueError: If an argument is of the wrong type, or too small.
        RuntimeError: If `use_deterministic_algorithms` is on.
    """
    flags = {
        "enabled_for_forward": ("forward_pass", forward_pass),
        "enabled_for_backward": ("backward_pass", backward_pass),
        "thorough_mode_forward": ("thorough_mode_forward", thorough_mode_forward),
        "thorough_mode_backward": ("thorough_mode_backward", thorough_mode_backward),
    }
    steps = {
        "warmup_steps_forward": warmup_steps_forward,
        "warmup_steps_backward": warmup_steps_backward,
        "steps_forward": steps_forward,
        "steps_backward": steps_backward,
    }
    new: dict[str, Any] = {}
    for attribute, (name, flag) in flags.items():
        if flag is not None:
            new[attribute] = _flag(name, flag)
    for name, count in steps.items():
        if count is None:
            continue
        least = LEAST_STEPS[name]
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            reject(name, repr(count), f"an integer of at least {least}")
        new[name] = count
    if (forward_pass or backward_pass) and NattenContext.is_deterministic_mode_enabled:
        message = (
            "the autotuner times tile shapes, and may choose another one in the next run: not while "
            "natten.use_deterministic_algorithms is on"
        )
        raise ArgumentError(message)
    AutotunerContext.set(**new)


def disable_autotuner() -> None:
    """Turns it off, and thorough mode too."""
    use_autotuner(False, False, False, False)


def is_autotuner_enabled_for_forward() -> bool:
    """Whether forward passes on GPUs search for their tile shapes."""
    return AutotunerContext.enabled_for_forward


def is_autotuner_enabled_for_backward() -> bool:
    """Whether backward passes on GPUs search for their tile shapes."""
    return AutotunerContext.enabled_for_backward


def is_autotuner_enabled() -> bool:
    """Whether either does."""
    return AutotunerContext.enabled_for_forward or AutotunerContext.enabled_for_backward


def is_autotuner_thorough_for_forward() -> bool:
    """Whether forward passes time all tile shapes."""
    return AutotunerContext.thorough_mode_forward


def is_autotuner_thorough_for_backward() -> bool:
    """Whether backward passes time all tile shapes."""
    return AutotunerContext.thorough_mode_backward


# Unfused operations -------------------------------------------------------------------------------------------------


def use_gemm_na(mode: bool = True) -> bool:
    """Whether unfused operations may run on backend "gemm", as at import; if not, "naive" runs them.

    Returns:
        What it was set to. So do the next two.
    """
    NattenContext.set(is_gemm_na_enabled=_flag("mode", mode))
    return mode


def use_tiled_na(mode: bool = True) -> bool:
    """Kept without effect: what older releases call tiled kernels is backend "gemm" on older GPUs here."""
    NattenContext.set(is_tiled_na_enabled=_flag("mode", mode))
    return mode


def use_tf32_in_gemm_na(mode: bool = True) -> bool:
    """Whether unfused float32 operations on GPUs may round their factors to TF32.

    Until it is called they do what ``torch.backends.cuda.matmul`` says, as fused attention always does.
    """
    NattenContext.set(is_tf32_in_gemm_na_enabled=_flag("mode", mode))
    return mode


def is_gemm_na_enabled() -> bool:
    """Whether unfused operations may run on backend "gemm"."""
    return NattenContext.is_gemm_na_enabled


def is_tiled_na_enabled() -> bool:
    """What `use_tiled_na` was given; True at import."""
    return NattenContext.is_tiled_na_enabled


def is_tf32_in_gemm_na_enabled() -> bool:
    """Whether unfused float32 operations on GPUs may round their factors to TF32."""
    return _dispatch.allows_tf32("qk")


def enable_gemm_na() -> bool:
    """``use_gemm_na(True)``."""
    return use_gemm_na(True)


def disable_gemm_na() -> bool:
    """``use_gemm_na(False)``."""
    return use_gemm_na(False)


def enable_tiled_na() -> bool:
    """``use_tiled_na(True)``."""
    return use_tiled_na(True)


def disable_tiled_na() -> bool:
    """``use_tiled_na(False)``."""
    return use_tiled_na(False)


def enable_tf32() -> bool:
    """``use_tf32_in_gemm_na(True)``."""
    return use_tf32_in_gemm_na(True)


def disable_tf32() -> bool:
    """``use_tf32_in_gemm_na(False)``."""
    return use_tf32_in_gemm_na(False)
