"""Finished runs side by side: the same test sets, one table, one picture."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainer import canvas, rays
from trainer.captions import titles_of
from trainer.config import Config
from trainer.distributed import World, joined_world
from trainer.evaluate import EvalSets, SetResult, figures_of
from trainer.models import load_model, open_model
from trainer.options import load
from trainer.trained import open_trained


def compare(folders: Sequence[Path], overrides: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """Evaluate the newest checkpoint of every run; return folder -> metrics. Every rank must call it.

    Rank 0 draws the first run's pictures, and the features of all runs side by side, into the first run's
    ``figures`` folder. Raises UserError for a folder without configuration or checkpoint.
    """
    configs = [load(folder / "config.yaml", overrides) for folder in folders]
    with joined_world(configs[0].engine.timeout_seconds) as world:
        found = {
            str(folder): evaluate_run(folder, config, world)
            for folder, config in zip(folders, configs, strict=True)
        }
        if world.is_main:
            _draw(found, folders[0] / "figures")
    return {
        folder: {name: value for result in results for name, value in result.metrics.items()}
        for folder, results in found.items()
    }


def evaluate_run(folder: Path, config: Config, world: World) -> list[SetResult]:
    """Return the results of a run's newest checkpoint; every rank must call it. No DeepSpeed needed."""
    backbone, head = load_model(folder, config, world)
    names = open_trained(folder).class_names
    test_sets = EvalSets(config, world, names, head.shard.num_classes, lambda path: open_model(path, world))
    return list(test_sets.evaluate(backbone, head))


def table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table for people: one row per run and test set, one column per metric."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for run, values in metrics.items():
        for name, value in values.items():
            _, test_set, metric = name.split("/", 2)
            rows.setdefault((run, test_set), {})[metric] = value
    columns = list(dict.fromkeys(metric for values in rows.values() for metric in values))
    drawn = Table("run", "test set", *columns)
    for (run, test_set), values in rows.items():
        drawn.add_row(run, test_set, *(f"{values[c]:.4f}" if c in values else "" for c in columns))
    text = io.StringIO()
    Console(file=text, width=40 + 18 * len(columns)).print(drawn)
    return text.getvalue()


def table_of_figures(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table for people: a row per figure of a protocol, with its interval, a column per model."""
    drawn = Table("figure", *metrics)
    names = dict.fromkeys(name for values in metrics.values() for name in values)
    for name in (each for each in names if not each.endswith(("_low", "_high"))):
        bounds = f"{name}_low", f"{name}_high"
        cells = []
        for values in metrics.values():
            cell = _number(values[name]) if name in values else ""
            if bounds[0] in values:
                cell += f"  ({' to '.join(_number(values[bound]) for bound in bounds)})"
            cells.append(cell)
        drawn.add_row(name, *cells)
    text = io.StringIO()
    Console(file=text, width=50 + 40 * len(metrics)).print(drawn)
    return text.getvalue()


def _number(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() and value > 1 else f"{value:.4f}"


def _draw(found: Mapping[str, Sequence[SetResult]], folder: Path) -> None:
    """Draw the first run, and the features of every test set side by side over the runs."""
    first = next(iter(found))
    for name, figure in figures_of(found[first], Path(first).name):
        canvas.save(figure, folder / f"{name}.png")
    if len(found) == 1:
        return
    by_set: dict[str, dict[Path, SetResult]] = {}  # the runs need not have the same sets
    for run, results in found.items():
        for result in results:
            by_set.setdefault(result.name, {})[Path(run)] = result
    for name, of_runs in by_set.items():
        if len(of_runs) > 1 and all(r.embeddings_ND.shape[1] in (2, 3) for r in of_runs.values()):
            views = ((r.embeddings_ND, r.labels_N) for r in of_runs.values())
            titled = dict(zip(titles_of(of_runs), views, strict=True))
            figure = rays.feature_scatter_pair(titled, next(iter(of_runs.values())).class_names)
            canvas.save(figure, folder / f"features-{name}-compared.png")
