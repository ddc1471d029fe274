"""Hashes: equal for equal content however it is stored, and different for every kind of difference."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from cushion.hashing import digest, tensor_digest


def test_digest_is_the_start_of_the_sha256_of_canonical_json() -> None:
    text = '{"a":[1,2.5,null],"b":"ü"}'
    assert json.loads(text) == {"b": "ü", "a": [1, 2.5, None]}
    assert digest({"b": "ü", "a": [1, 2.5, None]}, length=64) == hashlib.sha256(text.encode()).hexdigest()
    assert digest("x", length=64).startswith(digest("x"))
    assert len(digest("x")) == 16


def test_digest_ignores_the_order_of_keys_at_every_depth() -> None:
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})


@pytest.mark.parametrize("other", [{"a": [2, 1]}, {"a": [1, 2, 3]}, {"b": [1, 2]}, {"a": ["1", 2]}, {"a": "[1,2]"}, {}])
def test_digest_tells_different_content_apart(other: object) -> None:
    assert digest({"a": [1, 2]}) != digest(other)


def test_digest_refuses_what_is_no_plain_data() -> None:
    with pytest.raises(TypeError):
        digest({"a": {1, 2}})


def test_tensor_digest_is_of_the_content_not_of_the_storage() -> None:
    values = torch.arange(12.0).reshape(3, 4)
    expected = tensor_digest([values])
    assert tensor_digest([values.T.contiguous().T]) == expected
    assert tensor_digest([torch.arange(24.0).reshape(3, 8)[:, :4].fill_(0).add_(values)]) == expected
    assert tensor_digest([torch.nn.Parameter(values)]) == expected
    assert tensor_digest(tensor for tensor in [values]) == expected


@pytest.mark.parametrize(
    "other",
    [
        [torch.arange(12.0).reshape(4, 3)],
        [torch.arange(12.0)],
        [torch.arange(12.0).reshape(3, 4).double()],
        [torch.arange(12.0).reshape(3, 4).view(torch.int32)],  # the same bytes, another dtype
        [torch.arange(12.0).reshape(3, 4), torch.zeros(0)],
        list(torch.arange(12.0).reshape(3, 4)),
        [torch.arange(12.0).reshape(3, 4).nextafter(torch.tensor(100.0))],
        [],
    ],
)
def test_tensor_digest_sees_shape_dtype_number_and_every_bit(other: list[torch.Tensor]) -> None:
    assert tensor_digest([torch.arange(12.0).reshape(3, 4)]) != tensor_digest(other)


def test_tensor_digest_sees_one_flipped_element_and_the_order() -> None:
    first, second = torch.zeros(100), torch.zeros(100)
    second[57] = 1e-30
    assert tensor_digest([first]) != tensor_digest([second])
    assert tensor_digest([first, second]) != tensor_digest([second, first])


def test_tensor_digest_depends_on_its_label() -> None:
    values = [torch.ones(3)]
    assert tensor_digest(values, label=["a", 1]) == tensor_digest(values, label=["a", 1])
    assert len({tensor_digest(values), tensor_digest(values, label="a"), tensor_digest(values, label=["a"])}) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_tensor_digest_takes_every_dtype_and_scalars(dtype: torch.dtype) -> None:
    zero, one = torch.tensor(0, dtype=dtype), torch.tensor(1, dtype=dtype)
    assert tensor_digest([zero]) != tensor_digest([one])
    assert tensor_digest([one]) == tensor_digest([one.clone()])
