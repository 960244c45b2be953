"""The YAML document: nodes with positions, and problems that name them."""
