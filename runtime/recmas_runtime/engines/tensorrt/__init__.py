"""TensorRT: a bundle's graphs built into engines on a GPU machine, and run there without torch.

`availability`, `engine_cache`, `profiles`, `static_graph`, `parser_support` and `phase_progress`
are plain logic. `device_memory` imports CUDA's bindings, `network` and `backbone` TensorRT's; these
three are imported by `building` and `loading` once `availability` has found both packages.
"""
