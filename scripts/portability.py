"""Run the tests of kernels, optimizers and quickstart on the oldest and the newest supported jax, each with a Python of its own.

    make portability                 both
    make portability ARGS=3.13       one of them

For each line of JOBS: find that Python, make .venv-VERSION, install the pins, run the tests. A Python that this machine lacks is
named in one line and does not fail the whole; a failing test or installation does.
"""

import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]


class Job(NamedTuple):
    python: str  # the version of Python
    constraints: str  # the pins, which name the version of jax
    reason: str


JOBS = (
    Job("3.13", "constraints/colab.txt", "what Colab ships"),
    Job("3.12", "constraints/python3.12.txt", "the newest jax"),
)
ROOMS = "attention recurrence mixing position ssm objectives decoding models optim parallel explicit pallas drop_in"
TESTS = ("tests/laws", *(f"tests/test_{room}*.py" for room in ROOMS.split()), "notebooks/quickstart.ipynb")


def run(*command: str, **options) -> bool:
    print("+", " ".join(command), flush=True)
    return subprocess.run(command, cwd=ROOT, **options).returncode == 0


def find_python(version: str) -> str | None:
    """The path of that Python, or None after a line that says so."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    found = subprocess.run(
        [ROOT / "scripts" / "find_python.sh", version], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    return found.stdout.strip() or None


def result(job: Job) -> str:
    """Run one job; "passed", "failed: ..." or "not run: ..."."""
    folder = ROOT / f".venv-{job.python}"
    python, stamp = str(folder / "bin" / "python"), folder / ".installed"
    inputs = (ROOT / "pyproject.toml", ROOT / job.constraints)
    if not stamp.exists() or any(path.stat().st_mtime > stamp.stat().st_mtime for path in inputs):
        interpreter = find_python(job.python)
        if interpreter is None:
            return f"not run: no Python {job.python} here"
        if not run(interpreter, "-m", "venv", str(folder)):
            return "failed: no environment"
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        if not run(*pip, "--editable", ".[test]", "--constraint", job.constraints):
            return "failed: the installation"
        stamp.touch()
    tests = [str(path.relative_to(ROOT)) for pattern in TESTS for path in sorted(ROOT.glob(pattern))]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / f"jax-{job.python}")}
    workers = os.environ.get("JOBS") or "2"
    passed = run(python, "-m", "pytest", "-n", workers, "--nbmake", *tests, env=environment)
    return "passed" if passed else "failed: the tests"


def main() -> int:
    wanted = sys.argv[1:] or [job.python for job in JOBS]
    unknown = set(wanted) - {job.python for job in JOBS}
    if unknown:
        print(
            f"unknown job {', '.join(sorted(unknown))}; there are {', '.join(job.python for job in JOBS)}",
            file=sys.stderr,
        )
        return 2
    rows = [(job, result(job)) for job in JOBS if job.python in wanted]
    print(f"\n{'Python':8}{'jax':12}{'flax':10}{'why':20}result")
    for job, outcome in rows:
        pins = dict(line.split("==") for line in (ROOT / job.constraints).read_text().splitlines() if "==" in line)
        print(f"{job.python:8}{pins['jax']:12}{pins['flax']:10}{job.reason:20}{outcome}")
    return int(any(outcome.startswith("failed") for _, outcome in rows))


if __name__ == "__main__":
    sys.exit(main())
