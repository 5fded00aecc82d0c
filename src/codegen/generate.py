"""Writes the C++ files that instantiate the kernel table, and tells CMake about them.

Usage:
    generate.py --architecture x86_64 --output <folder in the build tree> [--only v3]   the CPU's kernels, and dispatch's table
    generate.py --cuda-output <folder> --cuda-archs "80;89" [--all-policies] [--table my_table.py]
    generate.py --cuda-output <folder> --select emulation [--only sm80] [--table my_table.py]
"""

from __future__ import annotations

import argparse
import re
import runpy
from pathlib import Path

from table import (
    ANY_ARCH,
    ANY_LATER,
    BASELINE,
    CUDA_ROWS,
    ENTRIES,
    ISAS,
    OPS,
    ROWS,
    CudaRow,
    Isa,
    Row,
    emulated,
)

# dtype of a row -> C++ storage type, enumerator of natten::DType.
STORAGE = {
    "f64": ("double", "kFloat64"),
    "f32": ("float", "kFloat32"),
    "bf16": ("BFloat16", "kBFloat16"),
    "f16": ("Float16", "kFloat16"),
}
CUDA_STORAGE = {
    "f64": "double",
    "f32": "float",
    "bf16": "cutlass::bfloat16_t",
    "f16": "cutlass::half_t",
}


# Tokens of a tile: what the choice of tile shapes knows (tiling.hpp), and the bits of a mask (collective/walk.hpp).
MOST_OWN = 256
MOST_STREAMED = 64


def enumerator(op: str) -> str:
    """Of natten::Op."""
    return "Op::k" + op.title().replace("_", "")


def entries(op: str, function: str, nothing: str) -> str:
    """C++ initializers of a kernel's entry points: `function` where the op's belongs, `nothing` elsewhere."""
    return ", ".join(function if entry == OPS[op].entry else nothing for entry in ENTRIES)


def check(rows: tuple[Row, ...], cuda_rows: tuple[CudaRow, ...]) -> None:
    """Raises ValueError for a table that cannot be right."""
    everything: tuple[Row | CudaRow, ...] = (*rows, *cuda_rows)
    names = [each.name for each in everything]
    for name in names:
        if names.count(name) > 1:
            msg = f"two rows of the kernel table are called {name}"
            raise ValueError(msg)
    for each in everything:
        if each.op not in OPS or each.dtype not in STORAGE or each.max_head_dim < 1:
            msg = f"malformed row of the kernel table: {each}"
            raise ValueError(msg)
    for cuda_row in cuda_rows:
        if cuda_row.policy is ANY_ARCH:
            continue
        sizes = (cuda_row.own, cuda_row.streamed, cuda_row.stages)
        if any(size < 1 or size & (size - 1) for size in sizes):
            msg = f"{cuda_row.name}: own, streamed and stages must be powers of two, not {sizes}"
            raise ValueError(msg)
        if cuda_row.own > MOST_OWN or cuda_row.streamed > MOST_STREAMED:
            msg = (
                f"{cuda_row.name}: own = {cuda_row.own}, streamed = {cuda_row.streamed}; wanted at most {MOST_OWN} "
                f"and {MOST_STREAMED} (a row's mask of a streamed tile is a word of {MOST_STREAMED} bits)"
            )
            raise ValueError(msg)
    for row in rows:
        if row.isa is not BASELINE and row.isa not in ISAS:
            msg = f"{row.name}: ISA {row.isa.id} is not in ISAS"
            raise ValueError(msg)


def signature(row: Row) -> str:
    """Declaration of a row's entry point, within its ISA's namespace."""
    return f"void {row.name}({OPS[row.op].arguments} const& arguments)"


def instantiation(row: Row) -> str:
    """The file that compiles one row."""
    return f"""\
#define NATTEN_CPU_ISA {row.isa.namespace}
#include "natten/cpu/{row.header}.hpp"

namespace natten::cpu::{row.isa.namespace} {{
{signature(row)} {{ {row.backend}_{row.op}<{STORAGE[row.dtype][0]}>(arguments); }}
}}  // namespace natten::cpu::{row.isa.namespace}
"""


