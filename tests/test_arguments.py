# SPDX-License-Identifier: MIT
"""What bad input gets: an error that names the argument, its value, what is wanted; and what counts as good input."""

from __future__ import annotations

import pytest
import torch

import natten
from natten import _C, functional
from natten._axes import Axis

pytestmark = pytest.mark.cpu  # messages, and choices among the CPU's kernels


def tensors(*shape, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(3)]


def test_axis_is_the_cores():
    assert Axis._fields == _C.AXIS_FIELDS


X = torch.randn(1, 8, 1, 4)
QUERY = torch.randn(2, 6, 8, 4, 16)
WRONG_TENSORS = {
    "query rank": ({"query": QUERY[0]}, r"query.ndim = 4; wanted 5"),
    "key rank": ({"key": QUERY[0]}, r"key.ndim = 4; wanted 5"),
    "key grid": (
        {"key": QUERY[:, :5], "value": QUERY[:, :5]},
        r"key.shape\[1:-2\] = \(5, 8\); wanted \(6, 8\)",
    ),
    "value grid": ({"value": QUERY[:, :5]}, r"value.shape\[1:-2\]"),
    "batch": ({"key": QUERY[:1], "value": QUERY[:1]}, r"key.shape\[0\] = 1; wanted 2"),
    "head dim": ({"key": QUERY[..., :8]}, r"key.shape\[-1\] = 8; wanted 16"),
    "heads": (
        {"key": QUERY[..., :3, :], "value": QUERY[..., :3, :]},
        r"key.shape\[-2\] = 3; wanted a divisor of 4",
    ),
    "no heads": ({"key": QUERY[..., :0, :], "value": QUERY[..., :0, :]}, r"key.shape\[-2\] = 0"),
    "value heads": ({"value": QUERY[..., :2, :]}, r"value.shape\[-2\] = 2; wanted 4"),
    "empty head dim": ({"query": QUERY[..., :0], "key": QUERY[..., :0]}, r"query.shape\[-1\] = 0"),
    "empty value dim": ({"value": QUERY[..., :0]}, r"value.shape\[-1\] = 0"),
    "key dtype": ({"key": QUERY.double()}, r"key.dtype = torch.float64; wanted torch.float32"),
    "integers": (
        {name: QUERY.int() for name in ("query", "key", "value")},
        r"query.dtype = torch.int32; wanted",
    ),
    "complex": (
        {name: QUERY.cfloat() for name in ("query", "key", "value")},
        r"query.dtype = torch.complex64",
    ),
    "device": ({"value": QUERY.to("meta")}, r"value.device = meta; wanted cpu"),
    "not a tensor": ({"key": [1, 2]}, r"key = list; wanted a torch.Tensor"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors(case):
    changes, match = WRONG_TENSORS[case]
    arguments = {"query": QUERY, "key": QUERY, "value": QUERY, **changes}
    with pytest.raises(ValueError, match=match):
        natten.na2d(**arguments, kernel_size=3)
    # The oldest callers catch this one.
    with pytest.raises(RuntimeError, match=match):
        natten.na2d(**arguments, kernel_size=3)


WRONG_ARGUMENTS = {
    "kernel 0": ({"kernel_size": 0}, r"kernel_size\[0\] = 0; wanted at least 1"),
    "kernel -2": ({"kernel_size": (3, -2)}, r"kernel_size\[1\] = -2"),
    "kernel float": ({"kernel_size": 3.0}, r"kernel_size\[0\] = 3.0; wanted an integer"),
    "kernel bool": ({"kernel_size": True}, r"kernel_size\[0\] = True; wanted an integer"),
    "kernel bools": ({"kernel_size": (3, True)}, r"kernel_size\[1\] = True; wanted an integer"),
    "kernel None": ({"kernel_size": None}, r"kernel_size\[0\] = None"),
    "kernel string": ({"kernel_size": "33"}, r"kernel_size\[0\] = '33'"),
    "kernel count": (
        {"kernel_size": (3, 3, 3)},
        r"kernel_size = \(3, 3, 3\); wanted one value, or 2",
    ),
    "too large": (
        {"kernel_size": (3, 9)},
        r"kernel_size\[1\] \* dilation\[1\] = 9 \* 1; wanted at most 8",
    ),
    "dilated": (
        {"kernel_size": 3, "dilation": (3, 1)},
        r"kernel_size\[0\] \* dilation\[0\] = 3 \* 3; wanted at most 6",
    ),
    "stride": ({"kernel_size": 3, "stride": 4}, r"stride\[0\] = 4; wanted 1 to 3"),
    "stride 0": ({"kernel_size": 3, "stride": 0}, r"stride\[0\] = 0"),
    "dilation 0": ({"kernel_size": 3, "dilation": 0}, r"dilation\[0\] = 0; wanted at least 1"),
    "causal int": ({"kernel_size": 3, "is_causal": 1}, r"is_causal\[0\] = 1; wanted True or False"),
    "boundary": (
        {"kernel_size": 3, "boundary": "wrap"},
        r"boundary\[0\] = 'wrap'; wanted one of 'shift'",
    ),
    "boundary int": ({"kernel_size": 3, "boundary": 1}, r"boundary\[0\] = 1"),
    "offset": ({"kernel_size": 4, "stride": 2, "offset": 2}, r"offset\[0\] = 2; wanted 0 to 1"),
    "offset -1": ({"kernel_size": 4, "stride": 2, "offset": -1}, r"offset\[0\] = -1"),
    "whole dilated": (
        {"kernel_size": -1, "dilation": 2},
        r"dilation\[0\] = 2; wanted 1 with kernel_size\[0\] = -1",
    ),
    "valid stride": (
        {"kernel_size": 3, "stride": 2, "boundary": "valid"},
        r"boundary\[0\] = 'valid'",
    ),
    "valid causal": (
        {"kernel_size": 3, "is_causal": True, "boundary": "valid"},
        r"boundary\[0\] = 'valid'",
    ),
    "valid nothing": (
        {"kernel_size": 7, "boundary": ("valid", "mask")},
        r"kernel_size\[0\], dilation\[0\] = 7, 1",
    ),
    "origin alone": ({"kernel_size": 3, "query_origin": 0}, r"grid = None"),
    "origin": (
        {"kernel_size": 3, "grid": (6, 8), "query_origin": (0, 1)},
        r"query_origin\[1\] = 1; wanted 0 to 0",
    ),
    "grid small": (
        {"kernel_size": 3, "grid": (5, 8)},
        r"grid\[0\] = 5; wanted at least 6, the query's tokens on axis 0",
    ),
    "grid negative": ({"kernel_size": 3, "grid": -1}, r"grid\[0\] = -1; wanted at least 6"),
    "rpb shape": (
        {"kernel_size": 3, "rpb": torch.zeros(4, 5, 6)},
        r"rpb.shape = \(4, 5, 6\); wanted \(4, 5, 5\)",
    ),
    "rpb integers": ({"kernel_size": 3, "rpb": torch.zeros(4, 5, 5).int()}, r"rpb.dtype"),
    "rpb device": ({"kernel_size": 3, "rpb": torch.zeros(4, 5, 5, device="meta")}, r"rpb.device"),
    "keys alone": ({"kernel_size": 3, "additional_keys": QUERY[:, 0]}, r"additional_values = None"),
    "values alone": (
        {"kernel_size": 3, "additional_values": QUERY[:, 0]},
        r"additional_keys = None",
    ),
    "scale": ({"kernel_size": 3, "scale": "1"}, r"scale = '1'; wanted a number"),
    "backend": (
        {"kernel_size": 3, "backend": "cuda"},
        r"backend = 'cuda'; wanted one of 'auto', 'fna'",
    ),
    "huge": (
        {"kernel_size": 2**20, "dilation": 2**10, "boundary": "mask"},
        r"kernel_size\[0\] \* dilation\[0\] = 1073741824; wanted at most 536870912",
    ),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_wrong_arguments(case):
    changes, match = WRONG_ARGUMENTS[case]
    natten.na2d(QUERY, QUERY, QUERY, kernel_size=(3, 1))  # what is cached must not matter
    with pytest.raises(ValueError, match=match):
        natten.na2d(QUERY, QUERY, QUERY, **changes)


@pytest.mark.parametrize(
    ("keys", "values", "match"),
    [
        (QUERY[:1, 0], QUERY[:1, 0], r"additional_keys.shape\[0\]"),
        (QUERY[:, 0, :, :2], QUERY[:, 0], r"additional_keys.shape\[-2\] = 2; wanted 4"),
        (QUERY[:, 0], QUERY[:, 0, :5], r"additional_values.shape\[1\] = 5; wanted 8"),
        (QUERY[:, 0, :, :, :4], QUERY[:, 0], r"additional_keys.shape\[-1\] = 4; wanted 16"),
        (QUERY[:, 0].double(), QUERY[:, 0], r"additional_keys.dtype"),
        (QUERY, QUERY, r"additional_keys.ndim = 5; wanted 4"),
    ],
    ids=range(6),
)
def test_wrong_additional_tokens(keys, values, match):
    with pytest.raises(ValueError, match=match):
        natten.na2d(QUERY, QUERY, QUERY, 3, additional_keys=keys, additional_values=values)


def test_keys_that_do_not_suffice():
    with pytest.raises(
        ValueError,
        match=r"key_origin\[0\] = 2 with 4 tokens; wanted a key box that holds tokens 1 to 4",
    ):
        natten.na2d(
            QUERY[:, :2],
            QUERY[:, :4],
            QUERY[:, :4],
            3,
            grid=(9, 8),
            query_origin=(2, 0),
            key_origin=(2, 0),
        )


@pytest.mark.parametrize("kind", ["nested", "sparse"])
def test_nested_and_sparse(kind):
    x = torch.randn(4, 8, 2, 4)
    if kind == "nested":
        wrong = torch.nested.nested_tensor([x[0], x[1, :5]], layout=torch.jagged)
    else:
        wrong = x.to_sparse()
    with pytest.raises(NotImplementedError, match=r"key is a nested or sparse tensor"):
        natten.na1d(x, wrong, x, 3)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_functions_want_their_rank(rank):
    function = (natten.na1d, natten.na2d, natten.na3d)[rank - 1]
    for other in (1, 2, 3):
        x = torch.randn(1, *(4,) * other, 1, 8)
        if other == rank:
            assert function(x, x, x, 3).shape == x.shape
        else:
            with pytest.raises(ValueError, match=r"query.ndim"):
                function(x, x, x, 3)
    with pytest.raises(ValueError, match=r"query.ndim = 7"):
        natten.neighborhood_attention_generic(*tensors(1, 2, 2, 2, 2, 1, 4), 1)


def test_good_spellings():
    """Lists, numpy's integers, None, per axis or for all."""
    numpy = pytest.importorskip("numpy")
    expected = natten.na2d(QUERY, QUERY, QUERY, (3, 3), (2, 2), (1, 1), (False, False))
    for settings in (
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": [3, 3], "stride": [2, 2]},
        {"kernel_size": numpy.int64(3), "stride": numpy.array([2, 2])},
        {"kernel_size": torch.Size((3, 3)), "stride": 2, "dilation": None, "is_causal": None},
        {"kernel_size": 3, "stride": 2, "boundary": ["shift", "shift"], "offset": [0, 0]},
        {"kernel_size": 3, "stride": 2, "grid": (6, 8), "query_origin": 0, "key_origin": [0, 0]},
    ):
        assert torch.equal(natten.na2d(QUERY, QUERY, QUERY, **settings), expected)
    assert torch.equal(
        natten.na2d(QUERY, QUERY, QUERY, 3, None), natten.na2d(QUERY, QUERY, QUERY, 3)
    )


@pytest.mark.parametrize("make", ["numpy", "torch"])
def test_numbers_of_other_libraries(make):
    """As scalars, as arrays of one for each axis, and as scalars in a list; read anew in each call."""
    library = pytest.importorskip(make)
    array = library.array if make == "numpy" else library.tensor
    expected = natten.na2d(QUERY, QUERY, QUERY, (3, 5), 2, is_causal=(True, False))
    flags = array([True, False])
    for sizes, stride, is_causal in (
        (array([3, 5]), array(2), flags),
        ([array(3), array(5)], array([2, 2]), [flags[0], flags[1]]),
        ((3, array([5])[0]), [array(2), 2], (True, flags[1])),
    ):
        for _ in range(2):
            output = natten.na2d(QUERY, QUERY, QUERY, sizes, stride, is_causal=is_causal)
            assert torch.equal(output, expected)
    sizes, flags = array([3, 5]), array([True, True])
    natten.na2d(QUERY, QUERY, QUERY, sizes, is_causal=flags)
    sizes[1], flags[0] = 3, False
    assert torch.equal(
        natten.na2d(QUERY, QUERY, QUERY, sizes, is_causal=flags),
        natten.na2d(QUERY, QUERY, QUERY, 3, is_causal=(False, True)),
    )
    assert torch.equal(
        natten.attention(X, X, X, is_causal=array(True)), natten.attention(X, X, X, is_causal=True)
    )
    module = natten.NeighborhoodAttention2D(
        array(16), array(2), array([3, 5]), is_causal=array([True, False])
    )
    assert (module.kernel_size, module.is_causal) == ((3, 5), (True, False))


def test_symbolic_flags():
    """Whether it is causal may depend on a size that torch.compile traces."""
    torch._dynamo.reset()

    def function(x):
        return natten.na1d(x, x, x, 3, is_causal=x.shape[1] > 10)

    compiled = torch.compile(function, dynamic=True, fullgraph=True, backend="eager")
    for length in (8, 9, 12, 13):
        x = torch.randn(1, length, 1, 4)
        assert torch.equal(compiled(x), function(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["fna", "naive", "reference"])
@pytest.mark.parametrize("window", [{}, {"is_causal": True}, {"boundary": "valid"}])
def test_whole_axis_without_tokens(backend, window):
    empty = torch.randn(2, 0, 3, 2, 8, requires_grad=True)
    output, lse = natten.na2d(
        empty, empty, empty, (-1, 3), backend=backend, return_lse=True, **window
    )
    length = 1 if window.get("boundary") == "valid" else 3
    assert (output.shape, lse.shape) == ((2, 0, length, 2, 8), (2, 0, length, 2))
    output.sum().backward()
    assert empty.grad.shape == empty.shape
    # With additional keys there is still no query.
    more = torch.randn(2, 4, 2, 8)
    natten.na2d(empty, empty, empty, -1, additional_keys=more, additional_values=more)


HINTS = {
    # A window that fits the grid if the tensors are heads first.
    "heads first": (lambda x: natten.na2d(x, x, x, 7), r"heads first.*movedim\(1, -2\)"),
    "grouped": (
        lambda x: natten.na2d(x, x[:, :2], x[:, :2], 7),
        r"key.shape\[1:-2\].*heads first.*movedim\(1, -2\)",
    ),
    "bias": (
        lambda x: natten.na2d(x, x, x, 3, rpb=torch.zeros(4, 5, 5)),
        r"rpb.shape.*heads first.*movedim\(1, -2\)",
    ),
    "heads last": (
        lambda x: functional.na2d_qk(x.movedim(1, -2), x.movedim(1, -2), 7),
        r"heads last.*movedim\(-2, 1\)",
    ),
    "weights": (
        lambda x: functional.na2d_av(x.new_zeros(1, 16, 16, 4, 49), x.movedim(1, -2), 7),
        r"heads last.*movedim\(-2, 1\)",
    ),
}


@pytest.mark.parametrize("case", HINTS)
def test_hints_about_the_layout(case):
    call, match = HINTS[case]
    with pytest.raises(ValueError, match=match):
        call(torch.randn(1, 4, 16, 16, 8))


def test_no_hint_where_the_layout_is_no_remedy():
    x = torch.randn(1, 4, 16, 16, 8)
    for call in (
        lambda: natten.na2d(x, x, x, 17),
        lambda: natten.na2d(x, x[:, :, :3], x[:, :, :3], 3),
        lambda: natten.na2d(x, x, x, 3, rpb=torch.zeros(5, 5, 5)),
        lambda: functional.na2d_qk(x, x, 17),
    ):
        with pytest.raises(ValueError, match="wanted") as raised:
            call()
        assert "movedim" not in str(raised.value)


def test_streaming_from_the_first_step():
    """What the error of the first step asks for is what makes all steps right."""
    query, key, value = tensors(1, 9, 2, 8)
    with pytest.raises(ValueError, match="against a cache, boundary 'mask' in all steps"):
        natten.na1d(query[:, :1], key[:, :1], value[:, :1], 4, is_causal=True)
    with pytest.raises(ValueError, match="wanted at most 3") as raised:
        natten.na1d(query[:, :3], key[:, :3], value[:, :3], 4)
    assert "cache" not in str(raised.value)
    whole = natten.na1d(query, key, value, 4, is_causal=True)
    for i in range(9):
        first = max(0, i - 3)
        output = natten.na1d(
            query[:, i : i + 1],
            key[:, first : i + 1],
            value[:, first : i + 1],
            4,
            is_causal=True,
            boundary="mask",
            grid=i + 1,
            query_origin=i,
            key_origin=first,
        )
        assert torch.allclose(output, whole[:, i : i + 1], atol=1e-6)


def test_a_box_says_where_it_begins():
    """Left out, an origin can only be that of the whole grid."""
    query, key, value = tensors(1, 11, 2, 8)
    whole = natten.na1d(query, key, value, 3)
    alone = query[:, 10:], key, value
    with pytest.raises(ValueError, match=r"query_origin = None; wanted the first of the 1 tokens"):
        natten.na1d(*alone, 3, grid=11)
    output = natten.na1d(*alone, 3, grid=11, query_origin=10)
    assert torch.allclose(output, whole[:, 10:], atol=1e-6)
    halo = query[:, 4:6], key[:, 3:7], value[:, 3:7]
    with pytest.raises(ValueError, match=r"key_origin = None; wanted the first of the 4 tokens"):
        natten.na1d(*halo, 3, grid=11, query_origin=4)
    output = natten.na1d(*halo, 3, grid=11, query_origin=4, key_origin=3)
    assert torch.allclose(output, whole[:, 4:6], atol=1e-6)
    assert torch.equal(natten.na1d(query, key, value, 3, grid=11), whole)


def test_whole_axis():
    expected = natten.na2d(QUERY, QUERY, QUERY, (6, 3))
    assert torch.equal(natten.na2d(QUERY, QUERY, QUERY, (-1, 3)), expected)
    assert torch.equal(
        natten.na2d(QUERY, QUERY, QUERY, (-1, 3), boundary=("valid", "shift")), expected
    )


def test_scale_of_zero_is_zero():
    query, key, value = tensors(1, 9, 1, 4)
    output = natten.na1d(query, key, value, 9, scale=0.0)
    assert torch.allclose(output, value.mean(1, keepdim=True).expand_as(output), atol=1e-6)


def test_numbers_in_tensors_are_read_at_every_call():
    query, key, value = tensors(1, 9, 1, 4)
    scale, size = torch.tensor(0.5), torch.tensor(3)
    assert torch.equal(
        natten.na1d(query, key, value, size, scale=scale), natten.na1d(query, key, value, 3)
    )
    scale.fill_(2.0)
    size.fill_(5)
    expected = natten.na1d(query, key, value, 5, scale=2.0)
    assert torch.equal(natten.na1d(query, key, value, size, scale=scale), expected)
    assert torch.equal(natten.na1d(query, key, value, [size], scale=scale), expected)


def test_default_scale():
    query, key, value = tensors(1, 9, 1, 4)
    assert torch.equal(
        natten.na1d(query, key, value, 3), natten.na1d(query, key, value, 3, scale=0.5)
    )


def test_tuning_arguments_are_accepted():
    query, key, value = tensors(1, 6, 6, 2, 8)
    output = natten.na2d(
        query,
        key,
        value,
        3,
        1,
        1,
        False,
        None,
        None,
        None,
        {"backend": "cutlass-fmha"},
        "cutlass-fna",
        q_tile_shape=(8, 8),
        kv_tile_shape=(8, 8),
        backward_q_tile_shape=(8, 8),
        backward_kv_tile_shape=(8, 8),
        backward_kv_splits=(1, 1),
        backward_use_pt_reduction=True,
        run_persistent_kernel=False,
        kernel_schedule="pp",
        torch_compile=True,
        return_lse=False,
    )
    assert torch.equal(output, natten.na2d(query, key, value, 3))
