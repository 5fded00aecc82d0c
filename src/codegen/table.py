"""The kernel table: one row per compiled kernel, in order of preference.

Build, dispatch, tests, benchmark and ``natten.info`` all read these rows; nothing restates them. To add an
instantiation, add a row (or an ISA), and build; CUDA rows may also stand in a file of their own, which becomes a
library that is loaded at run time (CONTRIBUTING.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

ANY_HEAD_DIM = 2**31 - 1
ANY_LATER = 2**31 - 1  # architecture: there is no newer one that prefers another policy


@dataclass(frozen=True)
class Op:
    """What the kernels of an op look like to their callers.

    Attributes:
        entry: Which of the entry points it fills, and the first word of the struct that it is called with.
        has_workspace: Whether CUDA kernels of it want device memory.
    """

    entry: str
    has_workspace: bool = False

    @property
    def arguments(self) -> str:
        """The struct that it is called with."""
        return f"{self.entry.capitalize()}Arguments"


ENTRIES = ("forward", "backward", "unfused")
OPS = {
    "forward": Op("forward"),
    "backward": Op("backward", has_workspace=True),
    "qk": Op("unfused"),
    "av": Op("unfused"),
    "av_transposed": Op("unfused"),
    "rpb_gradient": Op("unfused", has_workspace=True),
}
UNFUSED_OPS = tuple(name for name, op in OPS.items() if op.entry == "unfused")


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
    """A kernel that runs on the CPU.

    Attributes:
        backend: Its family: the function template is ``<backend>_<op>`` in ``natten/cpu/<header>.hpp``.
        op: What it computes, a key of ``OPS``.
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
        if self.backend == "naive":
            return "naive_unfused" if self.op in UNFUSED_OPS else "naive"
        return f"{self.backend}_{self.op}"


ROWS = (
    *(
        Row("fna", op, dtype, isa, max_head_dim=512)
        for isa, op, dtype in product(ISAS, ("forward", "backward"), ("f32", "bf16", "f16"))
    ),
    *(
        Row("gemm", op, dtype, isa, max_head_dim=512)
        for isa, op, dtype in product(ISAS, UNFUSED_OPS, ("f32", "bf16", "f16"))
    ),
    *(
        Row("naive", op, dtype, BASELINE, max_head_dim=ANY_HEAD_DIM)
        for op, dtype in product(
            ("forward", "backward", *UNFUSED_OPS), ("f64", "f32", "bf16", "f16")
        )
    ),
)


@dataclass(frozen=True)
class Policy:
    """An architecture that CUDA kernels are written for: a class template in ``natten/cuda/policy/<header>.hpp``.

    Attributes:
        id: Name of the template.
        header: Where it lives.
        min_arch: The oldest architecture whose instructions it needs, 80 for SM80.
        max_arch: The newest that prefers it; newer ones run it when told to.
        is_tf32: Whether it rounds the factors of float32 products to TF32.
    """

    id: str
    header: str
    min_arch: int
    max_arch: int
    is_tf32: bool = False


SM80 = Policy("Sm80", "sm80", 80, ANY_LATER)
SM80_TF32 = Policy("Sm80Tf32", "sm80", 80, ANY_LATER, is_tf32=True)
SM80_SIMT = Policy("Sm80Simt", "sm80", 80, ANY_LATER)
SM75 = Policy("Sm75", "sm75", 75, 79)
SM70 = Policy("Sm70", "sm70", 70, 74)
SM50 = Policy("Sm50", "sm50", 50, 79)
# float16 has tensor cores from SM70 on.
SM50_F16 = Policy("Sm50", "sm50", 50, 69)
# Any architecture: the naive kernels have no policy.
ANY_ARCH = Policy("naive", "", 50, ANY_LATER)


@dataclass(frozen=True)
class CudaRow:
    """A kernel that runs on an NVIDIA GPU.

    Attributes:
        backend: Its family.
        op: What it computes, a key of ``OPS``.
        dtype: Storage type of the tensors, a key of ``generate.CUDA_STORAGE``.
        policy: What it is written for.
        max_head_dim: Head dims up to this one are padded to it, in the kernel.
        own: Tokens of the tile that a thread block owns.
        streamed: Tokens of a tile that is streamed past it.
        stages: Streamed tiles in shared memory at a time.
    """

    backend: str
    op: str
    dtype: str
    policy: Policy
    max_head_dim: int
    own: int = 0
    streamed: int = 0
    stages: int = 0

    @property
    def unit(self) -> str:
        """The file that it is compiled in: with all rows of the same tiles, whose products are the same templates."""
        if self.policy is ANY_ARCH:
            return f"{self.dtype}_cuda"
        tile = f"{self.own}x{self.streamed}" + (f"x{self.stages}" if self.stages != 2 else "")
        return f"{self.dtype}_{self.policy.id.lower()}_d{self.max_head_dim}_{tile}"

    @property
    def name(self) -> str:
        """What it is called: entry point, and kernel name at run time."""
        return f"{self.backend}_{self.op}_{self.unit}"

    @property
    def function(self) -> str:
        """The function template is called ``run_<function>``. A sum over weights needs no matrix product."""
        return self.op if self.op == "rpb_gradient" else f"{self.backend}_{self.op}"

    @property
    def header(self) -> str:
        """Where it lives, in ``natten/cuda/kernel``."""
        if self.function.startswith("naive") and self.op in UNFUSED_OPS:
            return "naive_unfused"
        return self.function.removesuffix("_transposed")


