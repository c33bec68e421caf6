"""Memory in huge pages: it is zero, and what lies in ordinary ones takes no more than is touched."""

import sys
from pathlib import Path

import pytest

from octad.kernels.pages import anonymous


def resident() -> int:
    """Bytes of this process's own in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux says what is resident")
def test_a_few_bytes_in_ordinary_pages_take_a_few_pages() -> None:
    memory = [anonymous(8 << 20, 2 << 20) for _ in range(16)]
    before = resident()
    for piece in memory:
        piece[0], piece[1 << 20] = 1, 2
    assert resident() - before < 8 << 20  # 16 huge pages are 32 MiB
    for piece in memory:
        piece[5 << 20] = 3
        assert (piece[0], piece[1], piece[1 << 20], piece[5 << 20], piece[-1]) == (1, 0, 2, 3, 0)
    assert len(anonymous(4096, 2 << 20)) == 4096
