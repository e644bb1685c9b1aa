"""What a run tells: console, progress bar, metrics.jsonl, log.txt and W&B. Rank 0 speaks for all."""

import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import nan
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import wandb
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from trainer.address import without_credentials
from trainer.canvas import save as save_figure
from trainer.config import Config, to_dict
from trainer.errors import UserError
from trainer.options import dump, load
from trainer.pictures import Frame

log = logging.getLogger("trainer")

CLASSES = "classes.json"


class RunLog:
    """Context manager around training. Every rank may call its methods; rank 0 writes."""

    def __init__(self, config: Config, *, is_main: bool, start_step: int) -> None:
        assert config.optim.steps is not None
        self.config, self.is_main, self.start_step = config, is_main, start_step
        self.folder, self.total_steps = config.run_folder, config.optim.steps
        self._values: dict[str, Any] = {}
        self._wandb: Any = None
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "done.json").unlink(missing_ok=True)
            (self.folder / "config.yaml").write_text(dump(self.config))
            keep_lines_up_to(self.folder / "metrics.jsonl", self.start_step)
            self._lines = (self.folder / "metrics.jsonl").open("a", buffering=1)
            self._wandb = _start_wandb(self.config)
        return self

    def class_names(self, names: Sequence[str]) -> None:
        """Keep which label means what: ``classes.json``, a list in the order of the labels."""
        if self.is_main:
            (self.folder / CLASSES).write_text(json.dumps(list(names)) + "\n")

    def sheet(self, text: str) -> None:
        """Show the run sheet; the progress bar starts below it."""
        log.info("run sheet\n%s", text)
        if self.is_main and self.config.log.progress and sys.stderr.isatty():
            self._start_bar()

    def is_due(self, step: int, every: int | None) -> bool:
        """Return whether something that happens every so many steps (None: at the end) happens now."""
        return step == self.total_steps or (every is not None and step % every == 0)

    def add(self, values: dict[str, Any]) -> None:
        """Add ``area/name`` values to the line of the current step."""
        self._values.update(values)

    def write(self, step: int) -> None:
        """Write the values added since the last call, if any, as the line of ``step``."""
        values, self._values = self._values, {}
        if not self.is_main or not values:
            return
        plain = {name: v.item() if isinstance(v, Tensor) else v for name, v in values.items()}
        self._lines.write(json.dumps({"step": step, **plain}) + "\n")
        if self._wandb is not None:
            _never_stop(lambda: self._wandb.log(plain, step=step))
        if self._bar is not None:
            loss, rate = plain.get("train/loss", nan), plain.get("perf/images_per_second", nan)
            shown = f"loss {loss:.4f}  {rate:.0f} images/s"
            self._bar.update(self._task, completed=step, text=shown)
        else:
            log.info("step %d/%d  %s", step, self.total_steps, _readable(plain))

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """Save ``figures/<name>.png`` and show it in W&B."""
        if not self.is_main:
            return
        path = self.folder / "figures" / f"{name}.png"
        save_figure(figure, path)
        if self._wandb is not None:
            _never_stop(lambda: self._wandb.log({f"figures/{name}": wandb.Image(str(path))}, step=step))

    def table(self, name: str, columns: list[str | int], rows: list[list[Any]], step: int) -> None:
        """Show a table in W&B."""
        if self._wandb is not None:
            content = {f"tables/{name}": wandb.Table(columns=columns, data=rows)}
            _never_stop(lambda: self._wandb.log(content, step=step))

    def page(self, path: Path, step: int) -> None:
        """Show a page that needs no other file in W&B, as ``report``."""
        if self._wandb is not None:
            _never_stop(lambda: self._wandb.log({path.stem: wandb.Html(path.read_text())}, step=step))

    def embeddings(self, name: str, frame: Frame, step: int) -> None:
        """Save the embeddings of a test set at this step."""
        if self.is_main:
            frame.save(self.folder / "embeddings" / f"{name}-{step:08d}.safetensors")

    def finish(self, step: int, results: dict[str, float]) -> None:
        """Leave the completion marker: a launcher's exit code does not prove that a run is whole."""
        if self.is_main:
            (self.folder / "done.json").write_text(json.dumps({"step": step, **results}, indent=1) + "\n")
            log.info("finished at step %d  %s", step, _readable(results))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.is_main:
            return
        if self._bar is not None:
            self._bar.stop()
        self._lines.close()
        if self._wandb is not None:
            _never_stop(lambda: self._wandb.finish(exit_code=0 if kind is None else 1))

    def _start_bar(self) -> None:
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True),
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("", total=self.total_steps, completed=self.start_step, text="")
        self._bar.start()


