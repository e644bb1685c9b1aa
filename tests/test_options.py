import dataclasses
import os
import subprocess
import sys
import time
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import yaml

from trainer.config import Config, field_infos
from trainer.errors import UserError
from trainer.options import dump, fields, help_text, load, load_protocol, markdown, sections

REPOSITORY = Path(__file__).parents[1]
ENOUGH = ("data.train=shards", "optim.steps=1")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def message(*overrides: str, path: Path | None = None) -> str:
    """Return the error of loading; it must be one line."""
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


# Precedence


def test_command_line_beats_file_beats_defaults(tmp_path):
    file = write(tmp_path / "a.yaml", "data: {train: shards}\noptim: {steps: 7, lr: 0.5}\n")
    config = load(file, ["optim.lr=0.25"])
    assert config.optim.lr == 0.25
    assert config.optim.steps == 7
    assert config.optim.momentum == 0.9  # the default in trainer/config.py


def test_the_last_of_two_equal_overrides_counts():
    assert load(None, [*ENOUGH, "seed=1", "seed=2"]).seed == 2


def test_values_of_the_command_line_are_read_as_yaml():
    config = load(
        None,
        [
            *ENOUGH,
            "optim.lr=1e-3",  # YAML 1.1 takes this for text
            "augment.zoom=[0.9, 1.1]",
            "checkpoint.every_steps=null",
            "backbone.pretrained=true",
            "eval.verification.lfw=a/b",
            "engine.deepspeed_overrides={aio: {block_size: 1}}",
            "engine.deepspeed_overrides.fp16.hysteresis=4",
        ],
    )
    assert config.optim.lr == 0.001
    assert config.augment.zoom == (0.9, 1.1)
    assert config.checkpoint.every_steps is None
    assert config.backbone.pretrained is True
    assert config.eval.verification == {"lfw": Path("a/b")}
    assert config.engine.deepspeed_overrides == {"aio": {"block_size": 1}, "fp16": {"hysteresis": 4}}


@pytest.mark.parametrize("text", ["set #2", "2024", "2024-13-01", "a: b", "@x", "true", " x", "007", "0x1f"])
def test_a_path_or_a_name_is_what_was_typed(text):
    assert load(None, [f"data.train={text}", "optim.steps=1"]).data.train == Path(text)
    sets = load(None, [*ENOUGH, f"eval.classification.x={text}"]).eval.classification
    assert sets == {"x": Path(text)}
    assert load_protocol({"protocol": "open_set", "data": text}).data == Path(text)


def test_a_path_may_be_quoted_and_none():
    assert load(None, ['data.train="set 2"', "optim.steps=1"]).data.train == Path("set 2")
    assert load(None, [*ENOUGH, "init.from=null"]).init.from_ is None
    assert load(None, [*ENOUGH, "run.name=7"]).run.name == "7"


def test_two_dashes_before_a_field_are_allowed():
    assert load(None, [*ENOUGH, "--optim.lr=0.25"]).optim.lr == 0.25


def test_a_run_is_named_after_its_file_unless_it_has_a_name(tmp_path):
    file = write(tmp_path / "faces.yaml", "data: {train: shards}\noptim: {steps: 1}\n")
    assert load(file).run_folder == Path("runs/faces")
    assert load(file, ["run.name=mine", "run.root=/big"]).run_folder == Path("/big/mine")
    unnamed = load(None, ENOUGH)
    assert unnamed.run_folder == Path("runs/default")
    kept = write(tmp_path / "config.yaml", dump(unnamed))
    assert load(kept).run_folder == unnamed.run_folder  # it repeats the run


