"""The knapsack against brute force."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from cerebellum.plan import knapsack
from cerebellum.plan.knapsack import Option, solve, total_bytes, total_damage

options = st.builds(
    Option,
    n_bytes=st.integers(0, 40).map(lambda n: 32 * n),
    damage=st.integers(-50, 1000).map(lambda d: d / 1000),
)
problems = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=5)


def brute_force(items: list[list[Option]], budget: int) -> float | None:
    """The least damage by trying everything."""
    fitting = [
        total_damage(items, choice)
        for choice in itertools.product(*(range(len(item)) for item in items))
        if total_bytes(items, choice) <= budget
    ]
    return min(fitting, default=None)


@settings(max_examples=150, deadline=None)
@given(items=problems, budget=st.integers(0, 4000))
def test_as_good_as_brute_force_and_never_over(items: list[list[Option]], budget: int) -> None:
    choice = solve(items, budget)
    best = brute_force(items, budget)
    if choice is None:
        assert best is None
        return
    assert total_bytes(items, choice) <= budget
    assert best is not None and abs(total_damage(items, choice) - best) < 1e-9


def test_bytes_of_a_large_model_stay_exact() -> None:
    """64 GB in bytes that share no large factor: a float solver alone would round over the budget."""
    items = [
        [Option(n_bytes=6_400_000_032 + 32 * i, damage=1.0), Option(n_bytes=32, damage=2.0)]
        for i in range(10)
    ]
    whole = sum(item[0].n_bytes for item in items)
    assert solve(items, whole) == (0,) * 10
    choice = solve(items, whole - 1)
    assert choice is not None and sum(choice) == 1
    assert total_bytes(items, choice) <= whole - 1


@settings(max_examples=150, deadline=None)
@given(items=problems)
def test_every_choice_of_the_frontier_is_the_best_of_its_size(items: list[list[Option]]) -> None:
    found = list(knapsack.frontier(items))
    sizes = [total_bytes(items, choice) for choice in found]
    damages = [total_damage(items, choice) for choice in found]
    assert sizes == sorted(set(sizes)) and damages == sorted(damages, reverse=True)
    assert sizes[0] == sum(min(option.n_bytes for option in item) for item in items)
    for size, damage in zip(sizes, damages, strict=True):
        best = brute_force(items, size)
        assert best is not None and abs(damage - best) < 1e-9
    least = sum(min(option.damage for option in item) for item in items)
    assert abs(damages[-1] - least) < 1e-9
