"""The files for clusters fit their schemas. `make vllm` installs the validator of Kubernetes, `make test` has Ray's."""

import json
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFESTS = [
    pytest.param(document, id=f"{path.stem}-{document['kind']}-{document['metadata']['name']}")
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_kubernetes_takes_the_manifest(manifest):
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate(manifest, validate.latest_version(), strict=True)


def test_a_wrong_manifest_is_found():
    validate = pytest.importorskip("kubernetes_validate")
    wrong = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "btlm"}, "spec": {"ports": [{"port": "http"}]}}
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", ["replicas", "two-machines"])
def test_services_find_pods_and_ports(name):
    documents = list(yaml.safe_load_all((DEPLOY / f"kubernetes/{name}.yaml").read_text()))
    (workload,) = (one for one in documents if one["kind"] in ("Deployment", "StatefulSet"))
    pod = workload["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert workload["spec"]["selector"]["matchLabels"] == labels
    (container,) = pod["spec"]["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["spec"]["volumes"]}
    ports = {port["name"] for port in container["ports"]}
    names = {f"{workload['metadata']['name']}-{i}" for i in range(workload["spec"]["replicas"])}
    for service in (one["spec"] for one in documents if one["kind"] == "Service"):
        selector = service["selector"]
        assert selector == labels or selector["statefulset.kubernetes.io/pod-name"] in names
        assert {port.get("targetPort", port["name"]) for port in service["ports"]} <= ports


def test_ray_takes_the_cluster():
    jsonschema = pytest.importorskip("jsonschema")
    ray = pytest.importorskip("ray")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load((DEPLOY / "ray/cluster.yaml").read_text()), schema)
