"""letter_counting: each word of the text, its letters in order, and a running count after every letter."""

from __future__ import annotations

import re

from distill.worked.steps import Worked


def solve(problem: str) -> Worked:
    """`... letter "e" ... text: "me see"?` -> `me: m0 e1`, `see: s1 e2 e3`."""
    match = re.search(r'letter "(.)" appear in the text: "(.*)"\?', problem)
    assert match, f"not a question about a letter in a text: {problem!r}"
    letter, text = match[1], match[2]
    count, lines = 0, []
    for word in text.split():
        seen = []
        for character in word.lower():
            count += character == letter
            seen.append(f"{character}{count}")
        lines.append(f"{word}: {' '.join(seen)}")
    return Worked(lines, str(count))
