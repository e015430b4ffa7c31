"""Page accounting: nothing is lost, nothing is handed out twice, and pages are found by what is in them."""

from hypothesis import given, settings
from hypothesis import strategies as st

from teacher.pages import PagePool


def test_a_prefix_is_found_page_by_page_while_its_pages_last():
    pool = PagePool(4, 2)
    first, second = pool.take(), pool.take()
    serial = pool.index(first, 0, [1, 2])
    pool.index(second, serial, [3, 4])
    assert pool.find([1, 2, 3, 4, 5], most=9)[0] == [first, second]
    assert pool.find([1, 2, 3, 4, 5], most=1)[0] == [first]
    assert pool.find([1, 2, 9, 9], most=9)[0] == [first]
    assert pool.find([3, 4], most=9)[0] == []  # the same tokens elsewhere are another page
    pool.release([first, second])
    assert pool.available == 4
    assert pool.find([1, 2, 3, 4], most=9)[0] == [first, second]  # idle, and still known
    taken = [pool.take() for _ in range(3)]
    assert set(taken[:2]).isdisjoint({first, second})  # blank ones first
    assert taken[2] == second  # then the end of what was released
    assert pool.find([1, 2, 3, 4], most=9)[0] == [first]


def test_what_followed_a_reused_page_is_not_found_behind_its_new_content():
    pool = PagePool(2, 1)
    first, second = pool.take(), pool.take()
    pool.index(second, pool.index(first, 0, [7]), [8])
    pool.hold(second)
    pool.release([first])
    again = pool.take()
    assert again == first
    pool.index(again, 0, [9])
    assert pool.find([9, 8], most=2)[0] == [first]


def test_equal_content_is_indexed_once():
    pool = PagePool(3, 1)
    first, second = pool.take(), pool.take()
    assert pool.index(first, 0, [5]) == pool.index(second, 0, [5])
    assert pool.find([5], most=1)[0] == [first]
    pool.release([second])
    assert pool.available == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=60))
def test_pages_are_neither_lost_nor_shared_by_mistake(moves):
    """Random sequences come, share what is known of them, fill pages and go."""
    pool, live = PagePool(8, 1), []
    for kind, token in moves:
        if kind <= 1:
            found, serial = pool.find([token, token + 1], most=2)
            for page in found:
                pool.hold(page)
            live.append((found, serial))
        elif kind == 2 and live and pool.available:
            pages, serial = live.pop(0)
            page = pool.take()
            assert all(page not in held for held, _ in live) and page not in pages
            live.append(([*pages, page], pool.index(page, serial, [token + len(pages)])))
        elif live:
            pool.release(live.pop()[0])
        held = {page for pages, _ in live for page in pages}
        assert pool.available == 8 - len(held)
    for pages, _ in live:
        pool.release(pages)
    assert pool.available == 8
    assert sorted(pool.take() for _ in range(8)) == list(range(1, 9))
