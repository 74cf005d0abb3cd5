"""The pages of a cache: what a name gives is what was stored under it, whoever took, shared and gave back pages meanwhile."""

from hypothesis import given
from hypothesis import strategies as st

from nanochat.inference.pages import ROOT, Pages

PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(
    actions=st.lists(st.one_of(PROMPTS, st.integers(0, 30)), max_size=60),
    keep=st.booleans(),
    count=st.integers(6, 14),
)
def test_a_name_gives_the_page_with_its_content(actions, keep, count):
    """A list is a prompt whose row joins, if there is room; a number says which row leaves. Pages here hold one token each."""
    pages, rows, content = Pages(1, count, keep), [], {}
    for action in actions:
        if isinstance(action, int):
            if rows:
                pages.give_back(rows.pop(action % len(rows)))
            continue
        if sum(len(row) for row in rows) + len(action) > pages.count:
            pages.extend(2)
            if sum(len(row) for row in rows) + len(action) > pages.count:
                continue
        row = []
        for at, token in enumerate(action):
            before, beginning = row[-1] if row else ROOT, action[: at + 1]
            found = pages.find(before, (token,))
            if found is None:
                row.append(pages.take())
                content[row[-1]] = beginning
                pages.name(row[-1], before, (token,))
            else:
                assert content[found] == beginning
                row.append(pages.share(found))
        rows.append(row)
        used = {page for row in rows for page in row}
        assert used == set(pages.users) and not used & set(pages.free) and not used & set(pages.idle)
        assert all(pages.users[page] == sum(page in row for row in rows) for page in used)
        assert sorted([*used, *pages.free, *pages.idle]) == list(range(1, pages.count + 1))
        assert all(content[page] == action[: at + 1] for at, page in enumerate(row))
    for row in rows:
        pages.give_back(row)
    assert not pages.users and (keep or not pages.named) and len(pages.free) + len(pages.idle) == pages.count


def test_the_beginning_of_a_prompt_is_kept_longest():
    """A page gives way before the one in front of it, and the pages that were not used for longest before others."""
    pages = Pages(1, 4, keep=True)
    first = [pages.take(), pages.take()]
    pages.name(first[0], ROOT, (1,)), pages.name(first[1], first[0], (2,))
    second = [pages.take()]
    pages.name(second[0], ROOT, (3,))
    pages.give_back(first), pages.give_back(second)
    taken = [pages.take() for _ in range(3)]
    assert taken[1:] == [first[1], first[0]] and pages.find(ROOT, (1,)) is None and pages.find(ROOT, (3,)) == second[0]
