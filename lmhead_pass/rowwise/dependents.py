"""Which nodes depend on which heads, or read memory that such nodes write to."""

import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import reduce

from torch.fx import Node

from ..graph import memory_of, mutation
from ..logits import Head


class Dependents:
    """Of all heads in one pass over the graph: it may have hundreds."""

    def __init__(self, heads: Sequence[Head]) -> None:
        self._bits = {head.node: 1 << number for number, head in enumerate(heads)}
        self._heads = heads
        self._behind: dict[Node, int] = {}
        """For each node the bits of the heads that it depends on."""
        written: dict[int, int] = defaultdict(int)
        for node in heads[0].node.graph.nodes:
            read = through_memory = 0
            for source in node.all_input_nodes:
                read |= self._behind[source] | self._bits.get(source, 0)
                for storage in memory_of(source) if written else ():
                    through_memory |= written.get(storage, 0)
            for storage in mutation.memory_written(node) if read else ():
                written[storage] |= read
            self._behind[node] = read | through_memory

    def of(self, heads: Iterable[Head]) -> set[Node]:
        """What depends on any of ``heads``."""
        wanted = reduce(operator.or_, (self._bits[head.node] for head in heads))
        return {node for node, bits in self._behind.items() if bits & wanted}

    def of_single_heads(self) -> dict[Node, Head]:
        """For the heads on which no other one depends: their nodes, and what depends on them.

        What another head reads is no logits.
        """
        read_by_heads = 0
        for head in self._heads:
            read_by_heads |= self._behind[head.node] & ~self._bits[head.node]
        found = {}
        for node, behind in self._behind.items():
            bits = (behind | self._bits.get(node, 0)) & ~read_by_heads
            if bits:
                found[node] = self._heads[bits.bit_length() - 1]
        return found
