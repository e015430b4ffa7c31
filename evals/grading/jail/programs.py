"""How a program runs once the doors are closed: as a script, as functions that others call, or as the tests that call.

'serve' and 'check' are two sandboxes joined by a socket. The program's side holds the program and sees the
arguments of calls, nothing else; the tests' side holds the tests, and no code of the program ever runs there. So
the program can neither read an expected value, nor end the tests, nor replace what judges it.
"""

import ast
import builtins
import collections
import io
import json
import math
import os
import socket
import sys
import types
from typing import Any

import wire  # type: ignore[import-not-found]

sys.setrecursionlimit(10_000)
_PLAIN_ERRORS = {
    name: error
    for name, error in vars(builtins).items()
    if isinstance(error, type) and issubclass(error, Exception) and not issubclass(error, Warning)
}


def run(mode: str, source: str, control: socket.socket, peer: int) -> None:
    """Never returns for 'serve' and 'check'; a script ends as scripts do. `peer`: the descriptor of the other side."""
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # what the `site` module would add
    if mode == "check":
        _check(json.loads(source), control, peer)
        os._exit(0)
    control.close()
    if mode == "serve":
        _serve(source, wire.Line(socket.socket(fileno=peer)))
    else:
        sys.argv = ["program.py"]
        _module(source)


def _module(source: str) -> dict[str, Any]:
    module = types.ModuleType("__main__")
    module.__file__ = "program.py"
    sys.modules["__main__"] = module
    exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _serve(source: str, line: wire.Line) -> None:
    objects: list[Any] = []

    def refer(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def answer(request: dict[str, Any]) -> Any:
        target = objects[request["of"]]
        if request["do"] == "get":
            return {"value": wire.encode(getattr(target, request["name"]), refer)}
        if request["do"] == "set":
            setattr(target, request["name"], wire.decode(request["value"], lambda n, _: objects[n]))
            return {"value": None}
        if request["do"] == "list":
            return {"value": wire.encode(list(target), refer)}
        args, kwargs = wire.decode([request["args"], request["kwargs"]], lambda n, _: objects[n])
        value = wire.encode(target(*args, **kwargs), refer)
        after = [wire.encode(a, refer) if isinstance(a, (list, dict, set)) else None for a in args]
        changed = [[n, a] for n, a in enumerate(after) if a is not None and a != request["args"][n]]
        return {"value": value, "changed": changed}

    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    try:
        names = _module(source)
        names = {name: value for name, value in names.items() if not name.startswith("__")}
        modules = {n: v.__name__ for n, v in names.items() if isinstance(v, types.ModuleType)}
        values = {n: wire.encode(v, refer) for n, v in names.items() if n not in modules}
        line.send({"values": values, "modules": modules})
    except BaseException as error:
        line.send({"error": type(error).__name__, "message": str(error)[:200]})
        os._exit(1)
    while True:
        try:
            request = line.receive()
        except EOFError:
            os._exit(0)
        try:
            reply = answer(request)
        except BaseException as error:  # SystemExit too: the tests go on and see an error
            reply = {"error": type(error).__name__, "message": str(error)[:200]}
        line.send(reply)


# Modules that a test may use because the program imports them.
_MODULES = {
    "bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools",
    "json", "math", "operator", "random", "re", "statistics", "string", "typing",
}  # fmt: skip


# Tests that have no other statements pass whatever the program does.
_DO_NOTHING = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Pass)


class ProgramError(Exception):
    """An exception of a class that is not Python's own, or the end of the program."""


class NotPlainData(BaseException):
    """The tests do with an object of the program what cannot be judged from here. No `except Exception` hides it."""


