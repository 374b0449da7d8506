"""One installation for all tests of a run; one booted node per layout of cgroups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import testbed
from testbed import product
from testbed.site import Site


@pytest.fixture(scope="session")
def layer() -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("the testbed makes namespaces and cgroups: root is needed")
    with product.installed() as layer:
        yield layer


@pytest.fixture(scope="module", params=["v2", "v1"])
def site(request: pytest.FixtureRequest, layer: Path) -> Iterator[Site]:
    """A node in either layout: tests that use it run twice."""
    with testbed.boot(request.param, layer=layer) as machine:
        yield Site(machine)


@pytest.fixture(scope="module")
def node(layer: Path) -> Iterator[Site]:
    """A node for what does not depend on the layout."""
    with testbed.boot("v2", layer=layer) as machine:
        yield Site(machine)
