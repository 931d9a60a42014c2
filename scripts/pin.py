"""Print exact pins of what the extras of pyproject.toml need, from the packages of the environment that runs this.

    .venv/bin/python scripts/pin.py > constraints/python3.11.txt

Only the closure of the extras is printed, so that whatever else an environment holds does not become a pin.
"""

import importlib.metadata
import pathlib
import sys
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT = pathlib.Path(__file__).parents[1] / "pyproject.toml"
EXTRAS = ("train", "notebooks", "test", "docs")


def closure(requirements: list[Requirement]) -> set[str]:
    """The canonical names of all installed distributions that the requirements lead to."""
    seen, queue = set(), [(r, extra) for r in requirements for extra in ("", *r.extras)]
    names = set()
    while queue:
        requirement, extra = queue.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in seen or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        seen.add((name, extra))
        try:
            wanted = importlib.metadata.distribution(name).requires or []
        except importlib.metadata.PackageNotFoundError:
            continue
        names.add(name)
        for text in wanted:
            child = Requirement(text)
            if child.marker is None or child.marker.evaluate({"extra": extra}):
                child.marker = None
                queue += [(child, e) for e in ("", *child.extras)]
    return names


def main() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    texts = project["dependencies"] + [t for extra in EXTRAS for t in project["optional-dependencies"][extra]]
    own = canonicalize_name(project["name"])
    names = closure([r for r in map(Requirement, texts) if canonicalize_name(r.name) != own])
    print(
        f"# Python {sys.version_info.major}.{sys.version_info.minor}; made by scripts/pin.py from a tested environment."
    )
    for name in sorted(names):
        print(f"{name}=={importlib.metadata.version(name)}")


if __name__ == "__main__":
    main()
