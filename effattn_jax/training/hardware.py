"""What the devices can do at most, and what share of it a run uses.

    model FLOP utilisation = 3 x forward FLOPs a token x tokens/s / (devices x peak FLOP/s)

Peaks are the makers' dense bfloat16 figures for one device as jax counts devices.
"""

import re

import jax

PEAK_FLOPS = {
    "TPU v2": 22.5e12,  # half a chip: one core
    "TPU v3": 61.5e12,  # half a chip: one core
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "Tesla T4": 65e12,
    "Tesla V100": 125e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
"""Peak FLOP/s by the first words of jax's device kind; the longest that fits counts."""


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of a device, None where it is not known (a CPU's depends on its clock and its neighbours).

    Example:
      >>> peak_flops(jax.devices("cpu")[0]) is None
      True
      >>> from types import SimpleNamespace
      >>> [peak_flops(SimpleNamespace(device_kind=name)) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA L40S", "NVIDIA L400")]
      [989000000000000.0, 362000000000000.0, None]
    """
    fitting = [name for name in PEAK_FLOPS if re.match(re.escape(name) + r"\b", device.device_kind)]
    return PEAK_FLOPS[max(fitting, key=len)] if fitting else None


def device_summary() -> str:
    """One line: number, kind and processes of the devices.

    Example:
      >>> device_summary().startswith(str(jax.device_count()))
      True
    """
    kind = jax.devices()[0].device_kind
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {kind}{processes}, jax {jax.__version__}"


def utilisation(flops_per_second: float, num_devices: int) -> str:
    """Achieved FLOP/s as text, with the share of the peak where the peak is known.

    Example:
      >>> utilisation(3e10, 1)
      '30.0 GFLOP/s'
    """
    peak = peak_flops(jax.devices()[0])
    text = (
        f"{flops_per_second / 1e9:.1f} GFLOP/s" if flops_per_second < 1e12 else f"{flops_per_second / 1e12:.1f} TFLOP/s"
    )
    return f"{text}, MFU {flops_per_second / (num_devices * peak):.1%}" if peak else text
