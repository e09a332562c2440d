"""Hashes of file content: of every byte, and of a sample that takes milliseconds for 140 GB.

The sample of a file is the SHA-256 over blocks of :data:`BLOCK` bytes. Their positions depend only on the positions and sizes of
the tensors and on the file's size, never on the content:

* a tensor of up to :data:`STRIDE` bytes has one block, in its middle; a tensor smaller than a block is read whole;
* a larger tensor has blocks at equal distances of at most :data:`STRIDE` bytes, from its first byte to its last;
* the last block of the file is read, too.

So every tensor that has bytes has a block: a tensor that was trained, merged or exchanged as a whole changes the sample. A
change of a few values outside the blocks does not; ``llama-export verify`` reads every byte.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from llama_export._system.files import open_regular

BLOCK = 4096
"""Bytes. Another value, or other positions, would need another key than ``sample_sha256`` in the manifest."""
STRIDE = 64 << 20
"""Bytes of a tensor per block."""
_READ = 8 << 20


def sample_blocks(regions: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Offset and length of each block, in the order in which they are hashed.

    Args:
        regions: offset and size of each tensor, in bytes; sorted by offset here.
        size: of the file, bytes.
    """
    blocks = []
    for offset, nbytes in sorted(regions):
        if not nbytes:
            continue
        length = min(BLOCK, nbytes)
        gaps, last = -(-nbytes // STRIDE), nbytes - length
        starts = [last // 2] if gaps == 1 else [index * last // gaps for index in range(gaps + 1)]
        blocks += [(offset + start, length) for start in starts]
    length = min(BLOCK, size)
    return [*blocks, (size - length, length)]


def sample_sha256(path: Path, regions: Iterable[tuple[int, int]]) -> str:
    """Hex digest of the sample of a regular file.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        handle = stream.fileno()
        blocks = sample_blocks(regions, os.fstat(handle).st_size)
        if hasattr(os, "posix_fadvise"):
            # The kernel fetches all blocks at once; without this each read waits for the disk, and reads ahead.
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
            for offset, length in blocks:
                os.posix_fadvise(handle, offset, length, os.POSIX_FADV_WILLNEED)
        for offset, length in blocks:
            digest.update(os.pread(handle, length, offset))
    return digest.hexdigest()


def sha256_of_file(path: Path, progress: Callable[[str, int, int], None] | None = None) -> str:
    """Hex digest of the content of a regular file.

    Args:
        path: the file.
        progress: receives the file's name, the bytes read and the bytes in all.

    Raises:
        OSError: it cannot be read.
    """
    with open_regular(path) as stream:
        if progress is None:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest, done, size = hashlib.sha256(), 0, os.fstat(stream.fileno()).st_size
        while block := stream.read(_READ):
            digest.update(block)
            done += len(block)
            progress(path.name, done, size)
        return digest.hexdigest()
