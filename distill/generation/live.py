"""How generation stands, in a few words: below the bar on a terminal, on the plain line elsewhere."""

from collections.abc import Mapping
from typing import NamedTuple

from distill.records import EndpointState

_WIDTH = 71  # of 80 columns, what Progress leaves beside its indent


class Standing(NamedTuple):
    prompt_rate: float  # tokens a second, over a recent window
    completion_rate: float
    right: int  # of the traces verified on the way
    wrong: int
    cost: float  # over all starts
    cost_at_the_end: float
    endpoints: Mapping[str, EndpointState]
    failed: int  # samples that this run's starts gave up


def lines(standing: Standing, *, brief: bool) -> list[str]:
    """What there is to say, nothing of what is zero, in lines that fit below a bar on 80 columns.

    Of several endpoints each has a line; with `brief` all are words on one.
    """
    said = [f"in {short(standing.prompt_rate)}, out {short(standing.completion_rate)} tokens/s"]
    if standing.right or standing.wrong:
        said.append(f"{standing.right}/{standing.right + standing.wrong} right")
    if standing.failed:
        said.append(f"{standing.failed} failed")
    if standing.cost:
        said.append(f"cost {standing.cost:.2f}, {standing.cost_at_the_end:.2f} at the end")
    if len(standing.endpoints) <= 1:
        return _filled(said + [words for state in standing.endpoints.values() for words in _endpoint(state)])
    states = {host(name): _endpoint(state) for name, state in standing.endpoints.items()}
    if brief:
        return [*said, ", ".join(f"{name} {' '.join(words)}" for name, words in states.items())]
    width = max(map(len, states))
    return [*_filled(said), *(f"{name:<{width}}  {'  '.join(words)}" for name, words in states.items())]


def _filled(parts: list[str]) -> list[str]:
    """The parts on as few lines as hold them."""
    filled: list[str] = []
    for part in parts:
        if filled and len(filled[-1]) + 2 + len(part) <= _WIDTH:
            filled[-1] += f"  {part}"
        else:
            filled.append(part)
    return filled


def _endpoint(state: EndpointState) -> list[str]:
    at_work = f"{state.in_flight}/{state.limit} in flight" if state.up else f"DOWN ({state.in_flight} in flight)"
    errors = sorted(state.errors.items(), key=lambda item: -item[1])
    return [at_work, *(f"{kind} {count}" for kind, count in errors if count)]


def host(endpoint: str) -> str:
    """'gpu-1:8000' of 'http://gpu-1:8000/v1'; a name that is no URL stays."""
    return endpoint.split("://", 1)[-1].removesuffix("/v1")


def short(number: float) -> str:
    """'12', '4.5k', '1.2M'."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
