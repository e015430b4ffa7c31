"""teacher.kind 'endpoint': one or several servers, as the trace stage sees a teacher."""

import asyncio
from collections.abc import Iterator, Mapping

from distill.endpoints.dial import allow_connections
from distill.endpoints.endpoint import Endpoint
from distill.endpoints.requests import bodies
from distill.endpoints.work import Work
from distill.errors import UserError
from distill.recipe_teacher import Teacher
from distill.records import Asks, EndpointState, Reply


class EndpointTeacher:
    """See distill.records.TeacherBackend."""

    def __init__(self, teacher: Teacher, identity: str) -> None:
        self.id = identity
        self._teacher = teacher
        urls = [settings.url for settings in teacher.endpoints]
        self._endpoints: list[Endpoint] = []
        for number, settings in enumerate(teacher.endpoints):
            name = settings.url if urls.count(settings.url) == 1 else f"{settings.url} {settings.model or number}"
            if name in self.states():
                raise UserError(f"teacher.endpoints.{number}: {name} is listed twice; raise its concurrency or weight")
            self._endpoints.append(Endpoint(teacher, settings, f"teacher.endpoints.{number}", name))
        make = bodies(teacher)
        for endpoint in self._endpoints:
            endpoint.bodies = make(endpoint.model, endpoint.address)

    def states(self) -> Mapping[str, EndpointState]:
        return {endpoint.name: endpoint.state for endpoint in self._endpoints}

    def generate(self, asks: Asks) -> Iterator[list[Reply]]:
        """See TeacherBackend. Raises UserError and ConnectionError as distill.endpoints.work says."""
        allow_connections(sum(endpoint.settings.concurrency for endpoint in self._endpoints))
        loop = asyncio.new_event_loop()
        work = Work(self._teacher, self._endpoints, asks, loop)
        try:
            while not work.over:
                batch = loop.run_until_complete(work.step())
                yield batch
                if work.error is not None:
                    raise work.error
        finally:
            loop.run_until_complete(work.close())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