def supports(isa: Isa) -> str:
    """C++ expression: whether this CPU (and its operating system) runs `isa`."""
    tests = [f'__builtin_cpu_supports("{feature}")' for feature in isa.features]
    return " && ".join(tests) or "true"


def table(rows: list[Row], isas: list[Isa]) -> str:
    """The file that lists the rows for dispatch, of CUDA kernels their descriptions."""
    declarations = "\n".join(
        f"namespace natten::cpu::{row.isa.namespace} {{ {signature(row)}; }}" for row in rows
    )
    isa_entries = "\n".join(f'    {{"{isa.id}", {supports(isa)}}},' for isa in isas)
    kernels = []
    for row in rows:
        function = f"&cpu::{row.isa.namespace}::{row.name}"
        kernels.append(
            f'    {{"{row.name}", {enumerator(row.op)}, "{row.backend}", "{row.isa.id}", '
            f"DType::{STORAGE[row.dtype][1]}, {row.max_head_dim}, {entries(row.op, function, 'nullptr')}, {{}}}},"
        )
    for cuda_row in CUDA_ROWS:
        kernels.append(
            f'    {{"{cuda_row.name}", {enumerator(cuda_row.op)}, "{cuda_row.backend}", "{cuda_row.policy.id}", '
            f"DType::{STORAGE[cuda_row.dtype][1]}, {cuda_row.max_head_dim}, "
            f"{entries(cuda_row.op, 'nullptr', 'nullptr')}, {cuda_traits(cuda_row)}}},"
        )
    newline = "\n"
    return f"""\
#include "dispatch/table.hpp"

{declarations}

namespace natten {{

std::vector<Isa> const& isas() {{
  static std::vector<Isa> const table = {{
{isa_entries}
  }};
  return table;
}}

std::vector<Kernel> const& own_kernels() {{
  static std::vector<Kernel> const table = {{
{newline.join(kernels)}
  }};
  return table;
}}

}}  // namespace natten
"""


def cuda_traits(row: CudaRow) -> str:
    """C++ initializer of natten::CudaTraits."""
    policy = row.policy
    return (
        f"{{true, false, {str(policy.is_tf32).lower()}, {policy.min_arch}, {policy.max_arch}, "
        f"{row.own}, {row.streamed}}}"
    )


def cuda_entry_points(row: CudaRow) -> str:
    """C++ definitions of a row's entry points, as natten/cuda/library.hpp describes them."""
    argument = CUDA_STORAGE[row.dtype]
    if row.policy is not ANY_ARCH:
        argument = f"{row.policy.id}<{argument}, {row.max_head_dim}, {row.own}, {row.streamed}, {row.stages}>"
    kind = OPS[row.op].arguments
    workspace = ""
    if OPS[row.op].has_workspace:
        workspace = f"""
std::int64_t {row.name}_workspace({kind} const* arguments, LaunchContext const* context) {{
  return {row.function}_workspace<{argument}>(*arguments, *context);
}}
"""
    return f"""
int {row.name}({kind} const* arguments, LaunchContext const* context, char* message, int size) {{
  return report_failure("{row.name}", message, size, [&] {{
    run_{row.function}<{argument}>(*arguments, *context, Launcher(*context));
  }});
}}
{workspace}"""


def cuda_unit(rows: list[CudaRow]) -> str:
    """The file that compiles rows of one unit."""
    headers = sorted({f"kernel/{row.header}" for row in rows})
    headers += sorted({f"policy/{row.policy.header}" for row in rows if row.policy is not ANY_ARCH})
    includes = "\n".join(
        f'#include "natten/cuda/{header}.hpp"' for header in (*headers, "entry", "launch")
    )
    return f"""\
{includes}

namespace natten::cuda {{
{"".join(cuda_entry_points(row) for row in rows)}
}}  // namespace natten::cuda
"""


