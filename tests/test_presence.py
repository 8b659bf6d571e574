"""Presence under a clock of the test's own: sites in a row pass on whom they heard of."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peertune.runtimes.presence import FINISHED, Presence

GRACE = 10.0


def row(count: int) -> list[Presence]:
    return [Presence(count, own, GRACE) for own in range(count)]


def beat(sites: list[Presence], now: float, silent: int | None = None) -> None:
    """Everybody tells the next in the row, both ways; a silent site neither speaks nor hears."""
    for i in range(len(sites) - 1):
        for source, target in ((i, i + 1), (i + 1, i)):
            if silent not in (source, target):
                sites[target].heard(source, now)
                sites[target].told(sites[source].ages(now), now)


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


def test_one_who_has_finished_is_not_missed() -> None:
    sites = row(3)
    beat(sites, 0.0)
    sites[1].finished(2)
    beat(sites, 1.0, silent=2)
    beat(sites, 99.0, silent=2)
    assert sites[0].present(100.0) == [0, 1, 2] and sites[0].ages(100.0)[2] == FINISHED


@pytest.mark.parametrize("ages", [[], [0.0], [0.0, math.nan, 1.0], [0.0, -2.0, 1.0], [0.0] * 4])
def test_what_is_no_age_is_refused(ages: list[float]) -> None:
    with pytest.raises(ValueError, match="expected 3"):
        Presence(3, 0, GRACE).told(ages, 0.0)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=20))
def test_nobody_grows_younger_than_what_was_told(told: list[tuple[float, float]]) -> None:
    """An age that is told later, or is older, never hides a younger one; and a site always knows of itself."""
    site, now, best = Presence(2, 0, GRACE), 0.0, -math.inf
    for step, age in told:
        now += step
        best = max(best, now - age)
        site.told([123.0, age], now)
        assert site.ages(now) == [0.0, now - best]


def test_a_site_knows_of_itself_and_one_who_has_finished_stays_so() -> None:
    site = Presence(2, 0, GRACE)
    site.told([FINISHED, 0.0], 1.0)
    assert site.ages(1.0) == [0.0, 0.0]
    site.finished(1)
    site.heard(1, 2.0)  # its connection is still open
    assert site.ages(2.0) == [0.0, FINISHED] and site.present(99.0) == [0, 1]
