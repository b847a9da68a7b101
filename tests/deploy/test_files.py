"""The files of deploy/ by the linters of those who will read them, and by what they say about each other.

None of this runs a file: test_nginx.py, test_prometheus.py and tests/container do.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from minivllm.entrypoints.server import LAST_WORDS_SECONDS
from minivllm.entrypoints.service import ServerConfig
from minivllm.hub import DEFAULT_MODEL

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
CHECKED_BY_SCHEMA = (
    *("deployment", "horizontalpodautoscaler", "persistentvolumeclaim", "poddisruptionbudget", "service"),
)
KUBERNETES_VERSIONS = ("1.30", "1.33", "1.37")  # the oldest that has lifecycle.preStop.sleep; and later ones


def tool(name: str, *arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """A command of this environment."""
    command = [str(Path(sys.executable).parent / name), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return load(DEPLOY / "docker-compose.yml")


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    return load(KUBERNETES / "deployment.yaml")["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod["containers"]
    return found


# ------------------------------------------------------------------ linters
def test_hadolint_has_nothing_to_say():
    done = tool("hadolint", DEPLOY / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would_say_something():
    assert tool("hadolint", "-", stdin="FROM debian\nRUN cd /x && pip install y\n").returncode == 1


def test_yamllint_has_nothing_to_say():
    done = tool("yamllint", "--strict", "-c", DEPLOY / ".yamllint.yaml", DEPLOY)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_compose_file_follows_the_compose_specification(tmp_path: Path):
    command = ("check-jsonschema", "--builtin-schema", "vendor.compose-spec")
    done = tool(*command, DEPLOY / "docker-compose.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.yml"
    wrong.write_text((DEPLOY / "docker-compose.yml").read_text().replace("read_only: true", "read_only: [1]"))
    assert tool(*command, wrong).returncode == 1


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("name", CHECKED_BY_SCHEMA)
def test_manifests_follow_kubernetes_schemas(name: str, version: str):
    done = tool("kubernetes-validate", "--strict", "-k", version, KUBERNETES / f"{name}.yaml")
    assert done.returncode == 0 and " passed for resource" in done.stdout + done.stderr, done.stdout + done.stderr


def test_a_misspelt_field_would_be_found(tmp_path: Path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((KUBERNETES / "deployment.yaml").read_text().replace("readinessProbe", "readynessProbe"))
    assert tool("kubernetes-validate", "--strict", wrong).returncode == 1


# ------------------------------------------------------------------ Dockerfile
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def test_the_image_has_no_root_no_shell_no_curl_and_no_secret():
    last = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert "\nUSER 10001:0\n" in last and '\nENTRYPOINT ["minivllm"]\n' in last
    assert 'CMD ["python", "/opt/minivllm/healthcheck.py"]' in last
    commands = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE)
    assert not re.search(r"curl|wget|sudo|ADD |latest|TOKEN|KEY|PASSWORD", commands)


def test_one_index_for_each_pip_command_and_every_package_is_pinned():
    assert "extra-index-url" not in DOCKERFILE
    for variant in ("cpu", "cuda"):
        lines = (DEPLOY / f"requirements-{variant}.txt").read_text().splitlines()[1:]
        assert len(lines) > 40
        assert all(re.fullmatch(r"[\w.-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    assert "torch==2.13.0 " in (DEPLOY / "requirements-cuda.txt").read_text()
    assert "torch==" not in (DEPLOY / "requirements-cpu.txt").read_text() and "torch==2.13.0+cpu" in DOCKERFILE


def test_the_pinned_packages_are_those_that_setup_cfg_wants():
    wanted = re.search(r"^install_requires =\n(.*?)\n\n", (ROOT / "setup.cfg").read_text(), re.DOTALL | re.MULTILINE)
    assert wanted
    names = [re.split(r"[<>=]", line.strip())[0].replace("_", "-") for line in wanted[1].splitlines()]
    pinned = (DEPLOY / "requirements-cuda.txt").read_text()
    assert len(names) > 10 and [name for name in names if f"\n{name}==" not in pinned] == []
    on_cpu = (DEPLOY / "requirements-cpu.txt").read_text()
    assert {name for name in names if f"\n{name}==" not in on_cpu} == {"torch", "triton"}


def test_the_context_is_what_the_image_is_made_of():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()
    copied = {
        word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()
    }
    assert allowed == {word.replace("${VARIANT}", "*") for word in copied}


# ------------------------------------------------------------------ docker-compose.yml
def test_every_variable_of_the_compose_file_is_in_the_example():
    used = set(re.findall(r"\$\{(\w+)", (DEPLOY / "docker-compose.yml").read_text()))
    assert used == set(re.findall(r"^(\w+)=", (DEPLOY / "env.example").read_text(), re.MULTILINE))
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert ".env" in ignored and "deploy/models/" in ignored


def test_nginx_knows_the_names_of_the_compose_file(compose: dict[str, Any]):
    upstream = re.findall(r"server ([\w-]+):8000", (DEPLOY / "nginx.conf").read_text())
    services = compose["services"]
    networks = [network for one in services.values() for network in one.get("networks", {}).values()]
    aliases = [alias for network in networks for alias in network["aliases"]]
    assert len(upstream) == 3 and set(upstream) <= set(services) | set(aliases)


def test_prometheus_asks_every_server_of_the_compose_file(compose: dict[str, Any]):
    (job,) = load(DEPLOY / "prometheus/prometheus.yml")["scrape_configs"]
    servers = {name for name, one in compose["services"].items() if one["image"].startswith("minivllm:")}
    assert set(job["dns_sd_configs"][0]["names"]) == servers


def test_compose_servers_are_locked_down_and_may_end(compose: dict[str, Any]):
    for name, one in compose["services"].items():
        assert not one.get("privileged"), name
        if not one["image"].startswith("minivllm:"):
            continue
        assert one["read_only"] and one["cap_drop"] == ["ALL"] and one["security_opt"] == ["no-new-privileges:true"]
        drain = float(one["environment"]["MINIVLLM_SHUTDOWN_TIMEOUT"])
        assert float(one["stop_grace_period"].removesuffix("s")) > drain + LAST_WORDS_SECONDS
        assert one["command"][1] == f"${{MODEL:-{DEFAULT_MODEL.name}}}"


def test_files_that_compose_mounts_exist(compose: dict[str, Any]):
    mounts = [mount for one in compose["services"].values() for mount in one.get("volumes", ())]
    files = [DEPLOY / mount.split(":")[0] for mount in mounts if mount.startswith("./") and "models" not in mount]
    assert len(files) >= 4 and [file for file in files if not file.exists()] == []


# ------------------------------------------------------------------ Kubernetes
def test_the_body_limit_of_nginx_is_the_servers():
    assert ServerConfig().max_body_bytes == 2**20 and "client_max_body_size 1m;" in (DEPLOY / "nginx.conf").read_text()


def test_probes_ask_the_three_endpoints(container: dict[str, Any]):
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/health", "readiness": "/ready", "liveness": "/live"}


def test_a_pod_has_time_to_drain(pod: dict[str, Any], container: dict[str, Any]):
    drain = next(float(one["value"]) for one in container["env"] if one["name"] == "MINIVLLM_SHUTDOWN_TIMEOUT")
    needed = container["lifecycle"]["preStop"]["sleep"]["seconds"] + drain + LAST_WORDS_SECONDS
    assert pod["terminationGracePeriodSeconds"] > needed


def test_a_pod_has_no_rights(pod: dict[str, Any], container: dict[str, Any]):
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
    assert pod["automountServiceAccountToken"] is False
    rights = container["securityContext"]
    assert rights == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/cache"]


def test_a_service_named_like_us_sets_none_of_our_variables(pod: dict[str, Any]):
    """Kubernetes tells every pod about a Service minivllm as MINIVLLM_PORT=tcp://..., the server's own setting."""
    assert load(KUBERNETES / "service.yaml")["metadata"]["name"] == "minivllm" and pod["enableServiceLinks"] is False