# Errors


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=0.1", "optim.lrr: unknown field; did you mean optim.lr?"),
        ("optm.lr=0.1", "optm: unknown field; did you mean optim?"),
        ("backbone.lr=0.1", "backbone.lr: unknown field; did you mean optim.lr?"),
        ("lr=0.1", "lr: unknown field; did you mean optim.lr?"),
        ("eval.batchsize=2", "eval.batchsize: unknown field; did you mean eval.batch_size?"),
        ("zzz=3", "zzz: unknown field"),
        (
            "optim.lr=fast",
            "optim.lr: input should be a valid number, unable to parse string as a number, got 'fast'",
        ),
        ("optim.lr=-1", "optim.lr: input should be greater than 0, got -1"),
        ("optim.lr=.nan", "optim.lr: input should be a finite number, got nan"),
        ("optim.lr={a: 1}", "optim.lr: input should be a valid number, got {'a': 1}"),
        ("data.workers=true", "data.workers: input should be a valid integer, got True"),
        ("data.workers=2.0", "data.workers: input should be a valid integer, got 2.0"),
        ("backbone.pretrained=maybe", "backbone.pretrained: input should be a valid boolean"),
        ("head.num_classes=1", "head.num_classes: input should be greater than or equal to 2, got 1"),
        (
            "checkpoint.every_steps=0",
            "checkpoint.every_steps: input should be greater than or equal to 1, got 0",
        ),
        (
            "engine.dtype=float8",
            "engine.dtype: input should be 'auto', 'float32', 'bfloat16' or 'float16', got 'float8'",
        ),
        ("engine.zero_stage=3", "engine.zero_stage: input should be 0, 1 or 2, got 3"),
        (
            "head.scale=magic",
            "head.scale: input should be a valid number, unable to parse string as a number "
            "or input should be 'paper', 'simplex' or 'adacos', got 'magic'",
        ),
        (
            "head.scale=-1",
            "head.scale: input should be greater than 0 "
            "or input should be 'paper', 'simplex' or 'adacos', got -1",
        ),
        ("optim.betas=[0.9, 1.0]", "optim.betas: input should be less than 1, got 1.0"),
        ("optim.betas=[0.9]", "optim.betas: field required, got [0.9]"),
        ("run.name=../elsewhere", "run.name: string should match pattern"),
        ("eval.classification=3", "eval.classification: input should be a valid dictionary, got 3"),
        ("optim=3", "optim: is a section with fields, got 3"),
        ("optim=", "optim: is a section with fields, got None"),
        ("data.train.x=2", "data.train.x: train is not a section"),
        ("optim.lr=[", "optim.lr: not a YAML value: '['"),
        ("seed=2024-13-01", "seed: not a YAML value: '2024-13-01'"),  # a date that does not exist
        ("optim.lr", "optim.lr: expected section.field=value"),
        ("=3", "=3: expected section.field=value"),
    ],
)
def test_an_error_names_the_field_and_the_value(override, expected):
    assert message(*ENOUGH, override).startswith(expected)


def test_a_missing_field_is_named_with_the_way_to_give_it():
    expected = "data.train: is required; give it in the YAML file or as data.train=VALUE"
    assert message("optim.steps=1") == expected