class Throughput:
    """Measures the steps between two readings; a step has ``global_batch`` images."""

    def __init__(self, global_batch: int) -> None:
        self._global_batch = global_batch
        self._restart()

    def _restart(self) -> None:
        self._start, self._steps, self._waited = time.perf_counter(), 0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count a step, and how long this rank waits for its data."""
        asked = time.perf_counter()
        yield
        self._waited += time.perf_counter() - asked
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return the ``perf/`` metrics since the last reading."""
        seconds = time.perf_counter() - self._start
        values = {
            "perf/images_per_second": self._steps * self._global_batch / seconds,
            "perf/step_seconds": seconds / max(1, self._steps),
            "perf/data_wait_fraction": self._waited / seconds,
        }
        self._restart()
        return values


def configure_logging(folder: Path | None, rank: int) -> None:
    """Send INFO of rank 0 to stderr and folder/log.txt, warnings of others with their rank. Call once.

    Warnings and the last words of rank 3 are kept in folder/log-rank-00003.txt; no warning, no file.
    """
    shape = logging.Formatter(
        "%(asctime)s %(message)s" if rank == 0 else f"[rank {rank}] %(message)s", "%H:%M:%S"
    )
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.root, run.name: {folder} cannot be made: {error.strerror}") from None
        name = "log.txt" if rank == 0 else f"log-rank-{rank:05d}.txt"
        handlers.append(logging.FileHandler(folder / name, delay=rank > 0))
    for handler in handlers:
        handler.setFormatter(shape)
    log.handlers[:] = handlers
    log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def keep_lines_up_to(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will make again, and a last line cut short by a kill."""
    if not path.exists():
        return
    kept = [json.dumps(values) + "\n" for values in read_metrics(path) if values["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, none if there is no such file, up to one cut short."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def show_in_wandb(folder: Path, pictures: Sequence[Path]) -> None:
    """Show PNGs and GIFs in the W&B run of a run folder, by their names and at its last step.

    Raises UserError if it has none.
    """
    run = _start_wandb(load(folder / "config.yaml"))
    if run is None:
        raise UserError(f"{folder}: log.wandb is disabled, or W&B cannot be had")
    lines = read_metrics(folder / "metrics.jsonl")
    media = {
        f"figures/{path.stem}": wandb.Video(str(path), format="gif")
        if path.suffix == ".gif"
        else wandb.Image(str(path))
        for path in pictures
    }
    run.log(media, step=lines[-1]["step"] if lines else 0)
    run.finish()


def _start_wandb(config: Config) -> Any:
    """Start or continue the W&B run; None, with a warning, if W&B cannot be had."""
    if config.log.wandb == "disabled":
        return None
    identity = config.run_folder / "wandb" / "id"
    identity.parent.mkdir(parents=True, exist_ok=True)
    if not identity.exists():
        identity.write_text(secrets.token_hex(4))
    sys.argv[1:] = map(without_credentials, sys.argv[1:])  # W&B keeps the command line
    try:
        # Silent also means: never ask for a key, which on a terminal would wait for ever, all ranks with it.
        wandb.setup(settings=wandb.Settings(silent=True))
        return wandb.init(
            project=config.log.wandb_project,
            name=config.run_folder.name,
            id=identity.read_text(),
            resume="allow",
            mode=config.log.wandb,
            dir=config.run_folder,
            config=to_dict(config),
            settings=wandb.Settings(
                silent=True, init_timeout=15, finish_timeout=60, disable_git=True, save_code=False
            ),
        )
    except Exception as error:  # the client raises many types; none may cost a training run
        log.warning("W&B is not available, going on without it: %s", " ".join(str(error).split()))
        return None


def _never_stop(call: Any) -> None:
    try:
        call()
    except Exception as error:  # see _start_wandb
        log.warning("W&B: %s", " ".join(str(error).split()))


def _readable(values: dict[str, Any]) -> str:
    """Return the values for a line of the console, areas left out."""
    parts = (f"{n.partition('/')[2]} {v:.4g}" for n, v in values.items() if isinstance(v, int | float))
    return "  ".join(parts)
