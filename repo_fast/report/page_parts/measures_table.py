"""Tables of measures by policy, each beside its difference to the reference and what that says."""

from collections.abc import Mapping, Sequence
from typing import Any

from repo_fast.report.page_parts.wording import (
    Measure,
    decimals_of,
    groups_of,
    judge_difference,
    spell,
    spell_value,
    triple,
)


def measures_table(
    values: Mapping[str, Any], differences: Mapping[str, Any], policies: Sequence[str], constraints: Sequence[str]
) -> list[tuple[str, list[tuple[Measure, list[dict[str, Any]]]]]]:
    """The rows of a table, by the heading they stand under.

    Args:
        values: By policy and measure: value, low and high.
        differences: The same for all policies but the reference, minus the reference.
        policies: In the order of the columns, the reference first.
        constraints: Names of several.
    """
    keys = dict.fromkeys(key for policy in policies for key in values[policy])
    return [
        (name, [(measure, cells_of(measure, values, differences, policies)) for measure in group])
        for name, group in groups_of(list(keys), constraints)
    ]


def cells_of(
    measure: Measure, values: Mapping[str, Any], differences: Mapping[str, Any], policies: Sequence[str]
) -> list[dict[str, Any]]:
    """The cells of a row, with the same decimals in each."""
    entries = {policy: values.get(policy, {}).get(measure.key) for policy in policies}
    changes = {policy: differences.get(policy, {}).get(measure.key) for policy in policies}
    decimals = decimals_of([x for entry in entries.values() for x in triple(entry)], measure.share)
    more = decimals_of([x for entry in changes.values() for x in triple(entry)], measure.share)
    return [_cell(measure, entries[policy], changes[policy], decimals, more) for policy in policies]


def _cell(measure: Measure, entry: Any, difference: Any, decimals: int, difference_decimals: int) -> dict[str, Any]:
    """What a table says of a measure of a policy; no difference for the reference."""
    value = triple(entry)
    cell: dict[str, Any] = {
        "value": spell(value, decimals, measure.share),
        "number": spell_value(value[0], decimals, measure.share),
        "difference": None,
    }
    if difference is not None:
        cell["difference"] = spell(triple(difference), difference_decimals, measure.share, difference=True)
        cell["verdict"] = judge_difference(measure, triple(difference))
    return cell
