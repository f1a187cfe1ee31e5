"""How fast a shard of mathematics is scored: completions shaped like MATH's, on the cores of this process, as JSON.

200 items whose references have the mix of forms of MATH-500 (two thirds plain numbers; fractions, roots, polynomials,
tuples, intervals, sets, words), 50 candidates each. A third of the answers are right, in one of several spellings; the
others are wrong in the same form, mostly each in its own way, so that little is read twice. Workers start inside the
measured time.
"""

import json
import os
import random
import time

from randopt.tasks.scorers import math

CANDIDATES, ITEMS = 50, 200


def answers(form: int, a: int, b: int, c: int) -> list[str]:
    """Spellings of one answer of the given form, a number from 0 to 11 which stands for its frequency."""
    if form < 7:
        return [f"{a * b}", f"{a * b}.0", rf"{a * b} \text{{ cm}}", f"x = {a * b}", f"{a * b}"]
    return {
        7: [rf"\frac{{{a}}}{{{b}}}", f"{a}/{b}", rf"\dfrac{{{a}}}{{{b}}}"],
        8: [rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{b}}} \cdot {a}", rf"\frac{{{a * b}}}{{\sqrt{{{b}}}}}"],
        9: [f"{a}x^2 + {b}x - {c}", f"{b}x + {a}x^2 - {c}", f"y = {a}x^2 + {b}x - {c}"],
        10: [rf"\left( {a}, \frac{{\pi}}{{{b}}} \right)", rf"({a},\pi/{b})"],
        11: [f"{a}, -{b}", rf"\{{-{b}, {a}\}}", rf"{a} \text{{ and }} -{b}"],
    }[form]


def completions() -> list[tuple[str, str]]:
    """(response, reference); a response is about 1,500 characters of reasoning and a box, or a last line."""
    source = random.Random(1)
    made = []
    for item in range(ITEMS):
        right = tuple(source.randint(2, 60) for _ in range(3))
        reference = answers(item % 12, *right)[0]
        for _ in range(CANDIDATES):
            given = right if source.random() < 1 / 3 else tuple(source.randint(2, 60) for _ in range(3))
            answer = source.choice(answers(item % 12, *given))
            steps = "".join(
                rf"Step {step}: since $a_{step} = {source.randint(2, 99)}$, we have \[ b = {source.randint(2, 99)} \]. "
                for step in range(25)
            )
            end = rf"The final answer is $\boxed{{{answer}}}$." if source.random() < 0.8 else f"\n#### {answer}"
            made.append((steps + end, reference))
    source.shuffle(made)
    return made


def main() -> None:
    """Score everything once, and print the figures."""
    pairs = completions()
    start = time.perf_counter()
    verdicts = math.batch(pairs)
    seconds = time.perf_counter() - start
    right = sum(verdict.lenient for verdict in verdicts)
    assert all(verdict.vote_key for verdict in verdicts) and right > len(pairs) / 4
    print(
        json.dumps(
            {
                "completions": len(pairs),
                "expressions_read": len(math._read),
                "cores": len(os.sched_getaffinity(0)),
                "seconds": round(seconds, 1),
                "math_completions_per_minute": round(60 * len(pairs) / seconds),
            }
        )
    )


if __name__ == "__main__":
    main()
