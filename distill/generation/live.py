"""How generation stands, in a few words: below the bar on a terminal, on the plain line elsewhere."""

from collections.abc import Mapping
from typing import NamedTuple

from distill.records import EndpointState


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
    """What there is to say; nothing of what is zero. Each endpoint has a line, or with `brief` a few words of one."""
    said = [f"in {short(standing.prompt_rate)}, out {short(standing.completion_rate)} tokens/s"]
    if standing.right or standing.wrong:
        said.append(f"{standing.right}/{standing.right + standing.wrong} right")
    if standing.failed:
        said.append(f"{standing.failed} failed")
    if standing.cost:
        said.append(f"cost {standing.cost:.2f}, {standing.cost_at_the_end:.2f} at the end")
    if len(standing.endpoints) > 1 and not brief:
        width = max(len(host(name)) for name in standing.endpoints)
        each = [f"{host(name):<{width}}  {_endpoint(state)}" for name, state in standing.endpoints.items()]
        return ["  ".join(said), *each]
    several = len(standing.endpoints) > 1
    each = [f"{host(name)} " * several + _endpoint(state) for name, state in standing.endpoints.items()]
    return ["  ".join(said), *([", ".join(each)] if each else [])]


def _endpoint(state: EndpointState) -> str:
    at_work = f"{state.in_flight}/{state.limit} in flight" if state.up else f"DOWN ({state.in_flight} in flight)"
    errors = sorted(state.errors.items(), key=lambda item: -item[1])
    return "  ".join([at_work, *(f"{kind} {count}" for kind, count in errors if count)])


def host(endpoint: str) -> str:
    """'gpu-1:8000' of 'http://gpu-1:8000/v1'; a name that is no URL stays."""
    return endpoint.split("://", 1)[-1].removesuffix("/v1")


def short(number: float) -> str:
    """'12', '4.5k', '1.2M'."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
