"""teacher.kind 'endpoint': one or many OpenAI-compatible servers as the teacher. Importing this costs nothing."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.files import sha256_json
from distill.shipped import resolve_model

if TYPE_CHECKING:
    from distill.recipe_teacher import Teacher
    from distill.records import TeacherBackend


def identity(teacher: "Teacher") -> dict[str, Any]:
    """What the manifest says of the teacher. A sample belongs to the model, whichever server made it: the id is of
    the model's name, its revision and how it is asked, not of URLs, keys, prices or patience."""
    found = resolve_model(teacher.model)
    name = found.resolve().name if isinstance(found, Path) else found
    asked = [name, teacher.revision, teacher.api, teacher.think, teacher.body]
    if teacher.api == "completions" and teacher.tokenizer is not None:
        asked.append(teacher.tokenizer)
    return {"id": f"{name}@{sha256_json(asked)[:12]}", "model": teacher.model, "kind": teacher.kind, "licence": None}


def open_endpoints(teacher: "Teacher") -> "TeacherBackend":
    """The servers, ready to be asked; none is contacted yet. Raises UserError for a missing key, a URL that is none,
    or a tokenizer that does not load."""
    from distill.endpoints.client import EndpointTeacher

    return EndpointTeacher(teacher, identity(teacher)["id"])
