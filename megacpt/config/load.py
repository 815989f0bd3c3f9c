"""From a YAML file and `a.b=c` overrides to a checked `Config`, and back to YAML."""

import difflib
import re
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megacpt.config.tree import Config
from megacpt.errors import UserError

MAY_BE_NULL = ("tokenizer", "guard")
"""Sections that a run may do without; of the others null means the defaults."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a repeated key, and reads 3e-5 as a number, as YAML 1.2 does, and 5e9 as a whole one."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, "a key is a list or a mapping", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float | int:
    if re.fullmatch(r"[-+]?\d+[eE]\+?\d+", node.value):
        digits, _, exponent = node.value.lower().partition("e")
        return int(digits) * 10 ** min(int(exponent), 400)
    return loader.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None and "\n" in text else ""
        raise UserError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


def _override(tree: dict[str, Any], assignment: str) -> None:
    """Apply one `a.b=c` to `tree`, creating the sections on the way."""
    path, equals, value = assignment.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise UserError(f"override '{assignment}': write it as section.key=value")
    node = tree
    for at, key in enumerate(keys[:-1]):
        child = node.setdefault(key, {})
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise UserError(f"override '{assignment}': '{'.'.join(keys[: at + 1])}' is a value, not a section")
        node = child
    node[keys[-1]] = _parse(value, f"override '{assignment}'")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as `Tokenizer | None` or `dict[str, Source]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _sections(location: Sequence[Any]) -> Iterator[type[BaseModel]]:
    """The section classes along a path of keys; keys of a dict of sections are stepped over."""
    current: type[BaseModel] = Config
    yield current
    for key in location:
        field = current.model_fields.get(str(key))
        found = _model_in(field.annotation) if field else None
        if found is not None:
            current = found
        yield current


def _sentence(error: ErrorDetails, where: str) -> str:
    location = [str(key) for key in error["loc"]]
    path = ".".join(location)
    if error["type"] == "extra_forbidden":
        section = list(_sections(location[:-1]))[-1]
        known = [field.alias or name for name, field in section.model_fields.items()]
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
        return f"{where}: unknown key '{path}'; the nearest is '{'.'.join([*location[:-1], near[0]])}'"
    if error["type"] == "missing":
        return f"{where}: key '{path}' is missing"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{where}: {path} = {error['input']!r}: {message.removeprefix('input ')}"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides in order, check keys and types.

    Raises:
        UserError: the file is missing or not YAML, or a key is unknown (names the nearest), missing or of a wrong type.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a configuration ({error}); give --config a YAML file") from error
    tree = _parse(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a configuration is a mapping of sections such as model, data, train")
    tree = {key: {} if value is None and key not in MAY_BE_NULL else value for key, value in tree.items()}
    for assignment in overrides:
        _override(tree, assignment)
    return config_from(tree, str(path))


def config_from(tree: dict[str, Any], where: str) -> Config:
    """Check a plain tree of values against the schema; `where` begins each error's sentence."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        # An unknown key is the likeliest cause of the others (the misspelt key is then "missing" too): name it first.
        details = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise UserError(_sentence(details[0], where)) from error


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, defaults included, in the order of the tree."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
