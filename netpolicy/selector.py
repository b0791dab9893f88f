"""Whether labels are selected. ``NotIn`` holds where the key is absent, ``In`` does not; nothing required selects everything.

Source: Kubernetes apimachinery pkg/labels/selector.go, Requirement.Matches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

from clusterstate.objects import LabelSelector, Namespace, Requirement


def selects(selector: LabelSelector, labels: Mapping[str, str]) -> bool:
    """Whether every requirement holds."""
    return all(_holds(requirement, labels) for requirement in selector.requirements)


def namespace_labels(namespaces: Mapping[str, Namespace], name: str) -> Mapping[str, str]:
    """Return a namespace's labels; one that is not among the objects has its name alone, which the API server always sets."""
    known = namespaces.get(name)
    return known.labels if known is not None else {"kubernetes.io/metadata.name": name}


def _holds(requirement: Requirement, labels: Mapping[str, str]) -> bool:
    value = labels.get(requirement.key)
    match requirement.operator:
        case "In":
            return value is not None and value in requirement.values
        case "NotIn":
            return value is None or value not in requirement.values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case _:
            assert_never(requirement.operator)
