"""Where the time goes: each second once, the inner part's its own."""

from __future__ import annotations

import threading
import time

from cerebellum.engine.timetable import time_table
from cerebellum.engine.timings import collecting, timed


def test_a_part_inside_a_part_is_taken_from_the_outer_one() -> None:
    with collecting() as timings:
        with timed("decoding"):
            time.sleep(0.02)
            with timed("scoring"):
                time.sleep(0.03)
            time.sleep(0.02)
        time.sleep(0.02)
    assert 0.035 < timings.seconds["decoding"] < 0.06
    assert 0.03 <= timings.seconds["scoring"] < 0.05
    assert timings.other >= 0.019
    assert abs(timings.wall - timings.other - sum(timings.seconds.values())) < 1e-6
    assert timings.times == {"decoding": 1, "scoring": 1}


def test_other_threads_are_counted_apart() -> None:
    def work() -> None:
        with timed("quantizing"):
            time.sleep(0.03)

    with collecting() as timings:
        thread = threading.Thread(target=work)
        thread.start()
        with timed("waiting"):
            thread.join()
    assert timings.beside["quantizing"] >= 0.03
    assert "quantizing" not in timings.seconds
    assert timings.seconds["waiting"] >= 0.025


def test_the_table_and_its_json_hold_every_part() -> None:
    with collecting() as timings, timed("decoding"):
        pass
    told = time_table(timings)
    assert "decoding" in told.table() and "all else" in told.table()
    assert told.parts["decoding"].times == timings.times["decoding"]


def test_without_a_collector_nothing_is_counted() -> None:
    with timed("decoding"):
        pass
    with collecting() as timings, collecting() as inner:
        assert inner is timings
    assert timings.seconds == {}