def compiled_archs(row: CudaRow, archs: list[int], *, all_policies: bool) -> list[int]:
    """The architectures, of those asked for, that a row is compiled for."""
    last = max(archs, default=0) if all_policies else row.policy.max_arch
    return [arch for arch in archs if row.policy.min_arch <= arch <= last]


def ptx_arch(row: CudaRow, archs: list[int], newest: int) -> int:
    """The architecture that a row is compiled to PTX of, for GPUs still to come; 0: of none."""
    return newest if row.policy.max_arch == ANY_LATER and newest in archs else 0


def cuda_library(rows: list[tuple[CudaRow, list[int]]], newest: int, *, on_host: bool) -> str:
    """The file that lists a library's rows for whoever loads it."""
    declarations, kernels = [], []
    for row, archs in rows:
        arguments = f"{OPS[row.op].arguments} const*, LaunchContext const*"
        declarations.append(f"int {row.name}({arguments}, char*, int);")
        workspace = "nullptr"
        if OPS[row.op].has_workspace:
            workspace = f"&{row.name}_workspace"
            declarations.append(f"std::int64_t {row.name}_workspace({arguments});")
        declarations.append(
            f"constexpr int {row.name}_archs[] = {{{', '.join(map(str, archs)) or '0'}}};"
        )
        name = (
            f"{row.name}_emulated" if on_host else row.name
        )  # so as not to stand for the real one
        kernels.append(
            f'    {{"{name}", "{row.backend}", "{row.policy.id}", {enumerator(row.op)}, '
            f"DType::{STORAGE[row.dtype][1]}, {int(row.policy.is_tf32)}, {row.policy.min_arch}, "
            f"{row.policy.max_arch}, {row.max_head_dim}, {row.own}, {row.streamed}, {row.name}_archs, {len(archs)}, "
            f"{ptx_arch(row, archs, newest)}, "
            f"{entries(row.op, f'{{&{row.name}, {workspace}}}', '{}')}}},"
        )
    newline = "\n"
    toolkit = '"emulation on the CPU"' if on_host else "NATTEN_CUDA_TOOLKIT"
    include = "" if on_host else "#include <cuda_runtime_api.h>\n\n"
    versions = "0, nullptr" if on_host else "CUDART_VERSION, &natten::cuda::driver_version"
    if not on_host:
        declarations.append(
            "int driver_version() { int version = 0; return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0; }"
        )
    return f"""\
{include}#include "natten/cuda/library.hpp"

namespace natten::cuda {{

{newline.join(declarations)}

constexpr KernelInfo kKernels[] = {{
{newline.join(kernels)}
}};

}}  // namespace natten::cuda

extern "C" __attribute__((visibility("default"))) natten::cuda::Library const* NATTEN_CUDA_LIBRARY() {{
  static natten::cuda::Library const library = {{
      natten::cuda::kAbiVersion, sizeof(natten::BackwardArguments), {len(rows)}, natten::cuda::kKernels,
      {toolkit}, {versions}, {int(on_host)}}};
  return &library;
}}
"""


def write_cuda(output: Path, rows: list[tuple[CudaRow, list[int]]], *, on_host: bool) -> None:
    """Writes the files of a library of CUDA kernels, and for CMake their names and the targets of each.

    Rows share a file that are of one unit and for the same architectures.
    """
    output.mkdir(parents=True, exist_ok=True)
    newest = max((arch for _, archs in rows for arch in archs), default=0)
    files: dict[str, list[CudaRow]] = {}
    targets: dict[str, list[str]] = {}
    for row, archs in rows:
        ptx = ptx_arch(row, archs, newest)
        of_row = [f"{arch}-real" for arch in archs] + ([f"{ptx}-virtual"] if ptx else [])
        file, count = row.unit, 1
        while targets.setdefault(file, of_row) != of_row:
            count += 1
            file = f"{row.unit}_{count}"
        files.setdefault(file, []).append(row)
    for file, file_rows in files.items():
        write_if_different(output / f"{file}.cu", cuda_unit(file_rows))
    write_if_different(output / "library_table.cpp", cuda_library(rows, newest, on_host=on_host))
    lines = [f"set(NATTEN_CUDA_UNITS {' '.join(files)})"]
    lines += [f"set(NATTEN_CUDA_TARGETS_{file} {' '.join(of)})" for file, of in targets.items()]
    write_if_different(output / "cuda_sources.cmake", "\n".join([*lines, ""]))


