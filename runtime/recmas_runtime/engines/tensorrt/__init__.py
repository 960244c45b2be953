"""TensorRT: a bundle's graphs built into engines on a GPU machine, and run there without torch.

`engine_cache` and `static_graph` import neither TensorRT nor CUDA's bindings; the others do, once
`engine_cache.find_platform` has found both packages.
"""
