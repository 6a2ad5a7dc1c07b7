"""Files -> rows: JSON lines, a JSON array or object, or Parquet, which gzip may compress."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

Row = dict[str, Any]
Converted = TypeVar("Converted")

WHOLE = "the object"  # the name of a row that is a file
OTHER_COMPRESSION = {  # by the first bytes of a file
    b"\x28\xb5\x2f\xfd": ("Zstandard", "zstd -d"),
    b"BZh": ("bzip2", "bzip2 -d"),
    b"\xfd7zXZ": ("xz", "xz -d"),
}
OTHER_FORMATS = (".csv", ".tsv", ".arrow", ".feather", ".yaml", ".yml", ".zip")
NAMED = 10  # skipped rows that a message names


def read_rows(
    path: str | Path,
    convert: Callable[[Row], Converted],
    skipped: dict[str, str] | None = None,
    parse_float: Callable[[str], float] = float,
) -> Iterator[tuple[str, Converted]]:
    """Yield the name of every row of a file, such as "line 17", and what `convert` makes of it.

    Args:
        path: The file; "-" for standard input.
        convert: Called with each row; it may raise any exception.
        skipped: Receives why a row cannot be read or converted, by its name; None to raise an error at the first.
        parse_float: Makes a number of a JSON file's text, for those with a point or an exponent.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file, or without `skipped` a row, cannot be read or converted; with its line or number.
    """
    for name, row in _rows(path, parse_float):
        try:
            converted = convert(_checked(row))
        except Exception as error:  # a chat template may raise anything
            reason = f"{'' if isinstance(error, ValueError) else f'{type(error).__name__}: '}{error}"
            if skipped is None:
                raise ValueError(f"{located(path, name)}: {reason}") from error
            skipped[name] = reason
            continue
        yield name, converted


def located(path: str | Path, name: str) -> str:
    """Return where a row is, such as "rows.jsonl:17"."""
    if name.startswith("line "):
        return f"{path}:{name.removeprefix('line ')}"
    return str(path) if name == WHOLE else f"{path}, {name}"


def skipped_message(skipped: Mapping[str, str]) -> str:
    """Return a sentence on the rows that were skipped.

    >>> skipped_message({"line 7": "must be JSON", "line 9": "reward must be finite, got nan"})
    'skipped 2 rows: line 7, line 9; line 7: must be JSON'
    """
    names = [*skipped]
    named = ", ".join(names[:NAMED]) + ", ..." * (len(names) > NAMED)
    return f"skipped {len(names)} row{'s' * (len(names) > 1)}: {named}; {names[0]}: {skipped[names[0]]}"


def _rows(path: str | Path, parse_float: Callable[[str], float]) -> Iterator[tuple[str, Row | Exception]]:
    if Path(path).is_dir() or Path(path).suffix.lower() in OTHER_FORMATS:
        given = "a folder" if Path(path).is_dir() else Path(path).suffix
        raise ValueError(f"{path} must be a file of JSON lines, JSON or Parquet, got {given}")
    data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} must be a complete gzip file: {error}") from error
    for magic, (name, command) in OTHER_COMPRESSION.items():
        if data.startswith(magic):
            raise ValueError(f"{path} must be uncompressed or gzip, got {name}; decompress it, as with `{command}`")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} must be UTF-8, got UTF-16; convert it, as with `iconv -f UTF-16 -t UTF-8`")
    if data.startswith(b"PAR1"):
        found = _parquet_rows(data, path)
    else:
        found = _json_rows(data.removeprefix(b"\xef\xbb\xbf"), path, partial(json.loads, parse_float=parse_float))
    for name, row in found:
        if isinstance(row, dict) and isinstance(row.get("simulations"), list):
            prefix = "" if name == WHOLE else f"{name}, "
            for n, simulation in enumerate(row["simulations"]):
                yield f"{prefix}simulations[{n}]", _tau2(row, simulation)
        else:
            yield name, row


def _json_rows(data: bytes, path: str | Path, loads: Callable[..., Any]) -> Iterator[tuple[str, Row | Exception]]:
    if data.lstrip().startswith(b"["):
        try:
            entries = loads(data)
        except (ValueError, RecursionError) as error:
            hint = "; a line of JSON lines must be an object" if _is_list(data.lstrip().split(b"\n")[0]) else ""
            raise ValueError(f"{path} must be a JSON array: {error}{hint}") from error
        yield from ((f"entry {n}", entry) for n, entry in enumerate(entries))
        return
    lines = data.split(b"\n")
    first = next((line for line in lines if line.strip()), b"")
    if isinstance(_parsed(first, loads), Exception) and isinstance(whole := _parsed(data, loads), dict):
        yield WHOLE, whole
        return
    yield from ((f"line {n}", _parsed(line, loads)) for n, line in enumerate(lines, start=1) if line.strip())


def _parsed(data: bytes, loads: Callable[..., Any]) -> Row | Exception:
    try:
        parsed: Row = loads(data.decode())
    except UnicodeDecodeError as error:
        return ValueError(f"must be UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return ValueError(f"must be JSON: {error}")
    return parsed


def _is_list(data: bytes) -> bool:
    return isinstance(_parsed(data, json.loads), list)


def _parquet_rows(data: bytes, path: str | Path) -> Iterator[tuple[str, Row | Exception]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"{error}; Parquet files need pyarrow: pip install pyarrow") from error
    try:
        file = ParquetFile(BytesIO(data))
    except ArrowException as error:
        raise ValueError(f"{path} must be a complete Parquet file: {error}") from error
    rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
    yield from ((f"row {n}", _without_none(row)) for n, row in enumerate(rows))


def _without_none(value: Any) -> Any:
    """Return a value without the keys that Parquet adds because other rows have them."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _tau2(results: Row, simulation: Row) -> Row | Exception:
    """Return a simulation of tau2-bench with the policy in front, as the agent saw it: without the user's own tools."""
    try:
        messages = [
            part
            for message in simulation["messages"]
            for part in message.get("tool_messages") or [message]
            if not (part["role"] == "user" and part.get("tool_calls")) and part.get("requestor") != "user"
        ]
        policy = ((results.get("info") or {}).get("environment_info") or {}).get("policy")
    except (AttributeError, KeyError, TypeError) as error:
        return ValueError(f"must have messages with roles: {type(error).__name__}: {error}")
    roles = [message["role"] for message in messages]
    first = int(roles[:1] == ["system"])
    if roles[first : first + 1] == ["assistant"]:  # a greeting that the benchmark writes, not the model
        messages[first] = messages[first] | {"weight": 0}
    system = [{"role": "system", "content": policy}] if policy and "system" not in roles else []
    return simulation | {"messages": system + messages}


def _checked(row: Row | Exception) -> Row:
    if isinstance(row, Exception):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, got {type(row).__name__}")
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"text must not contain lone surrogates, which are not Unicode, got {surrogate}") from None
    return row
