"""The compiled core. Knows no torch: tensors arrive as addresses and strides."""

from collections.abc import Sequence
from typing import TypeAlias

# An axis as 11 integers, in the order of `AXIS_FIELDS`: extent, kernel_size, stride, dilation, is_causal, boundary,
# offset, query_origin, query_extent, key_origin, key_extent (see natten::Axis in include/natten/window.hpp).
AxisInts: TypeAlias = Sequence[int]
# Address, batch stride, axis strides (one per axis of the problem's rank; for additional tokens one), head stride.
# Strides in elements. Address 0 means "not there".
Tensor: TypeAlias = tuple[int, int, tuple[int, ...], int]

AXIS_FIELDS: tuple[str, ...]
BOUNDARIES: tuple[str, ...]
DTYPES: tuple[str, ...]  # torch names: "float64", "float32", "bfloat16", "float16"

class Kernel:
    """One row of the kernel table, with what this machine says about it."""

    name: str
    op: str  # "forward", "backward", or an unfused one: "qk", "av", "av_transposed", "rpb_gradient"
    backend: str  # "fna", "gemm" or "naive"
    isa: str  # of a CUDA kernel, the policy it is written for
    dtypes: tuple[str, ...]
    max_head_dim: int
    is_cuda: bool
    is_tf32: bool
    min_arch: int  # SM80 is 80; 0 for the CPU's, as the next
    max_arch: int  # the newest architecture it is chosen on; newer ones run it when it is named
    tile: tuple[int, int]  # tokens of an own and of a streamed tile
    archs: list[int]  # that its code is there for; loads the package's CUDA library
    is_emulated: bool  # a CUDA kernel that runs on the CPU, for tests

class Problem:
    """natten::Problem. Raises ValueError where a window leaves the key box."""

    def __init__(
        self,
        dtype: str,
        axes: Sequence[int],  # rank * 11 integers
        batch: int,
        heads: int,
        heads_kv: int,
        head_dim: int,
        head_dim_value: int,
        additional_keys: int,
        has_rpb: bool,
        scale: float,
        allow_tf32: bool = False,
        tile_shapes: Sequence[
            int
        ] = (),  # that CUDA kernels are to use: of queries, then of keys; 0 where any will do
    ) -> None: ...
    def tile_shapes(self, of_keys: bool, own: int, streamed: int) -> tuple[list[int], list[int]]:
        """Of own tiles (of keys, or of queries) and of streamed ones, of these numbers of tokens (powers of two)."""
    @property
    def queries_slide(self) -> bool:
        """Whether CPU kernels with 16 lanes take queries that are neighbours on the last axis, and slide their keys."""

def kernels(device: str = "cpu") -> list[Kernel]:
    """Every row of the table for "cpu", "cuda" or "emulation", in order of preference.

    Of the CPU's those that were compiled in; of CUDA's all, with `archs` saying what there is.
    """

def candidates(
    problem: Problem, op: str, backend: str, isa: str, arch: int = 0, is_pretended: bool = False
) -> list[tuple[Kernel, list[str]]]:
    """Rows of `op` for a device in order of preference, each with the reasons why it cannot run (empty: it can).

    backend "auto" considers all; "fna:Sm80" those of a policy or ISA, also where others are preferred, and emulated
    ones. isa "" means the best this CPU has; arch 0 is the CPU, 80 is SM80. A pretended device runs kernels whose code
    is not there.
    """

def has_code_for(arch: int) -> bool: ...
def load_kernels(path: str) -> None:
    """Loads a library of CUDA kernels, which come before those there are. ValueError if it is none, or of another version."""

def libraries() -> list[tuple[str, str, int]]:
    """Libraries of CUDA kernels that are loaded, the package's own included: path, toolkit, number of kernels."""

def workspace_bytes(problem: Problem, op: str, kernel: str, arch: int = 0) -> int:
    """Device memory that the kernel wants as its workspace."""

def forward(
    problem: Problem,
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor,
    additional_values: Tensor,
    rpb: int,
    output: Tensor,
    lse: Tensor,
    num_threads: int,
    arch: int = 0,
    stream: int = 0,
    workspace: int = 0,
) -> None: ...
def backward(
    problem: Problem,
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor,
    additional_values: Tensor,
    rpb: int,
    output: Tensor,
    lse: Tensor,
    d_output: Tensor,
    d_lse: Tensor,
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    d_additional_keys: Tensor,
    d_additional_values: Tensor,
    d_rpb: int,
    num_threads: int,
    arch: int = 0,
    stream: int = 0,
    workspace: int = 0,
) -> None: ...
def unfused(
    problem: Problem,
    op: str,
    kernel: str,
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    rpb: int,
    d_rpb: int,
    unused: float,
    num_threads: int,
    arch: int = 0,
    stream: int = 0,
    workspace: int = 0,
) -> None:
    """Runs an unfused op, as natten::UnfusedArguments defines it: which operand is written depends on the op."""

def windows(axis: AxisInts) -> list[tuple[int, int, int, int]]:
    """For every token of the query tensor: (dilation group, begin, end, keys its softmax counts), in group positions.

    The softmax counts end - begin keys, but for boundary "zeros" the missing ones too.
    """

def inverse_windows(axis: AxisInts) -> list[tuple[int, int, int]]:
    """For every token of the key tensor: (dilation group, begin, end) of the queries attending to it."""

def valid_queries(axis: AxisInts) -> tuple[int, int]:
    """Tokens of the grid, [begin, end), that are queries ("valid" drops those without a whole window)."""

def attended_tokens(axis: AxisInts) -> tuple[int, int]:
    """The first and the last token of the grid that the queries attend to, in the keys or not; (0, -1) without queries."""

def attended_pairs(axis: AxisInts) -> int:
    """Sum over the queries of their window's size."""

def tile_boxes(
    axis: AxisInts, tile: int, of_keys: bool = False
) -> list[tuple[int, int, int, int, int, int, int]]:
    """For every query tile: (group, first query, end query, first key, end key, first interior key, end interior).

    The same of key tiles, and the queries that attend to them.
    """

def visited_tiles(axis: AxisInts, query_tile: int, key_tile: int) -> int:
    """Key tiles that query tiles of this size visit, key tiles starting at the corner of each query tile's box."""

def cpu_isas() -> list[str]:
    """ISAs compiled in that this CPU can run, best first."""

def forced_isa() -> str:
    """The environment variable NATTEN_CPU_ISA as it is now, or nothing."""

def num_parallel_threads(num_threads: int) -> int:
    """How many threads a parallel region asked for num_threads really runs on (for tests)."""

def set_least_work(multiplications: float) -> float:
    """What a thread of a CPU kernel has to do at least; returns what it was. With 0, all threads always run (for tests)."""

def before_fork() -> None:
    """Nobody takes or returns scratch memory until one of the other two is called."""

def after_fork_in_parent() -> None:
    """The end of that."""

def after_fork_in_child() -> None:
    """The OpenMP pool did not survive the fork: later regions use threads of their own, and new scratch memory."""

def release_scratch() -> int:
    """Returns scratch memory to the system, what is in use once it no longer is; how many bytes that is altogether."""
