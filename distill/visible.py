"""Model text made safe to look at: what a terminal would obey or an eye would miss is spelled out."""

import re

# C0 but for newline and tab, DEL, C1, line separators, marks that reorder text, and lone surrogates.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    """`text` with control characters, reordering marks and lone surrogates as <U+001B> and the like."""
    return _UNSAFE.sub(lambda found: f"<U+{ord(found.group()):04X}>", str(text))
