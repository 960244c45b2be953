"""Graph passes: what a traced backbone goes through, in the order of `recmas_export.pipeline`.

Each is general: it looks at operators and constants, never at names or architectures. Where its
form is not found, the graph stays as it is.
"""
