"""Before the first array: the memory allocator, the processes of a run, the folder of compiled programs."""

import ctypes
import os
from pathlib import Path

import jax

from effattn_jax.training.config import MeshConfig
from effattn_jax.training.errors import UserError, one_line


def keep_freed_memory() -> None:
    """Let the C library keep what a CPU program's temporaries free, instead of giving it back to the system.

    XLA allocates a program's temporaries anew at each call. glibc answers such sizes with fresh pages, whose faults
    are then about half of a small model's step. Where there is no glibc, or jax has already started its threads,
    this changes nothing.
    """
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # the numbers of mallopt(3)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(arena_max, 1)
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


def split_cpu(devices: int | None) -> None:
    """Make so many devices of the CPU; None leaves what there is.

    Raises:
      UserError: jax has already started.
    """
    if devices is None:
        return
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError as error:
        raise UserError(f"mesh.cpu-devices must be set before jax starts: {one_line(error)}") from error


def join_processes(config: MeshConfig) -> None:
    """Join the other processes of the run, where there are any.

    With a coordinator the three flags say who is who. On a TPU pod they are found by jax itself. Otherwise this
    process trains alone.

    Raises:
      UserError: an incomplete set of flags, or a coordinator that does not answer.
    """
    given = (config.coordinator, config.num_processes, config.process_id)
    if all(value is None for value in given):
        if _on_a_pod():
            jax.distributed.initialize()
        return
    if any(value is None for value in given):
        raise UserError("mesh.coordinator, mesh.num-processes and mesh.process-id must be given together.")
    if not 0 <= config.process_id < config.num_processes:
        raise UserError(f"mesh.process-id must lie in 0 ... {config.num_processes - 1}, got {config.process_id}.")
    if hasattr(jax.config, "jax_cpu_collectives_implementation"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the coordinator {config.coordinator} cannot be reached: {one_line(error)}") from error


def _on_a_pod() -> bool:
    """TPU pod runtimes name all hosts of the slice to each of them."""
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ


def use_compile_cache(folder: str | None) -> None:
    """Keep compiled programs in a folder, so that the next start of the same run compiles nothing.

    Args:
      folder: a path, None for no cache, or "auto": what JAX_COMPILATION_CACHE_DIR names, else a folder in the
        user's cache folder. A folder that cannot be written is no error; programs are then compiled each time.
    """
    if folder is None:
        return
    if folder == "auto":
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(home, "effattn_jax", "programs")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
