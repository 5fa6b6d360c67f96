"""YAML from files that others may have written: plain values, each key once, and no more of them than can be meant.

A few lines of aliases stand for a thousand million values, which nothing that goes through them would come to the end
of; and brackets can be nested deeper than Python's stack.
"""

from typing import Any

import yaml

# Far more than any configuration has.
_MOST_VALUES = 100_000


def load_yaml(text: str) -> Any:
    """The value of a document.

    Raises:
        ValueError: It is no such YAML; the message is one line.
    """
    try:
        loader = _UniqueKeys(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > _MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {_MOST_VALUES:,} values")
        return loader.construct_document(node)  # type: ignore[no-untyped-call]
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # What PyYAML's constructors run into where the value of a tag is none of its kind.
        raise ValueError(f"a value does not fit its tag ({type(error).__name__})") from error


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, those of aliases each time."""
    if id(node) not in known:
        # Where it stands for itself, its size has no end.
        known[id(node)] = _MOST_VALUES + 1
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings have each key once; of two, the loader alone would take the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is there twice", node.value[i][0].start_mark
                )
        return super().construct_mapping(node, deep)
