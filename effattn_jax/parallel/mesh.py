"""The one mesh of the house: four named axes, whatever the number of devices."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType

AXES = ("data", "fsdp", "tensor", "sequence")
"""Axis names, slowest first: rows of the batch; rows and parameters; heads and features; time."""


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    *,
    batch_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
    """Make the named mesh over all devices.

    Args:
      data: number of groups that see different rows and hold full copies of the parameters; -1 takes the devices
        that the other axes leave.
      fsdp: number of groups that see different rows and hold a part of every large parameter.
      tensor: number of devices that share the heads and features of one layer.
      sequence: number of devices that share the time axis of one row.
      batch_size: rows of a global batch; with `data=-1` in one process, as many devices are used as share them evenly.
      devices: the devices to use, all of them by default.

    Returns:
      A mesh with axes `AXES`, all of `AxisType.Auto`. In one process it may leave devices over; with several it
      covers all of them.

    Raises:
      ValueError: if an axis is not positive (or -1, for data), the sizes do not fit the devices, or the rows do not divide over
        data x fsdp.

    Example:
      >>> make_mesh().axis_names
      ('data', 'fsdp', 'tensor', 'sequence')
    """
    devices = list(jax.devices() if devices is None else devices)
    if data < 1 and data != -1:
        raise ValueError(f"mesh axis data must be positive or -1, got {data}.")
    for name, size in (("fsdp", fsdp), ("tensor", tensor), ("sequence", sequence)):
        if size < 1:
            raise ValueError(f"mesh axis {name} must be positive, got {size}.")
    rest = fsdp * tensor * sequence
    if data == -1:
        data = max(1, _largest_data_axis(len(devices) // rest, fsdp, batch_size))
    shape = (data, fsdp, tensor, sequence)
    if jax.process_count() == 1:
        devices = devices[: math.prod(shape)]
    if math.prod(shape) != len(devices):
        sizes = " x ".join(f"{name}={size}" for name, size in zip(AXES, shape))
        raise ValueError(f"the mesh {sizes} needs {math.prod(shape)} devices, and there are {len(devices)}.")
    if batch_size is not None and batch_size % (data * fsdp):
        raise ValueError(f"a batch of {batch_size} rows does not divide over data x fsdp = {data} x {fsdp} devices.")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _largest_data_axis(available: int, fsdp: int, batch_size: int | None) -> int:
    if batch_size is None or jax.process_count() > 1:
        return available
    return next((n for n in range(available, 0, -1) if batch_size % (n * fsdp) == 0), available)
