r"""The child process: compares answers with math-verify, one JSON line in, one JSON line out.

Started by file path (not imported), so it holds nothing of the caller: no model, no environment beyond the module
path. Bounds itself twice: RLIMIT_AS for memory, and an alarm with the default action as a last resort, so that it
ends by itself even if the caller was killed while it was computing.
"""

import json
import os
import resource
import signal
import sys


def compare(answer: str, reference: str) -> tuple[str, str]:
    """(verdict, reason) of math-verify for one final answer against one reference."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    configs = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    def parsed(text: str) -> list:
        # In a box the whole answer is taken as one expression; bare, parse() would pick a part of it.
        boxed = parse("\\boxed{" + text + "}", configs, parsing_timeout=None)
        return boxed or parse(text, configs, parsing_timeout=None)

    gold = parsed(reference)
    if not gold:
        return "unverifiable", "the reference is not an expression that math-verify reads"
    mine = parsed(answer)
    if not mine:
        return "wrong", "the answer is not an expression that math-verify reads"
    if verify(gold, mine, timeout_seconds=None):
        return "correct", "equal by math-verify"
    return "wrong", "not equal by math-verify"


def main() -> None:
    """Serve requests {"answer", "reference", "seconds"} from stdin until it closes. argv[1]: bytes of address space."""
    reply = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not break the protocol
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compare("1+1", "2")  # import and warm up before the clock of a real item starts
    reply.write("ready\n")
    reply.flush()
    for line in sys.stdin:
        request = json.loads(line)
        signal.alarm(int(request["seconds"]) + 5)
        # math-verify catches what sympy raises; what is left ends this process, and the caller starts another.
        verdict, reason = compare(request["answer"], request["reference"])
        signal.alarm(0)
        reply.write(json.dumps([verdict, reason]) + "\n")
        reply.flush()


if __name__ == "__main__":
    main()
