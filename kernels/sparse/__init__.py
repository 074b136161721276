"""Vertical-slash sparse attention: selection, and attention over what was selected."""

from .portable import attention, visible_keys
from .selection import FORCED_VERTICALS, HeadBudget, Selection, select

__all__ = [
    "FORCED_VERTICALS",
    "HeadBudget",
    "Selection",
    "attention",
    "select",
    "visible_keys",
]
