"""The filters that compare: near-duplicates, agreement and outliers, each on traces made for the case."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.filters import agreement, duplicates, minhash, near_duplicate_problems, near_duplicates, outliers
from distill.filters.comparing import Rows
from distill.filters.words import cut_words
from distill.recipe import AgreementFilter, NearDuplicateProblems, NearDuplicateTraces, OutliersFilter
from tests.distill.small_run import problem, trace


def prose(words, seed=0):
    pick = random.Random(seed)
    return [f"w{pick.randrange(3000)}" for _ in range(words)]


def changed(words, share, seed=0):
    pick = random.Random(seed)
    return [f"x{pick.randrange(10**6)}" if pick.random() < share else word for word in words]


def judge(module, traces, problems, chosen):
    return module.check(traces, {p["id"]: p for p in problems}, chosen)


def similarity(a, b, ngram):
    def stretches(text):
        words = text.split()
        return {tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)}

    one, other = stretches(a), stretches(b)
    return len(one & other) / len(one | other)


def test_the_share_of_equal_slots_is_the_jaccard_similarity():
    errors = []
    for seed in range(60):
        base = prose(400, seed)
        a, b = " ".join(base), " ".join(changed(base, seed / 600, seed))
        slots = minhash.sketches(cut_words([a, b]), 5).view("<u2")
        errors.append(float((slots[0] == slots[1]).mean()) - similarity(a, b, 5))
    assert abs(np.mean(errors)) < 0.015 and np.std(errors) < 0.05


def test_near_duplicates_at_any_threshold():
    base = prose(600)
    for threshold in (0.5, 0.7, 0.8, 0.95):
        for share in (0.0, 0.003, 0.01, 0.03, 0.1):
            a, b = " ".join(base), " ".join(changed(base, share))
            alike = similarity(a, b, 5)
            if abs(alike - threshold) < 0.1:
                continue  # the estimate may fall on either side
            payload = minhash.sketches(cut_words([a, b, " ".join(prose(600, 9))]), 5)
            kept = minhash.first_of_each(payload, np.arange(3), threshold)
            assert kept.tolist() == ([0, 0, 2] if alike > threshold else [0, 1, 2]), (threshold, alike)


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(12)))
def test_clusters_keep_their_first_in_the_order_given(order):
    texts = [" ".join([*prose(200, cluster), f"end{copy}"]) for cluster in range(4) for copy in range(3)]
    payload = minhash.sketches(cut_words(texts), 5)
    kept = minhash.first_of_each(payload, np.array(order), 0.8)
    for cluster in range(4):
        members = range(3 * cluster, 3 * cluster + 3)
        first = min(members, key=order.index)
        assert [kept[m] for m in members] == [first] * 3


def test_many_copies_of_one_text_are_one_cluster():
    texts = [" ".join(prose(50))] * 3000 + [" ".join(prose(50, 1))]
    payload = minhash.sketches(cut_words(texts), 5)
    assert set(minhash.first_of_each(payload, np.arange(3001), 0.8).tolist()) == {0, 3000}


def test_near_duplicate_traces_name_the_trace_that_is_kept():
    of, other = problem("A?"), problem("B?")
    base = prose(300)
    texts = [" ".join(base), " ".join(changed(base, 0.005)), " ".join(prose(300, 5))]
    traces = [trace(of, f"{text}\n</think>\n\n\\boxed{{4}}", k) for k, text in enumerate(texts)]
    traces.append(trace(other, traces[0]["text"], 7))
    found = judge(near_duplicates, traces, [of, other], NearDuplicateTraces())
    assert [v.passed for v in found] == [True, False, True, False]
    assert f"of trace {traces[0]['id']}, sample 0" in found[1].reason


def test_near_duplicate_problems_keep_all_traces_of_one():
    text = (
        "A train leaves the station at noon and travels north at 60 miles an hour for three hours. How far does it go?"
    )
    first, second, third = problem(text), problem(text.replace("noon", "midday")), problem(text.replace("60", "75"))
    third["problem"] = (
        "Seven friends share 35 apples so that everyone gets the same number. How many does each one get?"
    )
    traces = [trace(of, f"{k} </think> \\boxed{{4}}", k) for k, of in enumerate([first, second, second, third, first])]
    chosen = NearDuplicateProblems(similarity=0.7)
    found = judge(near_duplicate_problems, traces, [first, second, third], chosen)
    assert [v.passed for v in found] == [True, False, False, True, True]
    assert found[1].reason == f"nearly the problem of trace {traces[0]['id']}, which is kept"


@pytest.mark.parametrize("module", [near_duplicates, near_duplicate_problems, duplicates])
def test_those_that_passed_before_are_kept(module):
    of = problem()
    traces = [trace(of, f"{' '.join(prose(100))}\n</think>\n\n\\boxed{{4}}", k) for k in range(3)]
    payload = module.digest(traces, {of["id"]: of}, NearDuplicateTraces())
    number = np.arange(3) if module is near_duplicate_problems else np.zeros(3, dtype=np.int64)
    rows = Rows(
        problem=number, sample=np.arange(3), tokens=np.ones(3, dtype=np.int64), payload=payload,
        order=np.array([1, 0, 2]), name=lambda row: traces[row]["id"], passed=np.array([False, True, False]),
    )  # fmt: skip
    found = module.compare(rows, NearDuplicateTraces())
    assert found.passed.tolist() == [False, True, False]


def test_agreement_without_a_reference():
    of, known = problem("How many?", None), problem("Known?", "4")
    answers = ["7", "7.0", "\\text{7}", "8", "7", None]
    traces = [
        trace(of, f"x{k}</think>" + ("It is seven." if answer is None else f"\\boxed{{{answer}}}"), k)
        for k, answer in enumerate(answers)
    ] + [trace(of, "x</think>\\boxed{7}", 9, end="length"), trace(known, "x</think>\\boxed{1}")]
    found = judge(agreement, traces, [of, known], AgreementFilter())
    assert [v.passed for v in found] == [True, True, True, False, True, False, False, True]
    assert found[0].reason == "4 of 5 samples say 7" and found[0].measured == {"agreement": 0.8}
    assert found[3].reason == "1 of 5 samples say 8, 4 say 7"
    assert found[5].reason == found[6].reason == "no answer to compare"
    assert found[7].reason == "the problem has a reference answer"


def test_agreement_needs_a_majority_of_enough_samples():
    of = problem("How many?", None)

    def given(*answers):
        traces = [trace(of, f"x{k}</think>\\boxed{{{answer}}}", k) for k, answer in enumerate(answers)]
        return judge(agreement, traces, [of], AgreementFilter())

    assert not any(v.passed for v in given("1", "1", "1"))
    assert given("1", "1", "1")[0].reason == "3 answered samples, fewer than 4"
    split = given("1", "1", "2", "2")
    assert not any(v.passed for v in split) and split[0].reason.endswith("no answer has more than 50%")
    assert [v.passed for v in given("1", "1", "1", "2")] == [True, True, True, False]
    long = given(*["9" * 500] * 3, "9" * 499 + "8")  # shown in part, told apart in full
    assert [v.passed for v in long] == [True, True, True, False]


def test_outliers():
    of, few = problem("A?"), problem("B?")
    lengths = [100, 110, 90, 105, 500, 3]
    traces = [trace(of, f"{'so ' * n}</think>\\boxed{{4}}", k) for k, n in enumerate(lengths)]
    traces += [trace(few, f"{'so ' * n}</think>\\boxed{{4}}", k) for k, n in enumerate((10, 900))]
    found = judge(outliers, traces, [of, few], OutliersFilter(min_ratio=0.1))
    assert [v.passed for v in found] == [True, True, True, True, False, False, True, True]
    assert found[4].reason == "500 reasoning tokens, 4.9 times the median of its problem, more than 4"
    assert found[5].reason.endswith("less than 0.1")
    assert found[7].reason == "fewer than 4 samples to compare with"
