import socket
import urllib.request

import pytest

from lockstep.errors import ConfigurationError
from lockstep.report.metrics import RunMetrics


def read(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def test_what_is_served_worked_by_hand():
    with RunMetrics(0) as metrics:
        metrics.observe([8, 2], agreement_s=0.002)
        metrics.observe([1, 0], agreement_s=0.02)
        found = read(metrics.port)
    assert found["lockstep_steps_total"] == 2
    assert found['lockstep_real_rows_total{rank="0"}'] == 9
    assert found['lockstep_real_rows_total{rank="1"}'] == 2
    assert found["lockstep_agreement_wait_seconds_count"] == 2
    assert found["lockstep_agreement_wait_seconds_sum"] == pytest.approx(0.022)
    assert found['lockstep_agreement_wait_seconds_bucket{le="0.003"}'] == 1
    assert found["lockstep_idle_share"] == pytest.approx(1 - 11 / 18)


def test_a_port_in_use_and_a_port_that_is_none():
    with RunMetrics(0) as metrics, pytest.raises(ConfigurationError, match=f"metrics_port {metrics.port} on 127.0.0.1"):
        RunMetrics(metrics.port)
    with pytest.raises(ConfigurationError, match=r"metrics_port must be in 0..65535, got 70000"):
        RunMetrics(70000)


def test_it_listens_on_this_host_only():
    with RunMetrics(0) as metrics:
        socket.create_connection(("127.0.0.1", metrics.port), timeout=5).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", metrics.port), timeout=5)
