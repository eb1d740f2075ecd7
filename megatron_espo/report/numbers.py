"""Numbers for people."""

import math
from typing import Any


def number(value: Any, digits: int = 3) -> str:
    """A number for a table: so many significant digits, no exponent for everyday sizes, a dash for none."""
    if not isinstance(value, int | float) or math.isnan(value):
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, min(decimals, digits))}f}"
