"""Checkpoints that are either the whole truth or refused.

A file is the SHA-256 digest of the rest, then what ``torch.save`` writes. The digest is there
because ``torch.load`` does not check the data: a flipped bit would load as a different weight.
The ones before ``checkpoint.pt`` are ``checkpoint.pt.1``, ``checkpoint.pt.2``, ...
"""

import hashlib
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from config import Stop

_DIGEST_BYTES = hashlib.sha256().digest_size


def save(state: dict[str, Any], path: Path, keep: int = 2) -> None:
    """Write atomically: whenever the process dies, the newest that is there is intact.

    Args:
        state: what ``load`` is to return.
        path: the file of the newest; that one before moves on to ``path.1``, and so on.
        keep: how many there are in the end at most.
    """
    payload = _serialised(state)
    _write(hashlib.sha256(payload).digest() + payload, path, keep)


def save_weights(weights: dict[str, Any], path: Path) -> None:
    """Write a ``state_dict`` for ``torch.load``, atomically."""
    _write(_serialised(weights), path, keep=1)


def check_writable(directory: Path) -> None:
    """Raise ``OSError`` now if ``save`` could not write to ``directory`` later."""
    with tempfile.NamedTemporaryFile(dir=directory):
        pass


def load(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Read what ``save`` wrote; raises ``Stop`` if it is missing or not intact."""
    if not path.is_file():
        raise Stop(f"--resume: there is no checkpoint {path}{_hint(path)}", exit_code=2)
    payload = _intact_payload(path)
    if payload is None:
        raise Stop(
            f"--resume: the checkpoint {path} is corrupted (its checksum does not match)"
            f"{_hint(path)}; start again without --resume",
            exit_code=2,
        )
    return _deserialised(payload, device)


def load_newest(path: Path) -> dict[str, Any] | None:
    """The newest intact state; None if nothing was ever saved.

    Corrupted ones that are newer are named in a warning, and set aside: the next ``save`` must not
    count them among those to keep. Raises ``Stop`` if none is intact.
    """
    corrupted: list[Path] = []
    for version in _versions(path):
        payload = _intact_payload(version)
        if payload is not None:
            for other in corrupted:
                _set_aside(other, used=version)
            return _deserialised(payload, "cpu")
        corrupted.append(version)
    if corrupted:
        names = ", ".join(map(str, corrupted))
        raise Stop(
            f"--resume auto: no checkpoint is intact (the checksum does not match): {names}; "
            "start again without --resume",
            exit_code=2,
        )
    return None


def remove_all(path: Path) -> None:
    """Remove the checkpoints of an earlier training, so that none passes for one of this."""
    for version in _versions(path):
        version.unlink()


def _serialised(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _deserialised(payload: bytes, device: str) -> dict[str, Any]:
    return torch.load(io.BytesIO(payload), map_location=device, weights_only=True)


def _write(content: bytes, path: Path, keep: int) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for number in range(keep - 1, 0, -1):
            if _version(path, number - 1).exists():
                os.replace(_version(path, number - 1), _version(path, number))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    """Make renames in it survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _intact_payload(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Stop(f"--resume: cannot read {path}: {error.strerror}", exit_code=2) from None
    digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return payload if hashlib.sha256(payload).digest() == digest else None


def _version(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number else path


def _versions(path: Path) -> list[Path]:
    """Those that are there, newest first. The newest but one can be the first: a process that is
    killed between the renames leaves no ``path``."""
    numbers = [file.name.removeprefix(f"{path.name}.") for file in path.parent.glob("*")]
    older = sorted(int(number) for number in numbers if number.isdigit())
    return [file for file in (path, *(_version(path, n) for n in older)) if file.is_file()]


def _set_aside(corrupted: Path, used: Path) -> None:
    aside = corrupted.with_name(corrupted.name + ".corrupted")
    os.replace(corrupted, aside)
    print(
        f"warning: the checkpoint {corrupted} is corrupted (its checksum does not match) and is "
        f"now {aside.name}; going on from {used}",
        file=sys.stderr,
    )


def _hint(path: Path) -> str:
    older = [version for version in _versions(path) if version != path]
    return f"; --resume auto tries the one before it, {older[0]}" if older else ""