def cmake_lists(rows: list[Row], isas: list[Isa]) -> str:
    """Variables for CMakeLists.txt: the namespaces, and the flags and sources of each."""
    lines = []
    for isa in isas:
        sources = " ".join(f"{row.name}.cpp" for row in rows if row.isa is isa)
        lines.append(f"set(NATTEN_FLAGS_{isa.namespace} {' '.join(isa.flags)})")
        lines.append(f"set(NATTEN_SOURCES_{isa.namespace} {sources})")
    namespaces = " ".join(isa.namespace for isa in isas)
    return "\n".join([f"set(NATTEN_ISA_NAMESPACES {namespaces})", *lines, ""])


def write_if_different(path: Path, text: str) -> None:
    """Leaves the file alone, and so unbuilt, when it already says this."""
    if path.suffix in (".cpp", ".cu"):
        text = "// Generated by src/codegen/generate.py.\n" + text
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def write_cpu(output: Path, architecture: str, only: str) -> None:
    """The CPU kernels, and the table of the core."""
    rows = [
        row
        for row in ROWS
        if re.fullmatch(row.isa.architecture, architecture) and re.search(only, row.name)
    ]
    if not rows:
        message = f"no row for {architecture} has a name in which {only!r} is found"
        raise ValueError(message)
    isas = [isa for isa in ISAS if any(row.isa is isa for row in rows)]
    output.mkdir(parents=True, exist_ok=True)
    for row in rows:
        write_if_different(output / f"{row.name}.cpp", instantiation(row))
    write_if_different(output / "table.cpp", table(rows, isas))
    write_if_different(
        output / "kernels.cmake",
        cmake_lists(
            rows, [*isas, *([BASELINE] if any(row.isa is BASELINE for row in rows) else [])]
        ),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", help="CMAKE_SYSTEM_PROCESSOR")
    parser.add_argument("--output", type=Path, help="folder of the CPU's kernels")
    parser.add_argument("--cuda-output", type=Path, help="folder of CUDA kernels")
    parser.add_argument("--cuda-archs", default="", help="architectures, such as 80;89")
    parser.add_argument(
        "--all-policies",
        action="store_true",
        help="also rows of older architectures, which would have to be asked for by name",
    )
    parser.add_argument(
        "--select",
        choices=["emulation"],
        help="rows for the CPU: those that tests want, all of a plug-in's",
    )
    parser.add_argument("--only", default="", help="regular expression of the rows' names")
    parser.add_argument("--table", type=Path, help="Python file with the CUDA_ROWS of a plug-in")
    arguments = parser.parse_args()

    check(ROWS, CUDA_ROWS)
    if arguments.output:
        write_cpu(arguments.output, arguments.architecture, arguments.only)
    if arguments.cuda_output:
        rows: tuple[CudaRow, ...] = CUDA_ROWS
        if arguments.table:
            rows = tuple(runpy.run_path(str(arguments.table))["CUDA_ROWS"])
            check(ROWS, (*CUDA_ROWS, *rows))
        archs = sorted(int(arch) for arch in arguments.cuda_archs.split(";") if arch)
        chosen = [
            (row, compiled_archs(row, archs, all_policies=arguments.all_policies)) for row in rows
        ]
        on_host = arguments.select == "emulation"
        chosen = [
            (row, archs)
            for row, archs in chosen
            if (arguments.table or emulated(row) if on_host else archs)
            and re.search(arguments.only, row.name)
        ]
        if not chosen:
            parser.error(f"no row that is wanted is for any of the architectures {archs}")
        write_cuda(arguments.cuda_output, chosen, on_host=on_host)


if __name__ == "__main__":
    main()
