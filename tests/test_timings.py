"""Where the time goes: each second once, the inner part's its own."""

from __future__ import annotations

import threading
import time

from cerebellum.engine.timetable import time_table
from cerebellum.engine.timings import collecting, timed
from cerebellum.measure.pace import Work, time_left


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


def test_the_time_left_is_told_by_part() -> None:
    done = Work(chunks=10, weights=1000)
    assert time_left(done, Work(chunks=1, weights=1), at_once=False) is None  # nothing collects
    with collecting() as timings:
        assert time_left(done, Work(chunks=1, weights=1), at_once=False) is None  # nothing decoded yet
        timings.seconds |= {"decoding": 18.0, "swapping": 2.0, "quantizing": 30.0, "hashing": 99.0}
        timings.beside["quantizing"] = 10.0
        apart = time_left(done, Work(chunks=40, weights=3000), at_once=False)
        beside = time_left(done, Work(chunks=40, weights=3000), at_once=True)
        late = time_left(done, Work(chunks=40, weights=0), at_once=True)
        over = time_left(done, Work(chunks=-3, weights=0), at_once=True)
    assert apart is not None and beside is not None and late is not None and over is not None
    assert (apart.model, apart.shards, apart.seconds) == (80.0, 120.0, 200.0)
    assert apart.told() == "3 min left at most (model 80 s, shards 2 min)"
    assert beside.seconds == 120.0 and late.seconds == 80.0
    assert late.told() == "80 s left at most" and over.seconds == 0.0
