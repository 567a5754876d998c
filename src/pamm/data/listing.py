"""Listing folders and reading lists of names. Every file in a folder is read, reported, or known to be no data."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pamm.data.sample import DataError
from pamm.files import shown

_HARMLESS = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "__macosx", "lost+found", "$recycle.bin")
)
"""Names, in lower case, that systems leave in folders; hidden ones (.DS_Store, ._a.png) are passed over by their dot."""

_COMPANIONS = frozenset(
    (
        *(".txt", ".md", ".rst", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".html", ".htm"),
        *(".log", ".xmp", ".aae", ".url", ".sha256", ".md5", ".py", ".sh"),
        *(".mov", ".mp4", ".m4v", ".avi", ".mkv", ".webm", ".mp3", ".wav", ".m4a"),
    )
)
"""Suffixes of other files beside pictures: notes, annotations of other tools, films."""

_DOCUMENTS = frozenset(("readme", "license", "licence", "copying", "notice", "changelog"))
"""Names without suffix of documents."""


@dataclass(frozen=True)
class Listing:
    """The content of a folder, without hidden files and those that systems leave everywhere.

    files: id → file, sorted, of the suffixes asked for. An id is the file's name without suffix in Unicode's composed form
    (NFC): systems write the same accent as one character or as two.
    unread: names of all else that may be meant to be read: other suffixes, none, folders (with "/" at their end).
    companions: names of notes, annotations of other tools and films, which are known not to be read.
    """

    folder: Path
    files: dict[str, Path]
    unread: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()


def list_folder(folder: Path, suffixes: Collection[str]) -> Listing:
    """The content of a folder, of `suffixes` (lower case, with dot) in any letter case; empty where it is absent.

    Raises DataError where two files share an id, and where the folder may not be read.
    """
    files: dict[str, Path] = {}
    unread, companions = [], []
    for entry in visible(folder):
        kind = kind_of(entry.name, entry, suffixes)
        if kind == "read":
            path = folder / entry.name
            _add(files, composed(path.stem), path)
        elif kind == "companion":
            companions.append(entry.name)
        else:
            unread.append(f"{entry.name}/" if kind == "folder" else entry.name)
    return Listing(folder, files, tuple(unread), tuple(companions))


def files_ending(folder: Path, ending: str) -> dict[str, Path]:
    """Id → file, sorted, of the files whose names end in `ending`, in any letter case; an id is the name without it, in NFC.

    For folders that hold more than one kind of file. Raises DataError where two files share an id.
    """
    files: dict[str, Path] = {}
    for name in names_in(folder):
        if name.lower().endswith(ending.lower()):
            _add(files, composed(name[: -len(ending)]), folder / name)
    return files


def _add(files: dict[str, Path], image_id: str, path: Path) -> None:
    if image_id in files:
        raise DataError(
            f"{path.parent} holds both {shown(files[image_id].name)} and {shown(path.name)}. Keep one of the two files."
        )
    files[image_id] = path


def kind_of(name: str, entry: os.DirEntry[str] | Path, suffixes: Collection[str]) -> str:
    """The kind of an entry of a folder: "read", "companion" (no data), "folder", or "unread" (all else).

    A link that leads nowhere counts by its name: the code that reads it reports the error.
    """
    suffix = Path(name).suffix.lower()
    try:
        if entry.is_dir():
            return "folder"
        if not entry.is_file() and os.path.exists(entry):  # a pipe, a socket, a device: opening it might wait for ever
            return "unread"
    except OSError:
        pass  # reported by the code that reads it
    if suffix in suffixes:
        return "read"
    is_document = suffix in _COMPANIONS or (not suffix and name.lower() in _DOCUMENTS)
    return "companion" if is_document else "unread"


def check_all_read(listing: Listing, what: str, suffixes: Iterable[str], remedy: str) -> None:
    """Raise DataError where a folder holds what is not read.

    what: what the folder is for, e.g. "images". remedy: how to make files of another kind readable.
    """
    suffixes = tuple(suffixes)
    folders = [name for name in listing.unread if name.endswith("/")]
    others = [name for name in listing.unread if not name.endswith("/")]
    wanted = f"{what} must be {' or '.join(suffixes)} files"
    special = [name for name in others if name.lower().endswith(suffixes)]
    if special:
        raise DataError(
            f"{listing.folder} holds {preview(special)}, {NO_FILE}. Put the file itself there, or remove it."
        )
    if others:
        remedy = f"{remedy[0].upper()}{remedy[1:]}, or move these files elsewhere."
        raise DataError(f"{listing.folder} holds {preview(others)}: {wanted}. {remedy}")
    if folders:
        raise DataError(
            f"{listing.folder} holds the folder {preview(folders)}, in which nothing is read: {wanted} directly in "
            f"{listing.folder}. Move the files there, or the folder elsewhere."
        )


NO_FILE = "which is a pipe, a socket or a device, and no file"
"""The message for a name that could be read if it were a file's."""


