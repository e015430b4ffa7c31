"""When are two problems the same, and which problems may nobody train on?

Both questions have one answer here, for the demo's problems, for the training corpora of every shipped
model and for a user's own files, so that "never seen in training" is a property of the text itself and
can be checked by anyone who holds it.
"""

import hashlib
import unicodedata

HELD_OUT_ONE_IN = 10


def normalise(text: str) -> str:
    """Text with the differences removed that do not make another problem: NFKC, case, blank space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    # Folding can leave text that is not NFKC (ß with a combining sign), hence again.
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def problem_hash(text: str) -> str:
    """Hex sha256 of the normalised text. Equal hashes mean the same problem, across files and runs."""
    return hashlib.sha256(normalise(text).encode("utf-8", "surrogatepass")).hexdigest()


def held_out(text: str) -> bool:
    """Whether a procedurally generated problem belongs to evaluation (a tenth of them) and not to training.

    Decided by the hash alone: generators draw with repetition from small spaces (there are 2,601 gcd
    problems of two numbers from 10 to 60), so different seeds alone would not keep the two sets apart.
    """
    return hash_held_out(problem_hash(text))


def hash_held_out(digest: str) -> bool:
    """`held_out`, for a text whose problem_hash is known already."""
    return int(digest[:8], 16) % HELD_OUT_ONE_IN == 0
