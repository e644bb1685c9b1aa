"""The machine the tests see: CPU only, one thread per process, compiled operators out of the home folder.

Set on import, before any test imports torch; the ranks of tests/ranks.py inherit it.
"""

import os
import tempfile
from pathlib import Path

import pytest

_OPERATORS = tempfile.TemporaryDirectory(prefix="torch-extensions-")  # removed when pytest ends

os.environ.update(
    DS_ACCELERATOR="cpu",
    CUDA_VISIBLE_DEVICES="",
    OMP_NUM_THREADS="1",
    TORCH_EXTENSIONS_DIR=_OPERATORS.name,
    # The server that forks the ranks finds `trainer` by this alone (Python 3.11 gives it no sys.path).
    PYTHONPATH=os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
)


# Files whose tests start whole programs: with several processes the longest work begins first.
_LONGEST = (
    "test_end_to_end",
    "test_recipes",
    "test_bad_input",
    "test_readme",
    "test_campaign",
    "test_benchmark",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the order within files stays."""
    items.sort(
        key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST)
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``images`` (seven classes) and ``packed`` (their shards), for whole runs."""
    import launching  # not before the environment above is set

    return launching.make_data(tmp_path_factory.mktemp("runs"))