def conversion(names: Iterable[str]) -> str:
    """The remedy that makes pictures of these names readable."""
    heif = any(name.lower().endswith((".heic", ".heif")) for name in names)
    return "convert to PNG or JPEG" + (", or pip install 'pamm[heif]' to read .heic" if heif else "")


def near_name(image_id: str, known: Collection[str]) -> str:
    """A sentence on how `image_id` differs from one of the `known` ids, with a space before it; "" where it resembles none."""
    for change, difference in ((str.casefold, "letter case"), (str.strip, "spaces")):
        other = next((one for one in known if change(one) == change(image_id)), None)
        if other is not None:
            return f" '{shown(image_id)}' and '{shown(other)}' differ in {difference}: rename one of them."
    for match in re.finditer(r"[._ -]", image_id):
        for part, rest in (
            (image_id[: match.start()], image_id[match.start() :]),
            (image_id[match.end() :], image_id[: match.end()]),
        ):
            if part in known:
                return f" Names must be equal, apart from the suffix: leave out '{shown(rest)}'."
    return ""


def read_ids(path: Path) -> list[str]:
    """The ids of a list, one per line, in Unicode's composed form (NFC).

    The file is UTF-8 with or without a byte order mark, its lines end as on any system; blank lines and spaces around an id
    do not count, spaces inside do. Raises DataError where it is absent or empty, is no such text, repeats an id, or names
    other folders.
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise DataError(f"no split list {path}. Unpack the archive again: it holds the lists of its images.") from None
    lines = [composed(line.strip(" \t")) for line in re.split(r"\r\n|\n|\r", text)]  # str.splitlines knows further ends
    ids = [line for line in lines if line]
    if not ids:
        raise DataError(f"{path} lists no image. Unpack the archive again, or write one id per line.")
    outside = [image_id for image_id in ids if image_id in (".", "..") or "/" in image_id or "\\" in image_id]
    if outside:
        raise DataError(
            f"{path} lists '{shown(outside[0])}', expected names without folders, one per line. Leave out folders and suffixes."
        )
    repeated = len(ids) - len(set(ids))
    if repeated:
        twice, _ = Counter(ids).most_common(1)[0]
        raise DataError(
            f"{path} repeats {repeated} of its {len(ids)} ids, e.g. {shown(twice)}. Remove the repeated lines."
        )
    return ids


def read_text(path: Path) -> str:
    """A text file of UTF-8, without its byte order mark. Raises FileNotFoundError, and DataError for other contents."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:1000]:
        raise DataError(
            f"{path} is UTF-16 text, or no text, expected UTF-8. Save it again as UTF-8 (in PowerShell: -Encoding utf8)."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} is not UTF-8 text: line {line} holds the byte 0x{content[error.start]:02x}. Save it again as UTF-8."
        ) from None


def preview(names: Iterable[str], count: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(shown, names[:count])) + more


def is_folder(path: Path) -> bool:
    """Whether a folder is there. Raises DataError if that cannot be determined: a forbidden path, an over-long name."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def names_in(folder: Path) -> list[str]:
    """Sorted names in a folder, hidden ones left out; none where it is absent. Raises DataError where it may not be read."""
    return [entry.name for entry in visible(folder)]


def visible(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The entries that are neither hidden nor left there by a system, in one order on every system.

    None where the folder is absent. Raises DataError where it may not be read.
    """
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from None
    for entry in sorted(entries, key=lambda entry: (composed(entry.name), entry.name)):
        if not is_skipped(entry.name):
            yield entry


def is_skipped(name: str) -> bool:
    """Whether a name is hidden, or one that systems leave in folders."""
    return name.startswith(".") or name.lower() in _HARMLESS


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC), in which names are compared."""
    return unicodedata.normalize("NFC", name)


def _unreadable(path: Path, error: OSError | ValueError) -> DataError:
    if isinstance(error, PermissionError):
        return DataError(f"{path} may not be read: change its permissions, or those of the folders it lies in.")
    return DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}). Correct the path.")
