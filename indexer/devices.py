"""Names of devices that stand for several processors of a machine."""

from ..store.errors import UsageError

SPREAD = "map"
"""All GPUs of the machine, each with some of a model's layers."""
TENSOR_PARALLEL = "tp"
"""All GPUs of the machine, each with a slice of all layers; "tp:N" is N of them, or N processes where there is no GPU."""
_MOST_PROCESSES = 64


def cooperating(device: str) -> int:
    """Return the N of the device "tp:N", and 1 for others.

    Raises:
        UsageError: it is not a valid number.
    """
    name, colon, number = device.partition(":")
    if name != TENSOR_PARALLEL or not colon:
        return 1
    if not (number.isdecimal() and 1 <= int(number) <= _MOST_PROCESSES):
        raise UsageError(f"{device!r} is not a device; the N of tp:N is a number of processes from 1 to {_MOST_PROCESSES}")
    return int(number)
