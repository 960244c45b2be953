"""The tests' kit: specs, tiny models, systems, bundles and graphs that more than one group uses.

`files`, `graphs`, `hand_bundle` and `specs` need no torch.
"""
