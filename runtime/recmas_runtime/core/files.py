"""Files: read regular ones, put files and folders in their place whole, lock what is written."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Final

from recmas_runtime.core.errors import fail

# `.NAME.building-XXXX` is a build under way, `.NAME.replaced-XXXX` a folder on its way out.
_BUILDING: Final = "building"
_REPLACED: Final = "replaced"
_KNOWS_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
# Of files that exist already, a message names so many.
_SHOWN_NAMES: Final = 3


def reason_of(error: OSError) -> str:
    """Return why the system refuses something, and what to do where only the system can help."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{reason} (raise `ulimit -n`)" if error.errno == errno.EMFILE else reason


def cache_folder() -> Path:
    """Return the folder for what can be made again: `recmas` in the user's cache folder.

    Raises:
        RuntimeError: For a user without a home.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "recmas"


def open_regular(path: Path, *, file: str) -> BufferedReader:
    """Open a regular file for reading in binary mode; messages name it `file`.

    Raises:
        RecmasError: RM401 if it is missing, unreadable or anything but a regular file.
    """
    hint = "Copy or build the bundle again."
    try:
        # Opening a pipe or a device without O_NONBLOCK could wait for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, ValueError):  # no name of a file holds NUL
        raise fail("RM401", "the file is missing", file=file, hint=hint) from None
    except OSError as error:
        raise fail(
            "RM401", f"the file cannot be read: {reason_of(error)}", file=file, hint=hint
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise fail("RM401", "this is not a regular file", file=file, hint=hint)
    return os.fdopen(descriptor, "rb")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 digest of a regular file, hexadecimal.

    Raises:
        RecmasError: RM401 if it cannot be read.
    """
    with open_regular(path, file=str(path)) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def exclusive(path: Path, *, code: str, what: str) -> Iterator[None]:
    """Lock an existing file or folder for the block, so that only one process writes there.

    The lock is advisory (`flock`) and ends with the process. File systems that know no locks are
    written without one.

    Args:
        code: The error's code if the lock is taken.
        what: What holds it then, such as "training".

    Raises:
        RecmasError: `code` if another process, or another call of this one, holds the lock.
        OSError: If the path cannot be opened.
    """
    import fcntl  # not on Windows, where bundles are read all the same

    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            hint = "Wait for it, or choose another place."
            raise fail(code, f"another {what} writes here", file=str(path), hint=hint) from None
        except OSError as error:
            if error.errno not in _KNOWS_NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Lock a file for the block; it is made if need be, and who holds the lock is waited for.

    The lock is advisory and ends with the process. File systems that know no locks do without one.

    Args:
        wait: False to refuse a file that is locked, or is not there.

    Raises:
        OSError: If the file cannot be opened, or another holds the lock and `wait` is False.
    """
    import fcntl  # not on Windows

    flags = os.O_RDWR | os.O_CREAT if wait else os.O_RDWR
    descriptor = os.open(path, flags, 0o644)
    try:
        if wait:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[BufferedWriter]:
    """Give a file to write; if the block succeeds, it takes the place of what is at `path`.

    It is written beside, synced to disk and renamed, and the folder is synced: whoever looks, also
    after a power cut, finds the old file or all of the new one.

    Raises:
        OSError: If it cannot be written; what was there is untouched.
    """
    staged = path.with_name(f".writing-{secrets.token_hex(4)}")
    try:
        with staged.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file as `whole_file` does; text is written as UTF-8.

    Raises:
        OSError: If it cannot be written; what was there is untouched.
    """
    with whole_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last over a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target`; it is gone afterwards unless moved into place.

    Raises:
        OSError: If it cannot be made.
    """
    while True:
        folder = _beside(target, _BUILDING)
        folder.mkdir()
        try:
            with _lock(folder) as is_ours:
                # Another build may take a folder for dead before it is locked: then try again.
                if is_ours and folder.is_dir():
                    yield folder
                    return
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def move_into_place(folder: Path, target: Path) -> bool:
    """Rename a staged folder to its place; what is there is renamed first and removed last.

    Returns:
        False, with nothing changed, if another build is replacing what is there.

    Raises:
        OSError: If it cannot be renamed; what was there is there again.
    """
    if not target.exists() or not any(target.iterdir()):
        folder.rename(target)  # onto an empty folder is allowed
        return True
    with _lock(target) as is_ours:  # so that no other build takes the old folder for a dead build's
        if not is_ours:
            return False
        replaced = _beside(target, _REPLACED)
        target.rename(replaced)
        try:
            folder.rename(target)
        except BaseException:
            replaced.rename(target)
            raise
        try:
            shutil.rmtree(replaced, ignore_errors=True)
        finally:  # half of it would stay where the user stops the program meanwhile
            shutil.rmtree(replaced, ignore_errors=True)
    return True


def check_free(place: Path, names: Sequence[str], *, force: bool) -> None:
    """Refuse to write over files named relative to a folder, unless the user wants that.

    With `force` existing files may be replaced; folders of their names may not.

    Raises:
        RecmasError: RM302 if something already exists there.
    """
    found = [n for n in names if os.path.lexists(place / n)]
    taken = [n for n in found if not force or (place / n).is_dir()]
    if not taken:
        return
    listed = ", ".join(taken[:_SHOWN_NAMES])
    more = f" and {len(taken) - _SHOWN_NAMES} more" if len(taken) > _SHOWN_NAMES else ""
    verb = "exists" if len(taken) == 1 else "exist"
    hint = "Choose another --out." if force else "Choose another --out or pass --force."
    raise fail("RM302", f"{listed}{more} {verb} already", file=str(place), hint=hint)


@contextmanager
def placed_together(place: Path, names: Sequence[str]) -> Iterator[Path]:
    """Give a folder to write files in; move them to `place`, made if need be, if the body succeeds.

    The last one of `names` is moved last: where it is, all are.

    Raises:
        RecmasError: RM303 if the disk is full or not writable.
    """
    try:
        above = next(path for path in (place, *place.absolute().parents) if path.exists())
        staging = Path(tempfile.mkdtemp(prefix=".recmas-", dir=above))
        try:
            for name in names:
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
            yield staging
            for name in names:
                (place / name).parent.mkdir(parents=True, exist_ok=True)
            for name in names:
                (staging / name).replace(place / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise fail(
            "RM303",
            f"cannot write: {error.strerror or error}",
            file=str(error.filename or place),
            hint="Choose another --out or make room.",
        ) from error


def clear_away_dead_builds(folder: Path, names: str = "*") -> None:
    """Remove what killed builds left in a folder, and undo replacements cut off in the middle.

    The names of the builds' targets match the pattern `names`.
    """
    for what in (_REPLACED, _BUILDING):
        for left in sorted(folder.glob(f".{names}.{what}-*")):
            target = left.with_name(left.name[1:].rpartition(f".{what}-")[0])
            with _lock(left) as is_ours:
                if is_ours and what == _REPLACED and not target.exists():
                    left.rename(target)
                elif is_ours:
                    shutil.rmtree(left, ignore_errors=True)


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}-{secrets.token_hex(4)}")


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Lock a folder for the block; give False if it is gone or locked by another build.

    Some network file systems lock no folders at all: that is an OSError.
    """
    import fcntl  # not on Windows, where bundles are read all the same

    is_ours = False
    with ExitStack() as stack:
        with suppress(FileNotFoundError, BlockingIOError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = True
        yield is_ours


def refuse_one_file(places: Mapping[str, str | int | None], *, hint: str) -> None:
    """Refuse a file that is named twice: what is written would destroy what is read.

    Args:
        places: Paths or descriptors by the options that name them; None for those not given.

    Raises:
        RecmasError: RM506.
    """
    seen: dict[tuple[int, int] | str, str] = {}
    for option, place in places.items():
        key = None if place is None else _identity(place)
        if key is not None and key in seen:
            raise fail("RM506", f"{seen[key]} and {option} are the same file", hint=hint)
        if key is not None:
            seen[key] = option


def _identity(place: str | int) -> tuple[int, int] | str | None:
    """Return what tells a regular file, by path or descriptor, from others; None for other things.

    A file that is not there yet is told by its path.
    """
    try:
        found = os.fstat(place) if isinstance(place, int) else Path(place).stat()
    except OSError:
        return os.path.realpath(place) if isinstance(place, str) else None
    except ValueError:  # NUL in a name
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None
