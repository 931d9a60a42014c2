"""What every test and doctest runs under: eight simulated CPU devices, a compilation cache, and no silent broadcasting of ranks."""

import gc
import itertools
import os
import pathlib
from importlib.metadata import version

ROOT = pathlib.Path(__file__).parent

# Read by XLA and jax when they start, and by the processes that tests start: so they stand before the import of jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # nobody reads the lines of source in programs of tests
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads would spin beside the other test process
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("QUICK", "1")  # the short form of the notebooks
FLAGS = ["--xla_force_host_platform_device_count=8"]
if os.environ.get("LAWS") != "all":  # nearly all time goes into compiling small programs: cheap passes take half of it
    FLAGS += ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    FLAGS += ["--xla_cpu_parallel_codegen_split_count=1"]
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones do not know the flag, and stop at it
        FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
GIVEN = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([GIVEN, *(flag for flag in FLAGS if flag.split("=")[0] not in GIVEN)]).strip()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# By default a tenth of the time goes into looking for cycles among the objects that tracing makes.
gc.set_threshold(20_000, 10, 10)


def pytest_configure(config: pytest.Config) -> None:
    """Deprecation warnings that lines of this package cause are errors; those of other packages are not our business."""
    for path in sorted((ROOT / "effattn_jax").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for category in ("DeprecationWarning", "FutureWarning"):
            config.addinivalue_line("filterwarnings", f"error::{category}:{module}")


def pytest_collection_finish() -> None:
    """What imports and collection made stays, so no later collection of garbage need look at it."""
    gc.collect()
    gc.freeze()


def _mappings() -> float:
    """The share of the memory mappings that this process may have (Linux) which it has; 0 where nobody says."""
    try:
        limit = int(pathlib.Path("/proc/sys/vm/max_map_count").read_text())
        return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n") / limit
    except OSError:
        return 0.0


TESTS = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Every compiled program holds memory mappings, and XLA crashes where there are no more: all go before that. Looked at now and then."""
    if next(TESTS) % 20 == 0 and _mappings() > 0.5:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """The test runs in float64."""
    from tests.laws.checks import x64 as double_precision

    with double_precision():
        yield
