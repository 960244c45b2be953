"""The bundle's formats: plan, manifest, links, tolerances, and the checks on load."""
