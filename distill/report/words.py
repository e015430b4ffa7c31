"""Numbers in words. Every sentence here is a function of the results: none assumes how a run came out."""

from typing import Any

BASELINE_WORDS = {"base": "its untouched base", "answers_only": "the same base fine-tuned on answers only"}


def baseline_label(name: str) -> str:
    """Name of a baseline as a label: 'answers_only' -> 'answers only'."""
    return name.replace("_", " ")


def percent(fraction: float | None) -> str:
    """0.931 -> '93.1%'. A share that is not exactly 0 or 1 never reads as if it were."""
    if fraction is None:
        return "–"
    if 0 < fraction < 0.0005:
        return "<0.1%"
    if 0.9995 <= fraction < 1:
        return ">99.9%"
    return f"{100 * fraction:.1f}%"


def points(difference: float, signed: bool = True) -> str:
    """A difference of two fractions in percentage points, with a true minus sign."""
    text = f"{100 * difference:{'+' if signed else ''}.1f}"
    return ("0.0" if float(text) == 0 else text).replace("-", "−")


def tick_points(difference: float) -> str:
    """A tick of an axis of differences: '−5', '0', '+10'."""
    return "0" if difference == 0 else f"{100 * difference:+g}".replace("-", "−")


def count(number: float | None) -> str:
    """1234567 -> '1,234,567'."""
    return "–" if number is None else f"{number:,.0f}"


def short_count(number: float | None) -> str:
    """1234567 -> '1.23M', for axes and narrow columns."""
    if number is None:
        return "–"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds as a person would say them: '0.8 s', '52 s', '3 min 12 s', '2 h 5 min'."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def brief_seconds(seconds: float | None) -> str:
    """Seconds of one thing, which may be short: '14 ms', '1.37 s', '26 s', '3 min 12 s'."""
    if seconds is None or seconds >= 59.5:
        return duration(seconds)
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def amount(number: float | None) -> str:
    """Money or GPU-hours, which may be tiny: '1,234.50', '0.42', '0.00037', '2.1e-06'."""
    if number is None:
        return "–"
    return f"{number:,.2f}" if number >= 0.1 else f"{number:.2g}"


def memory(size: int | None) -> str:
    """Bytes in binary units of three digits: '1.21 GiB'."""
    return "–" if size is None else f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def listing(words: list[str]) -> str:
    """['a', 'b', 'c'] -> 'a, b and c'."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def interval(bounds: list[float]) -> str:
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def point_interval(bounds: list[float]) -> str:
    return f"{points(bounds[0])} to {points(bounds[1])}"


def outcome(baseline: dict[str, Any]) -> str:
    """'above', 'below' or 'level': on which side of zero the paired 95% interval lies, if on one."""
    low, high = baseline["paired_ci95"]
    return "above" if low > 0 else "below" if high < 0 else "level"


def against(baseline: dict[str, Any]) -> str:
    """How a student stands to one baseline, the uncertainty included."""
    name = BASELINE_WORDS.get(baseline["name"], baseline["name"])
    bounds, difference = point_interval(baseline["paired_ci95"]), baseline["paired_diff"]
    side = outcome(baseline)
    if side != "level":
        size = points(abs(difference), signed=False)
        return f"{size} points {side} {name} ({bounds}; the interval excludes zero)"
    if baseline["higher"] == baseline["lower"] == 0:
        return f"no different from {name}: both score the same on every problem"
    smallest = points(baseline["min_detectable_diff"], signed=False)
    return (
        f"not distinguishable from {name}: the difference is {points(difference)} points and its interval, {bounds}, "
        f"includes zero; with this many problems {smallest} points or more would be found reliably"
    )


def student_sentences(student: dict[str, Any], teacher: dict[str, Any] | None) -> list[str]:
    """What one student's numbers say, as full sentences."""
    first = f"{student['name']} answers {percent(student['mean'])} correctly (95% interval {interval(student['ci95'])})"
    if teacher and teacher.get("mean"):
        share = student["mean"] / teacher["mean"]
        first += f", {percent(share)} of what its teacher reaches ({percent(teacher['mean'])})"
    sentences = [first + "."]
    sentences += [f"It is {against(baseline)}." for baseline in student["baselines"]]
    if not student["baselines"]:
        sentences.append("It was compared with no baseline, so nothing shows that the fine-tuning changed it.")
    return sentences


def _beaten(student: dict[str, Any]) -> tuple[list[str], list[str]]:
    won = [b["name"] for b in student["baselines"] if outcome(b) == "above"]
    rest = [b["name"] for b in student["baselines"] if outcome(b) != "above"]
    return won, rest


def headline(results: dict[str, Any]) -> str:
    """The result of the run in one sentence."""
    students = [student for student in results["students"] if student["baselines"]]
    if not results["students"]:
        return "No student has been evaluated yet."
    if not students:
        return "No student was compared with a baseline."
    clear = [student["name"] for student in students if not _beaten(student)[1]]
    if len(clear) == len(students):
        return f"Fine-tuned on traces, {listing(clear)} {'beats' if len(clear) == 1 else 'beat'} every baseline."
    if len(students) > 1 and not any(_beaten(student)[0] for student in students):
        return "No student beats any baseline."
    parts = []
    for student in students:
        won, rest = _beaten(student)
        if not rest:
            parts.append(f"{student['name']} beats every baseline")
        elif not won:
            parts.append(f"{student['name']} beats no baseline")
        else:
            parts.append(f"{student['name']} beats {_labels(won)} but not {_labels(rest)}")
    return "; ".join(parts) + "."


def _labels(names: list[str]) -> str:
    short = {"base": "its base", "answers_only": "answers-only training"}
    return listing([short.get(name, name) for name in names])


def setting(results: dict[str, Any]) -> str:
    """On what, and how, the models were measured."""
    problems, settings = results["problems"], results["evals"]
    parts = [f"{count(problems['eval'])} held-out problems"] if problems["eval"] else []
    parts.append(
        f"{settings['samples']} samples a problem at temperature {settings['temperature']:g}, "
        f"top-p {settings['top_p']:g}, at most {count(settings['max_tokens'])} tokens"
    )
    if results["trained_on"]:
        parts.append(f"students trained on {count(results['trained_on'])} traces of {results['teacher']['name']}")
    return "; ".join(parts) + "."


def traces_note(shown: int, counts: dict[str, int]) -> str:
    """How many of how many traces the reader holds, and how they were chosen."""
    total = f"{count(shown)} of {count(counts['all'])} traces"
    if counts["accepted"] + counts["rejected"] == 0:
        return f"{total}, chosen by hash and evenly over families. The filters have not run."
    return (
        f"{total}, chosen by hash: of the {count(counts['rejected'])} rejected ones evenly over the filters that "
        f"rejected them, of the {count(counts['accepted'])} accepted ones evenly over families."
    )


def answers_note(shown: int, total: int | None) -> str:
    return (
        f"{count(shown)} of {count(total)} evaluation problems, chosen by hash and evenly over families. For each "
        "model its first sample is shown and judged here, never its best; its score counts all samples of the problem."
    )


def overlap(problems: dict[str, Any] | None) -> str:
    """What the manifest proves about training and evaluation problems."""
    if not problems:
        return ""
    shared = problems["overlap"]
    said = "No problem is in both sets" if shared == 0 else f"{count(shared)} problems are in both sets"
    return (
        f"{said}: {count(problems['train']['count'])} training and {count(problems['eval']['count'])} evaluation "
        f"problems, compared by sha256 of their normalised text; {count(problems['dropped']['overlap'])} candidates "
        "for training were dropped because they are evaluation problems."
    )
