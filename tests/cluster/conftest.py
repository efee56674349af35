"""A Ray cluster of two machines, as processes here."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from app_process import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[object]:
    """Its first machine has the resource ``first``. Skips without Ray: scripts/test_cluster installs it."""
    pytest.importorskip("ray.serve")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = str(ROOT)  # for the processes of replicas
    sys.path.insert(0, str(ROOT))
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 8,
            "resources": {"first": 100},
            "include_dashboard": True,
            "dashboard_port": free_port(),
        },
    )
    ray.init(address=cluster.address, logging_level="WARNING", log_to_driver=bool(os.environ.get("SHOW_RAY_LOGS")))
    yield cluster
    ray.shutdown()
    cluster.shutdown()
