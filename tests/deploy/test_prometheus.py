"""Prometheus itself: promtool reads the configuration, and a real server answers every panel of the dashboard."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.instances import MODEL, PATIENCE_SECONDS, Instance, complete, eventually, free_port, is_listening

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/prometheus"
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/minivllm.json").read_text())
EXPRESSIONS = [
    (f"{panel['title']} {target['refId']}", target["expr"])
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
]
ALERTS = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
# What vLLM's own dashboard shows.
VLLMS = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total"),
    *("generation_tokens_total", "request_success_total", "time_to_first_token_seconds", "inter_token_latency_seconds"),
    *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
    *("request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens"),
    *("request_max_num_generation_tokens",),
}


def concrete(expression: str) -> str:
    """As Grafana sends it."""
    return expression.replace("$model_name", MODEL).replace("$__rate_interval", "5m")


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=120)


class Prometheus:
    """A running one."""

    def __init__(self, url: str):
        self.url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{query}", timeout=PATIENCE_SECONDS) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return found


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_SECONDS):
            return True
    except urllib.error.HTTPError:
        return False


@pytest.fixture(scope="module")
def prometheus(instances: list[Instance], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Asks two servers, between whose answers there was traffic. deploy/'s configuration but for names and interval."""
    folder = tmp_path_factory.mktemp("prometheus")
    settings = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    settings["global"]["scrape_interval"] = "1s"
    del settings["scrape_configs"][0]["dns_sd_configs"]
    settings["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{one.port}" for one in instances[:2]]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    (folder / "alerts.yml").write_text((FOLDER / "alerts.yml").read_text())
    listen = free_port()
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{listen}", "--log.level=warn"]
    process = subprocess.Popen(command)
    with contextlib.ExitStack() as stack:
        stack.callback(process.wait, PATIENCE_SECONDS)
        stack.callback(process.terminate)
        eventually(lambda: is_listening(listen))
        eventually(lambda: is_ready(f"http://127.0.0.1:{listen}/-/ready"))  # it listens earlier, and answers 503
        found = Prometheus(f"http://127.0.0.1:{listen}")
        count = "count_over_time(vllm:generation_tokens_total[5m])"
        eventually(lambda: len(found.query(f"{count} >= 2")) == 2)
        for one in instances[:2]:
            assert complete(f"http://127.0.0.1:{one.port}", max_tokens=20).status == 200
        before = time.time()
        eventually(lambda: len(found.query(f"timestamp(vllm:generation_tokens_total) > {before}")) == 2)
        yield found


def test_promtool_accepts_the_configuration_and_the_rules():
    for done in (
        promtool("check", "config", FOLDER / "prometheus.yml"),
        promtool("check", "rules", FOLDER / "alerts.yml"),
    ):
        assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_would_find_a_wrong_rule(tmp_path: Path):
    wrong = tmp_path / "alerts.yml"
    wrong.write_text((FOLDER / "alerts.yml").read_text().replace(" > 0.95", " > "))
    assert promtool("check", "rules", wrong).returncode != 0


def test_every_metric_of_vllms_dashboard_is_on_ours():
    shown = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for _, expression in EXPRESSIONS
        for name in re.findall(r"vllm:(\w+)", expression)
    }
    assert shown >= VLLMS


def test_both_servers_are_up(prometheus: Prometheus):
    assert [one["value"][1] for one in prometheus.query("up")] == ["1", "1"]


@pytest.mark.parametrize(("panel", "expression"), EXPRESSIONS, ids=[name for name, _ in EXPRESSIONS])
def test_every_panel_shows_something(panel: str, expression: str, prometheus: Prometheus):
    assert prometheus.query(concrete(expression)), panel


def test_the_dashboards_variable_lists_the_model(prometheus: Prometheus):
    (variable,) = DASHBOARD["templating"]["list"]
    assert variable["query"]["query"] == "label_values(vllm:num_requests_running, model_name)"
    assert {one["metric"]["model_name"] for one in prometheus.query("vllm:num_requests_running")} == {MODEL}


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_alerts_know_their_metrics_and_are_silent(rule: dict[str, Any], prometheus: Prometheus):
    for name in re.findall(r"vllm:\w+|\bup\b", rule["expr"]):
        assert prometheus.query(name), name
    assert prometheus.query(rule["expr"]) == []


def test_a_metric_that_is_not_there_would_be_missed(prometheus: Prometheus):
    assert prometheus.query("vllm:no_such_thing") == []