# (own, streamed, stages) of each head-dim bucket: what fits in the shared memory of every architecture of the policy
# (48 KiB of SM50, 64 of SM75, 96 of SM70, 99 of SM86) and in 255 registers a thread without a spill.
_FORWARD_TILES = {
    (SM80, "f16 bf16"): {32: (64, 64, 2), 64: (64, 64, 2), 128: (64, 64, 2), 256: (64, 32, 2)},
    (SM80_TF32, "f32"): {32: (64, 64, 2), 64: (64, 64, 2), 128: (64, 32, 2), 256: (64, 16, 2)},
    (SM80_SIMT, "f32"): {32: (64, 64, 2), 64: (64, 64, 2), 128: (64, 32, 2), 256: (32, 16, 2)},
    (SM75, "f16"): {32: (64, 64, 2), 64: (64, 64, 2), 128: (64, 64, 2), 256: (64, 16, 2)},
    (SM70, "f16"): {32: (64, 64, 2), 64: (64, 64, 2), 128: (64, 64, 2), 256: (64, 32, 2)},
    (SM50_F16, "f16"): {32: (64, 64, 2), 64: (64, 64, 2), 128: (64, 32, 2), 256: (32, 32, 1)},
    (SM50, "bf16"): {32: (64, 64, 2), 64: (64, 64, 2), 128: (64, 32, 2), 256: (32, 32, 1)},
    (SM50, "f32"): {32: (64, 64, 2), 64: (64, 32, 2), 128: (32, 16, 2), 256: (16, 16, 1)},
}
_BACKWARD_TILES = {
    (SM80, "f16 bf16"): {32: (64, 64, 2), 64: (64, 64, 2), 128: (64, 32, 2), 256: (64, 16, 1)},
    (SM80_TF32, "f32"): {32: (64, 32, 2), 64: (64, 32, 2), 128: (64, 16, 1), 256: (16, 16, 1)},
    (SM80_SIMT, "f32"): {32: (64, 32, 2), 64: (64, 32, 2), 128: (32, 32, 1), 256: (16, 16, 1)},
    (SM75, "f16"): {32: (64, 32, 2), 64: (64, 32, 2), 128: (64, 32, 1), 256: (32, 16, 1)},
    (SM70, "f16"): {32: (64, 32, 2), 64: (64, 32, 2), 128: (64, 32, 1), 256: (32, 32, 1)},
    (SM50_F16, "f16"): {32: (64, 32, 1), 64: (64, 32, 1), 128: (32, 32, 1), 256: (16, 16, 1)},
    (SM50, "bf16"): {32: (64, 32, 1), 64: (64, 32, 1), 128: (32, 32, 1), 256: (16, 16, 1)},
    (SM50, "f32"): {32: (64, 32, 1), 64: (32, 32, 1), 128: (16, 16, 1), 256: (8, 8, 1)},
}

CUDA_ROWS = (
    *(
        CudaRow("fna", op, dtype, policy, head_dim, *tile)
        for op, tiles in (("forward", _FORWARD_TILES), ("backward", _BACKWARD_TILES))
        for (policy, dtypes), buckets in tiles.items()
        for dtype in dtypes.split()
        for head_dim, tile in buckets.items()
    ),
    *(
        CudaRow("gemm", op, dtype, policy, head_dim, *tile)
        for op in ("qk", "av", "av_transposed")
        for (policy, dtypes), buckets in _FORWARD_TILES.items()
        for dtype in dtypes.split()
        for head_dim, tile in buckets.items()
    ),
    *(
        CudaRow("gemm", "rpb_gradient", dtype, ANY_ARCH, ANY_HEAD_DIM)
        for dtype in ("f32", "bf16", "f16")
    ),
    *(
        CudaRow("naive", op, dtype, ANY_ARCH, ANY_HEAD_DIM)
        for op, dtype in product(OPS, ("f64", "f32", "bf16", "f16"))
    ),
)


def emulated(row: CudaRow) -> bool:
    """Whether the tests run this row on the CPU: each policy and type at one head dim, and two of them at all.

    Of the unfused ones only at the largest, too, where groups of threads share the columns of a sum.
    """
    at_all = (row.policy is SM80 and row.dtype == "f16") or (
        row.policy is SM50 and row.dtype == "f32" and row.op == "forward"
    )
    if row.backend == "gemm":
        at_all = at_all and row.max_head_dim == 256
    return row.max_head_dim == 32 or row.policy is ANY_ARCH or at_all
