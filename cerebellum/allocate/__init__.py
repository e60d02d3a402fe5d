"""Spending bytes: the multiple-choice knapsack, solved to proven optimality."""

from cerebellum.allocate.knapsack import Choice, Option, solve

__all__ = ["Choice", "Option", "solve"]
