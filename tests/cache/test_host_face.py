"""What a cache offers its hosts besides steps."""

import pytest

from tests.harness.driver import Driver, layer

WINDOW, PAGE = 4, 2


def filled(**options) -> Driver:
    driver = Driver([layer(0, window=WINDOW)], page_size=PAGE, **options)
    driver.prefill([9])
    return driver


def live(driver: Driver) -> int:
    return driver.probe.live


def test_announced_crops_keep_what_would_leave_a_window():
    driver = filled()
    for _ in range(6):
        driver.decode()
    settled = live(driver)
    with driver.cache.announce_crops():
        for _ in range(6):
            driver.decode()
        assert live(driver) == settled + 6
        driver.cache.note_crop()
        driver.decode()
        assert live(driver) <= settled + PAGE
    driver.decode()
    assert live(driver) <= settled + PAGE


def test_announcements_nest_and_end_with_an_error():
    cache = filled().cache
    with cache.announce_crops():
        cache.hold_margin = 5
        with pytest.raises(ZeroDivisionError), cache.announce_crops():
            assert cache.hold_margin == 5, "what was announced before stays announced"
            cache.note_crop()
            assert cache.hold_margin == 0
            raise ZeroDivisionError
        assert cache.hold_margin == 5
    assert cache.hold_margin is None
    cache.note_crop()
    assert cache.hold_margin is None


def test_numbers():
    cache = filled().cache
    assert cache.ranks.size == 1 and not cache.replicated
    assert cache.num_experts == 8
    assert cache.rotations == (None,) and cache.page_columns == []
    with pytest.raises(ValueError, match=r"'peak' per page; kept are \[\]"):
        cache.clear_column("peak")
