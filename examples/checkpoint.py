"""Checkpoints that are either the whole truth or refused.

A file is the SHA-256 digest of the rest, then what ``torch.save`` writes. The digest is there
because ``torch.load`` does not check the data: a flipped bit would load as a different weight.
"""

import hashlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from config import Stop

_DIGEST_BYTES = hashlib.sha256().digest_size


def save(state: dict[str, Any], path: Path) -> None:
    """Write atomically: whenever the process dies, ``path`` holds the old or the new state."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(hashlib.sha256(payload).digest() + payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(directory: Path) -> None:
    """Raise ``OSError`` now if ``save`` could not write to ``directory`` later."""
    with tempfile.NamedTemporaryFile(dir=directory):
        pass


def load(path: Path, device: str) -> dict[str, Any]:
    """Read what ``save`` wrote; raises ``Stop`` if it is missing or not intact."""
    if not path.is_file():
        raise Stop(f"--resume: there is no checkpoint {path}", exit_code=2)
    content = path.read_bytes()
    digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        raise Stop(
            f"--resume: the checkpoint {path} is corrupted (its checksum does not match); "
            "start again without --resume",
            exit_code=2,
        )
    return torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
