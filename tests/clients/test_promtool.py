"""Prometheus' own checker reads /metrics, of a server that has answered something and has something to say."""

from __future__ import annotations

import json
import subprocess
import urllib.request

from tests.clients.live import LiveServer


def scrape(live: LiveServer) -> bytes:
    body = {"prompt": "a", "max_tokens": 3, "temperature": 0}
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {live.key}"}
    request = urllib.request.Request(f"{live.url}/completions", json.dumps(body).encode(), head)
    assert json.load(urllib.request.urlopen(request, timeout=300))["usage"]["completion_tokens"] == 3
    return urllib.request.urlopen(f"{live.url.removesuffix('/v1')}/metrics", timeout=60).read()


def promtool(metrics: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["promtool", "check", "metrics"], input=metrics, capture_output=True, timeout=60)


def test_prometheus_finds_no_error_and_nothing_to_say_but_of_vllms_own_names(live: LiveServer):
    metrics = scrape(live)
    assert b"vllm:generation_tokens_total" in metrics
    done = promtool(metrics)
    # 0: all is well; 3: readable, but there are remarks on style. Names are vLLM's, for its dashboard: a colon is not
    # meant for names that no rule has made, and a histogram of vLLM's ends in _total.
    assert done.returncode in (0, 3), done.stderr.decode()
    remarks = [line for line in done.stderr.decode().splitlines() if "metric names should not contain ':'" not in line]
    assert [line for line in remarks if not line.startswith("vllm:")] == []


def test_it_would_find_a_broken_line():
    assert promtool(b"# TYPE a counter\na{b=} 1\n").returncode == 1
