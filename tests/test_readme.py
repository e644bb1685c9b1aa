"""The README: its map is complete, its commands run, its links lead somewhere."""

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest
from launching import REPOSITORY, Started

README = (REPOSITORY / "README.md").read_text()
PYTHON_FILES = [*sorted(REPOSITORY.glob("launch/*.py")), *sorted(REPOSITORY.glob("trainer/**/*.py"))]


def summary(path: Path) -> str:
    """The first line of a module's docstring, or of a YAML file's header."""
    if path.suffix == ".yaml":
        return path.read_text().splitlines()[0].removeprefix("# ")
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]


def test_map_has_every_file_with_its_own_first_line() -> None:
    files = [*sorted(REPOSITORY.glob("configs/*.yaml")), *PYTHON_FILES]
    expected = [f"| `{path.relative_to(REPOSITORY)}` | {summary(path)} |" for path in files]
    found = [
        line for line in README.splitlines() if re.match(r"\| `(configs|launch|trainer)/\S+` \| \S", line)
    ]
    found = [line for line in found if line.count("|") == 3]
    assert found == expected, "\n".join(["the map should be:", *expected])


def commands() -> list[str]:
    """The lines of indented blocks that start a program."""
    lines = [line.strip().split("  #")[0] for line in README.splitlines() if line.startswith("    ")]
    return [line for line in lines if line.split(" ")[0] in ("make", "python", "deepspeed", "torchrun")]


def test_the_two_commands_come_first() -> None:
    assert commands()[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("command", commands())
def test_command_exists_with_its_options(command: str, tmp_path: Path) -> None:
    """make: the target exists. Entry points: everything up to the work itself, with what is missing named.

    What the commands do when data is there, tests/test_end_to_end.py and tests/test_pack.py show.
    """
    program, *arguments = shlex.split(command)
    if program == "make":
        finished = Started("make", "--dry-run", *arguments).wait()
        assert finished.code == 0, finished.stderr
        return
    script, *rest = arguments
    if script in ("launch/benchmark.py", "launch/plan.py"):  # they need no data: they run as they stand
        finished = Started(sys.executable, *arguments).wait()
        assert finished.code == 0, finished.stderr
        assert finished.stdout
        return
    empty = str(tmp_path / "nothing")
    rest = [empty if part.isupper() or part.startswith("runs/") or "PATH" in part else part for part in rest]
    rest = [f"data.train={empty}" if part.startswith("data.train=") else part for part in rest]
    if script.endswith("train.py"):
        rest.append(f"run.root={tmp_path}")
    finished = Started(sys.executable, script, *rest).wait()
    assert finished.code == 2, finished.stderr
    assert len(finished.errors) == 1, finished.stderr
    assert empty in finished.errors[0]  # so it came as far as looking for the data


def test_links_and_pictures_exist() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        if not link.startswith("https://"):
            assert (REPOSITORY / link).is_file(), link
