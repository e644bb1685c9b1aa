"""From text to a checked Config, and from Config to text: YAML, command line, help, reference page.

Precedence is three words: defaults < YAML file < command line (``section.field=value``). Costs no torch,
so a typo is reported in a blink::

    python -m trainer.options configs/demo.yaml optim.lr=0.1       # prints the resolved configuration
    python -m trainer.options --markdown > docs/config.md          # the reference page
"""

import dataclasses
import difflib
import io
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from trainer.address import Url, without_credentials
from trainer.config import (
    Config,
    DataConfig,
    FieldInfo,
    InvalidConfigError,
    ProtocolConfig,
    field_infos,
    from_dict,
    protocol_from_dict,
    to_dict,
)
from trainer.consistency import check_across_fields
from trainer.errors import UserError

_WRAPPERS = {Annotated, typing.Union, types.UnionType}  # of types; the first has notes behind its type


def load(path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read ``path`` (None: defaults only), apply ``section.field=value`` overrides, check everything.

    Raises UserError with one line naming the field, the value and, for a typo, the nearest name.
    """
    tree = read_yaml(path) if path is not None else {}
    overrides = list(overrides)
    _drop_test_sets_of_other_data(tree, overrides)
    for override in overrides:
        _set(tree, override)
    run = tree.setdefault("run", {})
    if isinstance(run, dict) and run.get("name") is None:
        run["name"] = "default" if path is None else path.stem
    tree.setdefault("data", {})  # so that a missing data.train is reported under its own name
    try:
        config = from_dict(tree)
    except InvalidConfigError as error:
        raise UserError("; ".join(_explain(*found) for found in _per_field(error.errors).items())) from None
    check_across_fields(config)
    return config


def load_protocol(texts: Mapping[str, str | list[str]]) -> ProtocolConfig:
    """Check the fields of a protocol, given as text; a list is of as many values, or of ``key=value``.

    Raises UserError naming the option.
    """
    tree: dict[str, Any] = {}
    for name, text in texts.items():
        if isinstance(text, str):
            _set(tree, f"{name}={text}", ProtocolConfig)
        elif name == "regions":
            tree[name] = {key: value or None for key, _, value in (item.partition("=") for item in text)}
        else:
            _set(tree, f"{name}=[{','.join(text)}]", ProtocolConfig)
    try:
        return protocol_from_dict(tree)
    except InvalidConfigError as error:
        first = error.errors[0]
        option = str(first["loc"][0]).replace("_", "-")
        if first["type"] == "missing":
            raise UserError(f"--{option}: is required") from None
        raise UserError(
            f"--{option}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {first['input']!r}"
        ) from None


def dump(config: Config) -> str:
    """Return YAML that repeats the run."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def changed_since(saved: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """Return {"section.field": (before, now)} of what is not as in ``saved``, an earlier ``to_dict``.

    A field that it does not know had its default.
    """
    before = _flat(to_dict(Config(data=DataConfig(train=config.data.train)))) | _flat(saved)
    now = _flat(to_dict(config))
    pairs = {name: (before.get(name), now.get(name)) for name in sorted(now.keys() | before.keys())}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def sections(cls: type = Config, prefix: str = "") -> Iterable[tuple[str, type]]:
    """Yield (dotted name, class) of every section, in order, each before those inside it."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield prefix + field.name, typing.cast(type, field.type)
            yield from sections(typing.cast(type, field.type), f"{prefix}{field.name}.")


def fields(cls: type) -> Iterable[tuple[str, str, str, str]]:
    """Yield (name, type, default, meaning) of every plain field of a section."""
    for name, info in field_infos(cls).items():
        if not dataclasses.is_dataclass(info.annotation):
            yield name, _type_name(info), _default_name(info), " ".join((info.description or "").split())


def help_text() -> str:
    """Return every field as text for ``--help``."""
    out = io.StringIO()
    for prefix, cls in [("", Config), *((f"{name}.", cls) for name, cls in sections())]:
        for name, kind, default, meaning in fields(cls):
            out.write(f"  {prefix}{name}  ({kind}; default {default})\n      {meaning}\n")
    return out.getvalue()


def markdown() -> str:
    """Return docs/config.md."""
    out = io.StringIO()
    out.write(
        "# Configuration\n\nGenerated by `python -m trainer.options --markdown` from the field docstrings\n"
    )
    out.write("of `trainer/config.py`. Defaults < YAML file < command line (`section.field=value`).\n")
    for name, cls in [("", Config), *sections()]:
        doc = " ".join((cls.__doc__ or "").split())
        out.write(f"\n## {name or 'top level'}\n\n{doc}\n\n")
        out.write("| field | type | default | meaning |\n|---|---|---|---|\n")
        for field, kind, default, meaning in fields(cls):
            cells = [f"`{name}.{field}`" if name else f"`{field}`", f"`{kind}`", f"`{default}`", meaning]
            out.write("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return out.getvalue()


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds. Raises UserError naming the file."""
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must hold sections with fields, not {type(tree).__name__}")
    return tree


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _drop_test_sets_of_other_data(tree: dict[str, Any], overrides: Iterable[str]) -> None:
    """Forget a recipe's test sets when the command line names other training data: they go with the recipe's.

    The classes of MNIST say nothing about a model of faces. Test sets on the command line stay.
    """
    data, evaluation = tree.get("data"), tree.get("eval")
    theirs = data.get("train") if isinstance(data, dict) else None
    trained_on = [override.partition("=")[2] for override in overrides if override.startswith("data.train=")]
    if trained_on and trained_on[-1] != str(theirs) and isinstance(evaluation, dict):
        evaluation.pop("classification", None)
        evaluation.pop("verification", None)
        evaluation.pop("protocols", None)


def _set(tree: dict[str, Any], override: str, cls: type = Config) -> None:
    """Put one ``section.field=value`` into the tree; the value is read as YAML, a path or a name as it is."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise UserError(f"{override}: expected section.field=value")
    *parents, last = name.lstrip("-").split(".")
    takes_text = _takes_text(cls, [*parents, last])
    for parent in parents:
        node = tree.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"{name}: {parent} is not a section")
        tree = node
    if takes_text and not text.lstrip().startswith(("'", '"', "[", "{")):
        tree[last] = None if text.strip().lower() in ("", "~", "null") else text
        return
    try:
        tree[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise UserError(f"{name}: not a YAML value: {text!r} ({' '.join(str(error).split())})") from None


def _takes_text(kind: Any, names: Iterable[str]) -> bool:
    """Return whether a field is a path or a text: there 2024 is no number, and # begins no comment."""
    for name in names:
        if dataclasses.is_dataclass(kind):
            info = field_infos(typing.cast(type, kind)).get(name)
            kind = info and info.annotation
        else:
            kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None
    kinds = {kind}
    while wrapped := {each for each in kinds if typing.get_origin(each) in _WRAPPERS}:
        kinds -= wrapped
        for each in wrapped:
            kinds |= set(typing.get_args(each)[: 1 if typing.get_origin(each) is Annotated else None])
    return bool(kinds & {Path, Url, str}) and kinds <= {Path, Url, str, type(None)}


def _per_field(errors: list[Any]) -> dict[str, list[Any]]:
    """Group the reports by field: pydantic makes one for every branch of a union."""
    found: dict[str, list[Any]] = {}
    for error in errors:
        found.setdefault(_path(error["loc"]), []).append(error)
    return found


def _path(loc: tuple[Any, ...]) -> str:
    """Return the field's dotted name; behind the field itself pydantic adds names of union branches."""
    parts: list[str] = []
    cls: Any = Config
    for part in loc:
        parts.append(str(part))
        known = field_infos(cls)
        if part not in known or not dataclasses.is_dataclass(known[part].annotation):
            break
        cls = known[part].annotation
    return ".".join(parts)


def _explain(path: str, errors: list[Any]) -> str:
    """Return what is wrong with one field."""
    kind, value, loc = errors[0]["type"], errors[0]["input"], errors[0]["loc"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        names = [f"{n}.{f}" for n, c in sections() for f, *_ in fields(c)] + list(field_infos(Config))
        return f"{path}: unknown field{_did_you_mean(path, names)}"
    if kind == "missing" and len(loc) == path.count(".") + 1:  # else an element of the value is missing
        return f"{path}: is required; give it in the YAML file or as {path}=VALUE"
    if kind == "dataclass_type":
        return f"{path}: is a section with fields, got {value!r}"
    messages = (e["msg"].removeprefix("Value error, ") for e in errors)
    reasons = dict.fromkeys(message[:1].lower() + message[1:] for message in messages)
    return without_credentials(f"{path}: {' or '.join(reasons)}, got {value!r}")


def _did_you_mean(path: str, names: list[str]) -> str:
    """Suggest the field with the same last word in another section, else the one spelled most alike."""
    same_word = [n for n in names if n.rpartition(".")[2] == path.rpartition(".")[2]]
    near = difflib.get_close_matches(path, same_word, n=1, cutoff=0.0)
    near = near or difflib.get_close_matches(path, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _type_name(info: FieldInfo) -> str:
    def name(kind: Any) -> str:
        args = typing.get_args(kind)
        if typing.get_origin(kind) is Annotated:
            return name(args[0])
        if typing.get_origin(kind) is Literal:
            return " | ".join(str(a) for a in args)
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
            return " | ".join(name(a) for a in args)
        if args:
            inner = ", ".join("..." if a is Ellipsis else name(a) for a in args)
            return f"{typing.get_origin(kind).__name__}[{inner}]"
        return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))

    return name(info.annotation)


def _default_name(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    return str(value) if isinstance(value, Path) else repr(value) if not isinstance(value, str) else value


def _main(argv: list[str]) -> None:
    if argv == ["--markdown"]:
        sys.stdout.write(markdown())
        return
    file = Path(argv[0]) if argv and "=" not in argv[0] else None
    try:
        sys.stdout.write(dump(load(file, argv[1 if file else 0 :])))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    _main(sys.argv[1:])
