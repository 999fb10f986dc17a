"""The graphs that a node calls, such as the body of a checkpointed region."""

from torch.fx import GraphModule, Node


def bodies_of(node: Node) -> list[GraphModule]:
    """The graphs among the arguments of ``node``."""
    module = node.graph.owning_module
    values = (
        getattr(module, str(source.target), None)
        for source in node.all_input_nodes
        if source.op == "get_attr"
    )
    return [value for value in values if isinstance(value, GraphModule)]
