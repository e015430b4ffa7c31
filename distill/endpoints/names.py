"""Which names a server may give the model that was asked for.

A reply says which model made it. Another name than the one asked for may be an alias (vLLM answers with the first of
its served names, llama.cpp with a path, OpenAI with the dated name), or another model, of a proxy that falls back in
silence; its samples would be lies. So another name is taken for an alias only if

- it is the name with a date or version behind it, or with other folders before it; or
- GET /models knows one model only, whatever it calls it, or lists both names with the same `root`; or
- the server said this name in its first three replies, and never the one that was asked for.

Any other reply is the error "wrong_model", and asked again.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

_AGREEING = 3
# "-distill-qwen-7b" is another model.
_VERSION = re.compile(r"[-@:](\d[\d.-]*|v\d[\d.]*|latest)|\.gguf")


class Names:
    def __init__(self, asked: str) -> None:
        self._asked = asked
        self._known = {asked}
        self._others: Counter[str] = Counter()
        self._exact = False  # a reply named the model as we do
        self.listed = False  # GET /models has been looked at

    def knows(self, said: str | None) -> bool:
        return said is None or said in self._known or _same(said, self._asked)

    def accepts(self, said: str | None) -> bool:
        """Whether a reply that names its model so (None: not at all) counts. To be called once a reply."""
        self._exact = self._exact or said == self._asked
        if said is None or self.knows(said):
            return True
        if len(self._others) < _AGREEING:  # else they agree on nothing
            self._others[said] += 1
        if not self._exact and len(self._others) == 1 and self._others[said] >= _AGREEING:
            self._known.add(said)
            return True
        return False

    def learn(self, entries: Sequence[dict[str, Any]]) -> None:
        """From what GET /models lists."""
        self.listed = True
        if len(entries) == 1:
            self._known |= {str(entries[0].get(name)) for name in ("id", "root")}
        roots = {entry.get("root") for entry in entries if entry.get("id") == self._asked} - {None}
        self._known |= {str(entry.get("id")) for entry in entries if entry.get("root") in roots}


def _same(said: str, asked: str) -> bool:
    said, asked = (name.rstrip("/").rpartition("/")[2].casefold() for name in (said, asked))
    return said == asked or (said.startswith(asked) and _VERSION.fullmatch(said[len(asked) :]) is not None)
