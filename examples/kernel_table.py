"""A kernel table of one's own: float16 kernels for head dim 96, with tiles of 128 queries and 64 keys on SM86 and SM89.

The package pads head dim 96 to 128. These do not, and a block of theirs owns twice as many queries::

    python -m natten.build_kernels examples/kernel_table.py --archs 86 --output my_kernels.so

    natten.load_kernels("my_kernels.so")      # natten.explain and natten.info list them from then on

``table`` is the package's own table: what a policy and a row are stands there. A tile must fit into shared memory, and its
accumulators into 255 registers a thread: the command reports both.
"""

from table import CudaRow, Policy

SM86 = Policy("Sm80", "sm80", min_arch=86, max_arch=89)

CUDA_ROWS = (
    CudaRow("fna", "forward", "f16", SM86, max_head_dim=96, own=128, streamed=64, stages=2),
    CudaRow("fna", "backward", "f16", SM86, max_head_dim=96, own=64, streamed=32, stages=2),
)
