"""JSON Schemas (2020-12) of cards and entries, and strict reading of JSON that comes from strangers."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files
from typing import Any, NoReturn

from jsonschema import Draft202012Validator, ValidationError, validators

from segbench.errors import ContentError

MAX_CHARACTERS = 1_000_000
MAX_INTEGER = 2**63 - 1


def _pattern(_: Any, pattern: str, instance: Any, __: Any) -> Iterator[ValidationError]:
    """Patterns hold for the whole string; searched for, a final ``$`` would let a line break through."""
    if isinstance(instance, str) and not re.fullmatch(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _whole(_: Any, instance: Any) -> bool:
    """A number with a point is no integer, though JSON Schema lets 8.0 be one: Python would read a float."""
    return isinstance(instance, int) and not isinstance(instance, bool)


_Validator: type[Draft202012Validator]
_Validator = validators.extend(  # type: ignore[no-untyped-call]
    Draft202012Validator,
    {"pattern": _pattern},
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", _whole),
)


@lru_cache(maxsize=8)
def validator(name: str) -> Draft202012Validator:
    """The validator of ``card``, ``entry``, ``external``, ``reproduction``, ``manifest`` or ``dataset``."""
    schema = json.loads((files("segbench.schemas") / f"{name}.schema.json").read_text("utf-8"))
    return _Validator(_inlined(schema, schema.pop("$defs", {})))


def _inlined(part: Any, definitions: dict[str, Any]) -> Any:
    """A schema with its definitions where they are referred to: looking them up is a third of the time."""
    if isinstance(part, dict):
        if "$ref" in part:
            return _inlined(definitions[part["$ref"].removeprefix("#/$defs/")], definitions)
        return {key: _inlined(value, definitions) for key, value in part.items()}
    if isinstance(part, list):
        return [_inlined(value, definitions) for value in part]
    return part


def problems(name: str, document: Any) -> list[str]:
    """What the schema ``name`` finds wrong, each with the field's path; empty when all is well."""
    errors = sorted(validator(name).iter_errors(document), key=lambda error: list(map(str, error.absolute_path)))
    return [f"{'.'.join(map(str, error.absolute_path)) or 'document'}: {_say(error)}" for error in errors]


def version(name: str) -> int:
    """The ``schema_version`` that the schema ``name`` asks for."""
    found: int = validator(name).schema["properties"]["schema_version"]["const"]  # type: ignore[index]
    return found


def other_version(source: str, stated: object, current: int, folder: str = "FOLDER") -> str:
    """What to do about a file of another schema version; ``folder`` holds it and all that belongs to it."""
    if isinstance(stated, int) and stated < current:
        return (
            f"{source} has schema version {stated}; this segbench reads version {current}. Upgrade it together with "
            f"the files that belong to it: segbench entries migrate {shlex.quote(folder)}"
        )
    return (
        f"{source} has schema version {stated!r}; this segbench reads version {current}. "
        "Update segbench: pip install -U segbench"
    )


def source_problems(source: Any) -> list[str]:
    """What is wrong with one source of a card's weights."""
    rule = validator("card").schema["properties"]["sources"]["items"]  # type: ignore[index]
    return [_say(error) for error in _Validator(rule).iter_errors(source)]


def _say(error: ValidationError) -> str:
    """The message of a schema error, with the schema's own words for what is expected there."""
    expected = error.schema.get("description") if isinstance(error.schema, dict) else None
    if expected is None:
        value = repr(error.instance)
        shown = value if len(value) <= 100 else f"{value[:100]}..."
        most = f" (at most {error.validator_value})" if error.validator in ("maxLength", "maxItems") else ""
        return error.message.replace(value, shown)[:300] + most
    return f"{str(error.instance)[:100]!r} is not {expected}"


def parse(text: str, *, source: str, max_characters: int = MAX_CHARACTERS) -> Any:
    """JSON without NaN, infinities, numbers out of range, half characters and duplicate keys.

    Raises:
        ContentError: names ``source`` and the place.
    """
    if len(text) > max_characters:
        raise ContentError(f"{source} has more than {max_characters} characters.")
    try:
        document = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_bounded
        )
        # An escape like \ud800 is half a character, which nothing can print.
        json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ContentError(f"{source} is not valid JSON: {error}. Restore the file or correct the place.") from error
    return document


def dump(document: Any) -> str:
    """JSON as segbench writes it: two spaces, no NaN, a final newline."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large")
    return value


def _bounded(text: str) -> int:
    value = int(text)
    if abs(value) > MAX_INTEGER:
        raise ValueError(f"{text[:20]}... is too large")
    return value