def test_all_wrong_fields_are_named_in_one_line():
    text = message("optim.steps=1", "optim.lrr=1", "log.wandb=maybe")
    assert text.count("; ") >= 2
    assert all(name in text for name in ("data.train:", "optim.lrr:", "log.wandb:"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("optim: [", ": not YAML: "),
        ("run: {name: 2024-13-01}", ": not YAML: "),
        ("", ": must hold sections with fields, not NoneType"),
        ("- a\n- b", ": must hold sections with fields, not list"),
        ("optim:\ndata: {train: a}", "optim: is a section with fields, got None"),
        ("1: 2\ndata: {train: a}", "1: keys should be strings, got 1"),
        ("data: {train: a}\noptim: {lrr: 1}", "optim.lrr: unknown field; did you mean optim.lr?"),
        ("data: {train: a}\nrun: 3", "run: is a section with fields, got 3"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, content, expected):
    file = write(tmp_path / "bad.yaml", content)
    assert expected in message(path=file)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    missing = tmp_path / "missing.yaml"
    assert message(path=missing) == f"{missing}: cannot read the configuration: No such file or directory"
    assert message(path=tmp_path) == f"{tmp_path}: cannot read the configuration: Is a directory"
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert message(path=binary).startswith(f"{binary}: not YAML: ")


# Reference


def all_fields() -> list[tuple[str, str, str, str]]:
    rows = [(name, *rest) for name, *rest in fields(Config)]
    return rows + [(f"{s}.{name}", *rest) for s, cls in sections() for name, *rest in fields(cls)]


def test_every_field_and_section_is_explained():
    assert len(all_fields()) > 40
    for name, _, _, meaning in all_fields():
        assert len(meaning) > 15, name
        assert meaning.endswith("."), name
    for name, cls in sections():
        assert not (cls.__doc__ or cls.__name__).startswith(cls.__name__), name  # dataclass makes one up


def test_help_and_reference_page_tell_every_field_with_its_meaning():
    text, page = help_text(), markdown()
    for name, kind, default, meaning in all_fields():
        assert f"  {name}  ({kind}; default {default})\n      {meaning}\n" in text
        assert f"| `{name}` |" in page
        assert meaning.replace("|", "\\|") in page


def test_types_and_defaults_read_as_a_user_writes_them():
    told = {name: (kind, default) for name, kind, default, _ in all_fields()}
    assert told["data.train"] == ("Path | Url", "required")
    assert told["run.root"] == ("Path", "runs")
    assert told["head.scale"] == ("float | paper | simplex | adacos", "simplex")
    assert told["augment.zoom"] == ("tuple[float, float] | None", "None")
    assert told["backbone.mean"] == ("tuple[float, ...] | None", "None")
    assert told["eval.verification"] == ("dict[str, Path | Url]", "{}")


def test_the_reference_page_is_current():
    page = (REPOSITORY / "docs" / "config.md").read_text()
    assert page == markdown(), "run: python -m trainer.options --markdown > docs/config.md"


def test_the_page_has_one_table_row_per_field_and_no_broken_one():
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == len(all_fields())
    assert all(line.replace("\\|", "").count("|") == 5 for line in rows)


# Round trip


def test_a_dumped_configuration_loads_to_the_same(tmp_path):
    config = load(
        None,
        [
            "data.train=some/shards",
            "optim.epochs=1.5",
            "optim.lr=0.1",
            "seed=9223372036854775807",
            "run.name=a.b-c",
            "run.root=/else where",
            "augment.zoom=[0.9, 1.1]",
            "backbone.mean=[0.1, 0.2, 0.3]",
            "head.scale=16.25",
            "eval.classification.test=a",
            "eval.verification.lfw=b",
            "engine.deepspeed_overrides={fp16: {hysteresis: 4}}",
            "checkpoint.resume=never",
        ],
    )
    text = dump(config)
    assert load(write(tmp_path / "config.yaml", text)) == config
    assert dump(load(tmp_path / "config.yaml")) == text


def test_a_dumped_configuration_holds_every_field():
    tree = yaml.safe_load(dump(load(None, ENOUGH)))
    for section, cls in sections():
        assert reduce(getitem, section.split("."), tree).keys() == field_infos(cls).keys()
    assert tree.keys() == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_configuration_loads(path):
    config = load(path, ["data.train=shards"])
    assert config.run.name == path.stem


# Entry points


@pytest.mark.parametrize("command", [["-m", "trainer.options"], ["launch/train.py"]], ids=" ".join)
def test_a_typo_ends_with_exit_code_2_and_one_line_in_seconds(command):
    started = time.monotonic()
    done = run_python(*command, *ENOUGH, "optim.lrr=0.1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: optim.lrr: unknown field; did you mean optim.lr?\n"
    assert time.monotonic() - started < 5.0  # about 0.4 s: neither imports torch, which takes several


def test_options_as_a_program_prints_the_resolved_configuration(tmp_path):
    file = write(tmp_path / "a.yaml", "data: {train: shards}\noptim: {steps: 7}\n")
    done = run_python("-m", "trainer.options", str(file), "optim.lr=0.25")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == dump(load(file, ["optim.lr=0.25"]))


def test_help_of_the_trainer_is_made_from_the_docstrings():
    done = run_python("launch/train.py", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert help_text() in done.stdout


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_recipes_test_sets_go_with_its_training_data(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {train: digits}\noptim: {steps: 1}\n"
        "eval: {classification: {test: t}, verification: {new: n}}\n"
    )
    kept = load(recipe, ["data.train=digits"]).eval
    assert (set(kept.classification), set(kept.verification)) == ({"test"}, {"new"})
    other = load(recipe, ["data.train=faces", "eval.verification.lfw=l"]).eval
    assert (other.classification, other.verification) == ({}, {"lfw": Path("l")})