class _Remote:
    """An object in the program's process. Never equal to anything: its own __eq__ is the program's word."""

    def __init__(self, line: wire.Line, number: int, name: str) -> None:
        vars(self).update(_line=line, _number=number, _name=name)

    def _ask(self, request: dict[str, Any]) -> Any:
        try:
            self._line.send(request | {"of": self._number})
            return self._line.receive()
        except (OSError, EOFError):
            raise ProgramError("the program ended") from None
        except ValueError as error:
            raise ProgramError(str(error)) from None

    def _do(self, request: dict[str, Any]) -> Any:
        reply = self._ask(request)
        if not isinstance(reply, dict) or not ("value" in reply or "error" in reply):
            raise ProgramError("the program broke off")
        if "error" in reply:
            raise _PLAIN_ERRORS.get(reply["error"], ProgramError)(str(reply.get("message"))[:200])
        return reply

    def _value(self, encoded: Any) -> Any:
        try:
            return wire.decode(encoded, lambda number, name: _Remote(self._line, number, name))
        except (ValueError, TypeError, RecursionError, ArithmeticError) as error:
            raise ProgramError(f"no plain data: {error}") from None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def refuse(value: Any) -> int:
            if isinstance(value, _Remote):
                return value._number
            raise NotPlainData(f"the tests pass a {type(value).__name__} to the program")

        request = {"do": "call", "args": [wire.encode(a, refuse) for a in args]}
        reply = self._do(request | {"kwargs": wire.encode(kwargs, refuse)})
        changed = reply.get("changed")
        for change in changed if isinstance(changed, list) else []:
            place, new = change
            target, value = args[place], self._value(new)
            if isinstance(target, list) and isinstance(value, list):
                target[:] = value
            elif isinstance(target, (dict, set)) and type(value) is type(target):
                target.clear()
                target.update(value)
        return self._value(reply["value"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._value(self._do({"do": "get", "name": name})["value"])

    def __setattr__(self, name: str, value: Any) -> None:
        encoded = wire.encode(value, lambda v: v._number)
        self._do({"do": "set", "name": name, "value": encoded})

    def __iter__(self) -> Any:
        items = self._value(self._do({"do": "list"})["value"])
        if not isinstance(items, list):
            raise ProgramError("the program broke off")
        return iter(items)

    def _refuse(self, *_: Any) -> Any:
        raise NotPlainData(f"the tests look into a {self._name} of the program's own")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __contains__ = __getitem__ = _refuse
    __hash__ = _refuse


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())[:120]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _same(result: Any, expected: Any) -> bool:
    """Equality with JSON's types: tuples are lists, whole floats are ints, dict keys may have become strings."""
    if isinstance(result, _Remote):
        return result._refuse()
    if isinstance(result, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(result) == len(expected) and all(map(_same, result, expected))
    if isinstance(result, dict) and isinstance(expected, dict):
        plain = {str(k): v for k, v in result.items()}
        other = {str(k): v for k, v in expected.items()}
        return plain.keys() == other.keys() and all(_same(plain[k], other[k]) for k in plain)
    if isinstance(result, (set, frozenset)) and isinstance(expected, list):
        return len(result) == len(expected) and all(any(_same(r, e) for r in result) for e in expected)
    if isinstance(result, bool) or isinstance(expected, bool):
        return result is expected
    if isinstance(result, float) or isinstance(expected, float):
        number = isinstance(result, (int, float)) and isinstance(expected, (int, float))
        return number and (result == expected or abs(result - expected) <= 1e-9 * max(1.0, abs(expected)))
    return type(result) is type(expected) and result == expected


def _check(tests: dict[str, Any], control: socket.socket, peer: int) -> None:
    """Run the tests against the program at the other end of `peer`; one verdict to `control`."""
    sys.stdout = sys.stderr = io.StringIO()
    try:
        verdict, reason = _verdict(tests, wire.Line(socket.socket(fileno=peer)))
    except NotPlainData as error:
        verdict, reason = "unverifiable", str(error)
    except Exception as error:  # what the program sent is no message of ours, or too much of it
        verdict, reason = "wrong", f"the program broke off: {type(error).__name__}"
    except SystemExit:
        verdict, reason = "unverifiable", "the tests end by themselves"
    wire.Line(control).send([verdict, reason])


def _names(code: list[str], program: dict[str, Any]) -> tuple[set[str], dict[str, Any]]:
    """What the tests take from the program, and what from the library though the program has it too.

    No module, and the name of a built-in, or of something in `math` or `collections`, only if they ask for nothing
    else. (A problem may ask for a function called `sum` or `gcd`; a program that defines `len` or `isclose` besides
    must not judge itself.)
    """
    used = {n.id for test in code for n in ast.walk(ast.parse(test)) if isinstance(n, ast.Name)}
    library = {n: v for m in (math, collections) for n, v in vars(m).items() if not n.startswith("_")}
    plain = {n for n in program if not hasattr(builtins, n) and n not in _MODULES and n not in library}
    if plain & used:
        return plain, {name: library[name] for name in used & program.keys() & library.keys()}
    return plain | (used & program.keys() - _MODULES), {}


def _verdict(tests: dict[str, Any], line: wire.Line) -> tuple[str, str]:
    try:
        hello = line.receive()
        if "error" in hello:
            return "wrong", f"the program fails: {hello['error']}: {' '.join(str(hello['message']).split())[:120]}"
        root = _Remote(line, -1, "module")
        program = {str(name): root._value(value) for name, value in hello["values"].items()}
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, ProgramError):
        return "wrong", "the program ended before the tests"
    function = tests.get("function")
    if function is not None and function not in program and "Solution" in program:
        try:
            program[function] = getattr(program["Solution"](), function)
        except Exception as error:
            return "wrong", f"no function {function}: {_short(error)}"
    if function is not None and not isinstance(program.get(function), _Remote):
        return "wrong", f"the program defines no function {function}"
    for number, call in enumerate(calls := tests.get("calls", []), start=1):
        try:
            if not _same(program[str(function)](*call.get("args", []), **call.get("kwargs", {})), call["expected"]):
                return "wrong", f"test {number} of {len(calls)}: another value"
        except Exception as error:
            return "wrong", f"test {number} of {len(calls)}: {_short(error)}"
    if calls and not tests["code"]:
        return "correct", f"passed {len(calls)} tests"
    try:
        taken, helpers = _names(tests["code"], program)
    except (SyntaxError, ValueError) as error:
        return "unverifiable", f"a test is no Python: {_short(error)}"
    scope: dict[str, Any] = {"__name__": "tests"}
    for name, module in hello["modules"].items():
        # A test may use what the program imports; the module comes from here, not from the program.
        if module in _MODULES and (name == module or name not in _MODULES):
            scope[name] = __import__(module)
    scope |= {name: program[name] for name in taken} | helpers
    try:
        exec(compile(tests.get("setup", ""), "setup.py", "exec", dont_inherit=True), scope)
    except Exception as error:
        return "unverifiable", f"the tests' setup fails: {_short(error)}"
    checked = bool(calls)
    for number, test in enumerate(tests["code"], start=1):
        try:
            exec(compile(test, "test.py", "exec", dont_inherit=True), scope)
            check = scope.pop("check", None) if function is not None else None
            if callable(check) and not isinstance(check, _Remote):
                check(program[str(function)])
                checked = True
            checked = checked or any(not isinstance(statement, _DO_NOTHING) for statement in ast.parse(test).body)
        except Exception as error:
            return "wrong", f"test {number} of {len(tests['code'])}: {_short(error)}"
    if not checked:
        return "unverifiable", "the reference checks nothing: it only defines things"
    return "correct", f"passed {len(calls) + len(tests['code'])} tests"
