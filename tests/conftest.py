"""The machine the tests see: CPU only, one thread per process, compiled operators out of the home folder.

Set on import, before any test imports torch; the ranks of tests/ranks.py inherit it.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
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


@pytest.fixture(autouse=True)
def leave_no_process_group() -> Iterator[None]:
    """End the group of a run that failed in this process: the run leaves it alone, for others may hang."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``images`` (seven classes) and ``packed`` (their shards), for whole runs."""
    import launching  # not before the environment above is set

    return launching.make_data(tmp_path_factory.mktemp("runs"))
