"""Presence under a clock of the test's own: sites in a row pass on whom they heard of."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peertune.runtimes.presence import FINISHED, MOST_STEPS, Presence

GRACE = 10.0


def row(count: int) -> list[Presence]:
    return [Presence(count, own, GRACE) for own in range(count)]


def beat(sites: list[Presence], now: float, silent: int | None = None) -> None:
    """Everybody tells the next in the row, both ways; a silent site neither speaks nor hears."""
    for i in range(len(sites) - 1):
        for source, target in ((i, i + 1), (i + 1, i)):
            if silent not in (source, target):
                sites[target].heard(source, now)
                sites[target].told(sites[source].ages(now), sites[source].steps(), now)


def test_word_of_all_goes_down_the_row_and_stops_where_one_falls_silent() -> None:
    sites = row(5)
    assert sites[0].present(0.0) == [0]
    for second in range(5):
        beat(sites, float(second))
    assert all(site.present(5.0) == [0, 1, 2, 3, 4] for site in sites)
    for second in range(5, 11):
        beat(sites, float(second), silent=2)
    assert sites[0].present(10.9) == [0, 1, 2, 3, 4], "within the grace nobody is missed"
    for second in range(11, 20):
        beat(sites, float(second), silent=2)
    assert sites[0].present(20.0) == [0, 1] and sites[4].present(20.0) == [3, 4]
    for second in range(20, 25):
        beat(sites, float(second))
    assert sites[0].present(25.0) == [0, 1, 2, 3, 4], "it is back"


def test_one_who_was_there_and_is_absent_is_gone_and_one_who_never_came_is_not() -> None:
    sites = row(4)
    beat(sites, 0.0, silent=3)
    beat(sites, 1.0, silent=3)
    assert [sites[0].is_gone(member, 10.0) for member in range(4)] == [False] * 4
    for second in range(2, 20):
        beat(sites[:2], float(second))
    sites[0] = Presence(4, 0, GRACE)  # another process, which has only heard of it
    beat(sites[:2], 20.0)
    assert [sites[0].is_gone(member, 20.0) for member in range(4)] == [False, False, True, False]
    sites[0].finished(2)
    assert not sites[0].is_gone(2, 99.0)


def test_one_who_has_finished_is_not_missed() -> None:
    sites = row(3)
    beat(sites, 0.0)
    sites[1].finished(2)
    beat(sites, 1.0, silent=2)
    beat(sites, 99.0, silent=2)
    assert sites[0].present(100.0) == [0, 1, 2] and sites[0].ages(100.0)[2] == FINISHED


def test_word_that_somebody_gets_on_goes_down_the_row_and_is_news_once() -> None:
    """Sites that wait, and only tell each other what they heard, look like nobody who gets on."""
    sites = row(5)
    for second in range(5):
        sites[4].got_on(float(second))
        beat(sites, float(second))
    for second in range(5, 9):
        beat(sites, float(second))
    last = [site.got_on_at for site in sites]
    assert last == sorted(last, reverse=True) and last[0] <= 4 + 3
    for second in range(9, 30):
        beat(sites, float(second))
    assert [site.got_on_at for site in sites] == last
    sites[4] = Presence(5, 4, GRACE)  # a new process, which counts on from where the old one was
    beat(sites, 30.0)
    sites[4].got_on(31.0)
    for second in range(31, 35):
        beat(sites, float(second))
    assert all(site.got_on_at >= 31.0 for site in sites)


def test_steps_of_a_liar_are_bounded_and_those_of_the_ejected_no_news() -> None:
    site = Presence(3, 0, GRACE)
    site.told([0.0] * 3, [MOST_STEPS, 0, 0], 1.0)
    assert site.got_on_at == -math.inf, "of itself it knows better"
    site.got_on(2.0)
    assert site.steps() == [MOST_STEPS, 0, 0] and site.got_on_at == 2.0
    site.ejected.add(1)
    site.told([0.0] * 3, [0, 9, 0], 3.0)
    assert site.got_on_at == 2.0
    with pytest.raises(ValueError, match="got 2 counts of steps, expected 3"):
        site.told([0.0] * 3, [0, 0], 4.0)


@pytest.mark.parametrize("ages", [[], [0.0], [0.0, math.nan, 1.0], [0.0, -2.0, 1.0], [0.0] * 4])
def test_what_is_no_age_is_refused(ages: list[float]) -> None:
    with pytest.raises(ValueError, match="expected 3"):
        Presence(3, 0, GRACE).told(ages, [0, 0, 0], 0.0)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=20))
def test_nobody_grows_younger_than_what_was_told(told: list[tuple[float, float]]) -> None:
    """An age that is told later, or is older, never hides a younger one; and a site always knows of itself."""
    site, now, best = Presence(2, 0, GRACE), 0.0, -math.inf
    for step, age in told:
        now += step
        best = max(best, now - age)
        site.told([123.0, age], [0, 0], now)
        assert site.ages(now) == [0.0, now - best]


def test_a_site_knows_of_itself_and_one_who_has_finished_stays_so() -> None:
    site = Presence(2, 0, GRACE)
    site.told([FINISHED, 0.0], [0, 0], 1.0)
    assert site.ages(1.0) == [0.0, 0.0]
    site.finished(1)
    site.heard(1, 2.0)  # its connection is still open
    assert site.ages(2.0) == [0.0, FINISHED] and site.present(99.0) == [0, 1]
    assert site.ages(98.9)[0] == 0.0, "asked by another thread, which looked at the clock a little earlier"


def test_the_ejected_count_no_more_whoever_hears_of_them() -> None:
    site = Presence(3, 0, GRACE)
    site.ejected.add(1)
    site.told([0.0] * 3, [0, 0, 0], 1.0)
    assert site.present(1.0) == [0, 2]
    assert not site.is_heard_elsewhere(1, -math.inf, 1.0)


def test_who_is_gone_here_is_clearly_heard_elsewhere_or_not() -> None:
    """Not by those who had its last beat a moment later, nor by those who have heard nothing of it for long."""
    site = Presence(2, 0, GRACE)
    site.told([0.0, 1.0], [0, 0], 102.5)
    assert not site.is_heard_elsewhere(1, 100.0, 102.5)
    site.told([0.0, 0.0], [0, 0], 102.5)
    assert site.is_heard_elsewhere(1, 100.0, 102.5) and site.is_heard_elsewhere(1, 100.0, 107.5)
    assert not site.is_heard_elsewhere(1, 100.0, 108.0)
    site.finished(1)
    assert site.is_heard_elsewhere(1, 100.0, 999.0)
