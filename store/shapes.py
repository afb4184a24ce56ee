"""Annotations of arrays with dtypes and shapes: jaxtyping's for type checkers and wherever it is imported, as by the tests' checks.

Importing jaxtyping takes a quarter of the time that opening an index takes. A program without it gets the plain type of the array.
"""

import sys
from typing import TYPE_CHECKING, Any

__all__ = ["Bool", "Float", "Float16", "Float32", "Float64", "Int", "Int8", "Int32", "Int64", "UInt8", "UInt32", "UInt64"]

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Float16, Float32, Float64, Int, Int8, Int32, Int64, UInt8, UInt32, UInt64
else:

    class _Unchecked:
        """An annotation that says no more than the type of the array."""

        def __class_getitem__(cls, array_and_shape: tuple[Any, str]) -> Any:
            return array_and_shape[0]

    Bool = Float = Float16 = Float32 = Float64 = Int = Int8 = Int32 = Int64 = UInt8 = UInt32 = UInt64 = _Unchecked
