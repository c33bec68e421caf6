"""The layout of packed weights in numbers alone: where things lie is worked out before PyTorch is there.

    panel_bytes(8, 64, 576)          # bytes of one panel of 16 outputs with 576 inputs at 8 bits

packed.py says what lies in a panel. Needs nothing but Python.
"""

from __future__ import annotations

PANEL = 16  # outputs
GROUPS = {32: 4, 16: 4, 8: 64, 4: 32}  # inputs that share a scale (of floats: that share a step of the loop)
ALIGN = 128  # bytes, of weights in memory


def panel_bytes(bits: int, group: int, inputs: int) -> int:
    """Bytes of a panel: its integers and, for every two groups, their scales; or its floats."""
    groups = -(-inputs // group)
    scales = 0 if bits >= 16 else -(-groups // 2) * 4 * PANEL
    return groups * group * PANEL * bits // 8 + scales
