"""The files of a source and their formats: plain text, JSON lines, JSON records or Parquet.

The suffix decides, ignoring case. A file with any other suffix is text, unless its first line is a JSON object with a
field ``text``: otherwise training on a corpus of JSON lines would see raw JSON.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

STANDARD_LIBRARY = "stdlib"
Format = Literal["text", "jsonl", "json", "parquet"]
OnDamage = Callable[[ValueError], None]
"""Called with damaged input: raises the error, or records it."""

_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".lz4")
_ABOUT = ("readme", "license", "licence", "citation", "notice", "changelog", "contributing")
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_BEGINNING = 2**16  # bytes to read to decide whether a first line is worth parsing
BOM = b"\xef\xbb\xbf"


def files_of(source: str, on_damage: OnDamage) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The files of ``stdlib``, a file or a folder, in a fixed order; and a sentence per choice made among them.

    In a folder, links to folders are followed, hidden files are skipped, and a file reachable twice is read once. Next
    to JSON or Parquet files, files about the data (``README.md``, ``LICENSE``) are left out.

    Raises:
        ValueError: there is no such source, or reading ``.parquet`` files needs an extra that is not installed.
    """
    if source == STANDARD_LIBRARY:
        return _standard_library(), ()
    path = Path(source)
    if _kind(path) == "folder":
        files, notes = _of_folder(path, on_damage)
    elif _kind(path) == "file":
        files, notes = (path,), ()
    else:
        raise ValueError(
            f"data is {source!r}, which is not a file or folder; give a text, .jsonl or .parquet file, a folder "
            "of them, or the name of a Megatron dataset without its suffix"
        )
    if any(_suffix(path) == "parquet" for path in files) and find_spec("pyarrow") is None:
        raise ValueError(f"data is {source!r}; to read .parquet, pip install 'vocabpp-jax[parquet]'")
    return files, notes


def format_of(path: Path, alone: bool = False) -> Format:
    """How to read a file.

    ``alone`` means that the file is the whole source, so a ``.json`` file must hold records; in a folder of code it may
    be a document like any other.

    Raises:
        ValueError: a compressed file.
        OSError: it cannot be read.
    """
    if path.suffix.lower() in _COMPRESSED:
        raise ValueError(f"{path} is compressed; decompress it first")
    if named := _suffix(path):
        return named
    is_json = path.suffix.lower() == ".json"
    with path.open("rb") as file:
        start = file.read(_BEGINNING).removeprefix(BOM).lstrip()
        if start[:1] == b"{":
            file.seek(0)
            lines = (line for line in file if line.removeprefix(BOM).strip())
            first = _object(next(lines, b""))
            if first is not None and ("text" in first or _object(next(lines, b"")) is not None):
                return "jsonl"
    if is_json and (alone or (start[:1] in (b"[", b"{") and _has_records(path))):
        return "json"
    return "text"


def _object(line: bytes) -> dict | None:
    """The line parsed as a JSON object, or None."""
    try:
        value = json.loads(line.removeprefix(BOM))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _has_records(path: Path) -> bool:
    """Whether a JSON file is one object with a text, or a list that begins with one."""
    try:
        value = json.loads(path.read_bytes().removeprefix(BOM))
    except (ValueError, RecursionError):
        return False
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and "text" in first


def _suffix(path: Path) -> Format | None:
    return _SUFFIXES.get(path.suffix.lower())


def _kind(path: Path) -> Literal["file", "folder"] | None:
    try:
        return "folder" if path.is_dir() else "file" if path.is_file() else None
    except (OSError, ValueError):  # a name that is too long, or contains a NUL
        return None


def _of_folder(folder: Path, on_damage: OnDamage) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    found, notes = [], []
    seen: set[str] = set()
    again = 0
    for path in sorted(_walk(folder, on_damage)):
        if not path.is_file():
            problem = "is a link to nothing" if path.is_symlink() else "is not a regular file"
            on_damage(ValueError(f"{path} {problem}; remove it, or fix it"))
        elif (real := os.path.realpath(path)) in seen:
            again += 1
        else:
            seen.add(real)
            found.append(path)
    if again:
        notes.append(f"{again} links in {folder} lead to files that are already read")
    about = [path for path in found if _is_about(path)]
    has_records = any(_suffix(path) or (path.suffix.lower() == ".json" and _reads_as_records(path)) for path in found)
    if about and has_records:
        notes.append(f"left out next to the records in {folder}: {_listed(path.name for path in about)}")
        found = [path for path in found if not _is_about(path)]
    elif about:
        notes.append(f"read as documents in {folder}: {_listed(path.name for path in about)}")
    kinds = Counter(path.suffix.lower() or path.name for path in found)
    plain = [kind for kind in kinds if kind not in (*_SUFFIXES, ".json")]
    if len(kinds) > 1 and plain:
        notes.append(f"read in {folder}: {_listed(f'{kind} ({n})' for kind, n in kinds.most_common())}")
    return tuple(found), tuple(notes)


def _walk(folder: Path, on_damage: OnDamage) -> Iterable[Path]:
    """Everything in a folder except folders and hidden files; each folder once, even if links lead back to it."""

    def unreadable(problem: OSError) -> None:
        on_damage(ValueError(f"{problem.filename} cannot be read ({problem.strerror}); leave it out or fix it"))

    entered = {os.path.realpath(folder)}
    for root, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        new = {}
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(root, name))
            if not name.startswith(".") and real not in entered:
                entered.add(real)
                new[name] = real
        folders[:] = new
        yield from (Path(root, name) for name in files if not name.startswith("."))


def _reads_as_records(path: Path) -> bool:
    try:
        return path.name.lower() not in _ABOUT_DATA and format_of(path) != "text"
    except OSError:
        return False


def _is_about(path: Path) -> bool:
    name = path.name.lower()
    return name.partition(".")[0] in _ABOUT or name in _ABOUT_DATA


def _listed(words: Iterable[str], at_most: int = 5) -> str:
    words = list(words)
    more = f" and {len(words) - at_most} more" if len(words) > at_most else ""
    return ", ".join(words[:at_most]) + more


def _standard_library() -> tuple[Path, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages"}
    return tuple(sorted(path for path in root.rglob("*.py") if not installed.intersection(path.parts)))
