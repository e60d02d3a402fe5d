"""The numbers of budget mode that nobody measured, in one place: curves.json holds them with every run."""

from __future__ import annotations

from cerebellum.codec import Record


class Method(Record, frozen=True, kw_only=True):
    """Tuning of the measurement and of the fit. A share or a standard deviation is a fraction of its subject.

    Measuring: ``first_look`` chunks of a part, then ``growth`` times as many until its damage is known to
    ``precise`` of itself or is surely below ``slight`` of the largest that its role does. A part gets
    ``least_chunks`` to ``most_chunks``; ``roles_share`` of the passes go to whole roles, ``fine_share`` to IQ
    types, ``reference_share`` at most to source, anchor and base. The halves of a part are told apart where
    they differ by ``apart`` half-widths of the interval of their difference. A whole plan is compared with
    the source on ``plan_kld_chunks`` and with the base on ``plan_nll_chunks``. Rounding errors are sampled
    from ``sample_rows`` rows and ``sample_elements`` weights of a tensor, whichever is more.

    Fitting: ``layers_sd`` of a group's sensitivity around its role's before it was measured, ``model_sd`` of a
    damage around the linear model, ``plan_sd`` of a whole plan's beyond what types and roles explain,
    ``lesson_sd`` of what a type or a role does in a whole plan around what it did alone, ``objectives_sd`` of a
    sensitivity of the NLL around that of the divergence; ``cross_share`` of the anchor's own damage is an error
    of all damages above it; nothing is believed below ``floor`` of its prior, or to be less than
    ``least_damage`` nats a token.

    Proposing: ``learned`` plans after the first having learned from them, ``drawn`` from damages drawn; the frontier
    has ``frontier_steps`` sizes.

    Stepping, where a first plan surely does ``beyond`` more or less than the sum of its parts: up to ``step_rounds``
    times, the best plan is measured with one of ``step_parts`` parts at another type. A step gets ``step_chunks``
    chunks: neighbours differ by less than they have in common, so half of what tells plans apart will do. All steps
    of a round cost ``steps_share`` of the passes at most. What all parts together cost beside a plan is expected to be
    ``whole_sd`` off what they cost alone, and each part as much again; each type and each family ``kind_sd``.
    """

    first_look: int = 4
    growth: float = 2.0
    precise: float = 0.1
    slight: float = 0.1
    least_chunks: int = 4
    most_chunks: int = 24
    roles_share: float = 0.5
    fine_share: float = 0.1
    reference_share: float = 0.2
    apart: float = 1.0
    plan_kld_chunks: int = 48
    plan_nll_chunks: int = 96
    sample_rows: int = 64
    sample_elements: int = 1 << 18
    layers_sd: float = 0.5
    model_sd: float = 0.1
    plan_sd: float = 0.03
    lesson_sd: float = 0.15
    objectives_sd: float = 0.5
    cross_share: float = 0.05
    floor: float = 0.05
    least_damage: float = 1e-7
    learned: int = 2
    drawn: int = 2
    frontier_steps: int = 24
    beyond: float = 0.1
    step_rounds: int = 2
    step_parts: int = 12
    step_chunks: int = 24
    steps_share: float = 0.5
    whole_sd: float = 0.5
    kind_sd: float = 0.2

    @classmethod
    def of_slow_switches(cls) -> Method:
        """Returns the tuning for where every change of groups opens a model anew: fewer and later looks."""
        return cls(first_look=8, growth=3.0)
