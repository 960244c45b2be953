"""`recmas package`: a bundle as a container, with its metrics and a manifest for clusters."""

from __future__ import annotations

import argparse

from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.serve.packaging.package import Package, PackageOptions, write_package


def package(options: argparse.Namespace) -> Package:
    """Write the package that the command line asks for.

    Raises:
        RecmasError: RM40x for a bundle that is not whole, and what `write_package` refuses.
    """
    asked = PackageOptions(
        image=options.image,
        base=options.base or PackageOptions.base,
        cpus=options.cpus,
        max_batch=options.max_batch,
        replicas=options.replicas,
    )
    bundle = open_bundle(options.bundle, verify_hashes=True)
    return write_package(bundle, options.output, asked, force=options.force)
