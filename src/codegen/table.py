"""The kernel table: one row per compiled kernel, in order of preference.

Build, dispatch, tests, benchmark and ``natten.info`` all read these rows; nothing restates them. To add an
instantiation, add a row (or an ISA), and build.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

ANY_HEAD_DIM = 2**31 - 1


@dataclass(frozen=True)
class Isa:
    """An instruction set that kernels are compiled for, chosen among at run time.

    Attributes:
        id: What the user says (``NATTEN_CPU_ISA``).
        namespace: ``natten::cpu::<namespace>`` holds everything compiled for it.
        architecture: Regular expression of the CMAKE_SYSTEM_PROCESSORs that it exists on.
        flags: Compiler flags.
        features: What ``__builtin_cpu_supports`` must affirm; g++ 11 does not know the levels' names.
    """

    id: str
    namespace: str
    architecture: str
    flags: tuple[str, ...] = ()
    features: tuple[str, ...] = ()


_X86_64 = "x86_64|AMD64|amd64"
_V2_FEATURES = ("popcnt", "sse3", "ssse3", "sse4.1", "sse4.2")
_V3_FEATURES = (*_V2_FEATURES, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt")
_V4_FEATURES = (*_V3_FEATURES, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_V4_FLAGS = ("-march=x86-64-v4", "-mprefer-vector-width=512")

# Compiled without flags: runs wherever the library loads.
BASELINE = Isa("baseline", "baseline", ".*")

# Best first.
ISAS = (
    Isa(
        "x86-64-v4-bf16",
        "v4_bf16",
        _X86_64,
        (*_V4_FLAGS, "-mavx512bf16"),
        (*_V4_FEATURES, "avx512bf16"),
    ),
    Isa("x86-64-v4", "v4", _X86_64, _V4_FLAGS, _V4_FEATURES),
    Isa("x86-64-v3", "v3", _X86_64, ("-march=x86-64-v3",), _V3_FEATURES),
    Isa("x86-64-v2", "v2", _X86_64, ("-march=x86-64-v2",), _V2_FEATURES),
    Isa("aarch64", "neon", "aarch64|arm64"),
)


@dataclass(frozen=True)
class Row:
    """One kernel.

    Attributes:
        backend: Its family: the function template is ``<backend>_<op>`` in ``natten/cpu/<header>.hpp``.
        op: ``"forward"`` or ``"backward"``.
        dtype: Storage type of the tensors, a key of ``generate.STORAGE``.
        isa: What it is compiled for.
        max_head_dim: Largest head dim, of queries and of values.
    """

    backend: str
    op: str
    dtype: str
    isa: Isa
    max_head_dim: int

    @property
    def name(self) -> str:
        """What it is called: exported function, file, and kernel name at run time."""
        suffix = "" if self.isa is BASELINE else f"_{self.isa.namespace}"
        return f"{self.backend}_{self.op}_{self.dtype}{suffix}"

    @property
    def header(self) -> str:
        """Where its template lives."""
        return "naive" if self.backend == "naive" else f"{self.backend}_{self.op}"


ROWS = (
    *(
        Row("fna", op, dtype, isa, max_head_dim=512)
        for isa, op, dtype in product(ISAS, ("forward", "backward"), ("f32", "bf16", "f16"))
    ),
    *(
        Row("naive", op, dtype, BASELINE, max_head_dim=ANY_HEAD_DIM)
        for op, dtype in product(("forward", "backward"), ("f64", "f32", "bf16", "f16"))
    ),
)
