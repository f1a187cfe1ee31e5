"""The process that runs a model's program. Started as a script by `randopt.sandbox`, in an empty environment.

It reads one request (JSON) from its standard input, takes its limits, says {"ready": true}, and then one line of JSON
per question. It imports nothing of this project. Whatever the program does to this process, it can only change what is
said, and every line is taken for what it is: a claim of the program's. The request therefore holds nothing that the
program must not know.
"""

import ast
import ctypes
import json
import os
import resource
import sys
import types

MAX_NODES = 100_000  # of one value
MAX_DEPTH = 50
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38  # linux/prctl.h
SECCOMP_MODE_FILTER = 2


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    replies = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    restrict(request["limits"], bytes.fromhex(request["filter"]))
    say(replies, {"ready": True})
    if request["statements"]:
        for statement in request["statements"]:
            say(replies, reply(lambda statement=statement: run_test(request, statement)))
    else:
        say(replies, {"form": form(request["program"])})  # before any of the program has run
        names: list[dict] = []
        loaded = reply(lambda: names.append(load(request)))
        for expression in request["expressions"]:
            say(replies, reply(lambda e=expression: evaluate(e, names[0])) if names else loaded)
    os._exit(0)  # no exit handlers and no waiting for threads


def restrict(limits: dict, instructions: bytes) -> None:
    """Take limits that cannot be taken back, then the filter of system calls."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    libc = ctypes.CDLL(None, use_errno=True)

    class Filter(ctypes.Structure):  # struct sock_fprog
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

    filter_ = Filter(len(instructions) // 8, instructions)
    for arguments in (
        (PR_SET_PDEATHSIG, 9, 0, 0, 0),
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filter_), 0, 0),
    ):
        if libc.prctl(*arguments):
            sys.exit("the kernel refuses a filter of system calls: " + os.strerror(ctypes.get_errno()))


def say(replies: int, line: dict) -> None:
    text = json.dumps(line).encode() + b"\n"
    while text:
        text = text[os.write(replies, text) :]


def reply(question) -> dict:
    """{"value": its value in the form of `tree`}, or {"raised": the exception's name}."""
    try:
        return {"value": tree(question())}
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: a program that gives up has no value
        return {"raised": type(error).__name__}


def load(request: dict) -> dict:
    """The names that the program defines, and those of the set-up after it, which may use the program's."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # dataclasses look their module up
    module.__dict__.update((name, built(value)) for name, value in request["names"].items())
    for part in ("program", "setup"):
        exec(compile(request[part], f"<{part}>", "exec"), module.__dict__)
    return module.__dict__


def evaluate(expression: str, namespace: dict):
    return eval(compile(expression, "<test>", "eval"), namespace)


def run_test(request: dict, statement: str) -> None:
    exec(compile(statement, "<test>", "exec"), load(request))


def form(program: str) -> str | None:
    """The program's syntax tree without layout, comments and docstrings; None when it is no program."""
    try:
        parsed = ast.parse(program)
        for node in ast.walk(parsed):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                value = body[0].value
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    del body[0]
        return ast.dump(parsed)
    except Exception:
        return None


def tree(value, budget=None, depth=0) -> list:
    """A value as nested lists [kind, content] of the kinds that `built` makes values of; else ["other", type].

    Subclasses count as what they are made of (a Counter is a dict, a named tuple a tuple), read by the base's own
    methods: comparing is not the program's business.
    """
    budget = [MAX_NODES] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0 or depth > MAX_DEPTH:
        raise OverflowError("a value too large to compare")

    def parts(values) -> list:
        return [tree(part, budget, depth + 1) for part in values]

    kind = type(value)
    if value is None:
        return ["none", None]
    if isinstance(value, bool):
        return ["bool", value]
    if isinstance(value, int):
        return ["int", hex(int.__index__(value))]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", [float.hex(value.real), float.hex(value.imag)]]
    if isinstance(value, str):
        return ["str", str.__str__(value)]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, list):
        return ["list", parts(list.__iter__(value))]
    if isinstance(value, tuple):
        return ["tuple", parts(tuple.__iter__(value))]
    if isinstance(value, (set, frozenset, type({}.keys()), type({}.items()))):
        return ["set", parts(value)]
    if isinstance(value, dict):
        return ["dict", [parts(pair) for pair in dict.items(value)]]
    if kind.__module__ == "collections" and kind.__name__ == "deque":
        return ["deque", parts(value)]
    if kind.__module__ in ("fractions", "decimal") and hasattr(kind, "as_integer_ratio"):
        return ["ratio", [hex(part) for part in value.as_integer_ratio()]]
    return ["other", kind.__name__]


def built(value: list):
    """The value of a `tree`."""
    kind, content = value
    if kind in ("none", "bool", "str"):
        return content
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float.fromhex(content)
    if kind == "complex":
        return complex(*map(float.fromhex, content))
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dict":
        return {built(key): built(item) for key, item in content}
    if kind == "ratio":
        from fractions import Fraction

        return Fraction(*(int(part, 16) for part in content))
    if kind == "deque":
        from collections import deque

        return deque(map(built, content))
    return {"list": list, "tuple": tuple, "set": set}[kind](map(built, content))


if __name__ == "__main__":
    main()