def test_a_pod_has_limits_and_no_more_threads_than_cores(container: dict[str, Any]):
    threads = next(one["value"] for one in container["env"] if one["name"] == "OMP_NUM_THREADS")
    assert container["resources"]["limits"]["cpu"] == container["resources"]["requests"]["cpu"] == threads


def test_manifests_select_the_deployments_pods():
    labels = load(KUBERNETES / "deployment.yaml")["spec"]["template"]["metadata"]["labels"]
    assert load(KUBERNETES / "deployment.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert load(KUBERNETES / "service.yaml")["spec"]["selector"] == labels
    assert load(KUBERNETES / "poddisruptionbudget.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert load(KUBERNETES / "servicemonitor.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert load(KUBERNETES / "service.yaml")["metadata"]["labels"] == labels  # what the monitor looks for
    target = load(KUBERNETES / "horizontalpodautoscaler.yaml")["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "minivllm"}


def test_the_scalers_metric_is_what_the_adapter_makes_of_ours():
    (rule,) = load(KUBERNETES / "prometheus-adapter.yaml")["rules"]["custom"]
    (metric,) = load(KUBERNETES / "horizontalpodautoscaler.yaml")["spec"]["metrics"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"] == "vllm_num_requests_waiting"
    assert rule["seriesQuery"].startswith("vllm:num_requests_waiting{")


def test_the_kustomization_lists_every_manifest():
    listed = set(load(KUBERNETES / "kustomization.yaml")["resources"])
    others = {"kustomization.yaml", "prometheus-adapter.yaml"}  # the latter is for a chart
    assert listed == {file.name for file in KUBERNETES.iterdir()} - others


# ------------------------------------------------------------------ Grafana
def test_panels_have_different_places_and_the_provisioned_source():
    dashboard = json.loads((DEPLOY / "grafana/dashboards/minivllm.json").read_text())
    (source,) = load(DEPLOY / "grafana/provisioning/datasources/prometheus.yml")["datasources"]
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) > 10
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}


# ------------------------------------------------------------------ docs/deployment.md
def test_every_command_of_the_page_is_marked():
    """`Run` or `Linted` begins the paragraph before each block."""
    page = (ROOT / "docs/deployment.md").read_text()
    parts = page.split("```bash\n")
    marks = [part.rpartition("```\n")[2].strip().split("\n\n")[-1] for part in parts[:-1]]
    assert len(marks) > 5 and [mark for mark in marks if not re.match(r"(Run|Linted)\b.*:$", mark, re.DOTALL)] == []


def test_the_page_names_files_and_environments_that_exist():
    page = (ROOT / "docs/deployment.md").read_text()
    paths = {path.rstrip("/") for path in re.findall(r"`((?:deploy|tests)/[\w./-]+)`", page)}
    assert len(paths) > 5 and [path for path in paths if not (ROOT / path).exists()] == []
    tox = (ROOT / "tox.ini").read_text()
    assert [name for name in re.findall(r"`tox -e ([\w-]+)`", page) if f"[testenv:{name}]" not in tox] == []
