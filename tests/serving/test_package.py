"""A bundle as a container. No image is built here: there is no registry that has its base."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from msgspec import structs

from kit.hand_bundle import edit_json
from kit.remote_systems import write_mixed_bundle
from recmas_runtime.cli.main import _parse, main
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.manifest import RemoteEntry
from recmas_runtime.serve.local import LocalService
from recmas_runtime.serve.metrics import Metrics
from recmas_runtime.serve.packaging import package
from recmas_runtime.serve.protocol import Ask
from recmas_runtime.serve.service import ServiceError

ROOT = Path(__file__).parent.parent.parent
KUBERNETES = "1.34"


@pytest.fixture(scope="module")
def packaged(hand_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of the bundle by hand; only to be read."""
    out = tmp_path_factory.mktemp("package") / "out"
    assert main(["package", str(hand_bundle), "-o", str(out), "--cpus", "2"]) == 0
    return out


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def keys_of(folder: Path) -> dict[str, str]:
    lines = (folder / ".env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


def instructions(folder: Path) -> list[tuple[str, str]]:
    """Return what a Dockerfile says, with continued lines in one."""
    text = (folder / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def test_what_is_written(packaged: Path) -> None:
    found = {p.relative_to(packaged).parts[0] for p in packaged.iterdir()}
    assert found == {
        ".dockerignore",
        ".env",
        "Dockerfile",
        "bundle",
        "compose.yaml",
        "grafana",
        "kubernetes.yaml",
        "prometheus.yml",
        "requirements.txt",
        "runtime",
    }
    for path in packaged.rglob("*"):
        if path.is_file() and path.suffix not in (".onnx", ".safetensors", ".json", ".jinja"):
            assert "{{" not in path.read_text(encoding="utf-8") or "runtime" in path.parts


def test_the_image_has_the_runtime_and_the_bundle_and_nothing_else(packaged: Path) -> None:
    open_bundle(packaged / "bundle", verify_hashes=True)
    code = (
        "import sys\nfrom recmas_runtime.cli.main import main\nimport recmas_runtime\n"
        "print(recmas_runtime.__file__, file=sys.stderr)\nsys.exit(main(sys.argv[1:]))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, "run", str(packaged / "bundle"), "What is 7", "--quiet"],
        cwd=packaged,
        env={**os.environ, "PYTHONPATH": str(packaged / "runtime")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "h\n"
    assert ran.stderr.startswith(str(packaged / "runtime"))
    assert [p.name for p in (packaged / "runtime").iterdir()] == ["recmas_runtime"]
    ignored = (packaged / ".dockerignore").read_text().splitlines()
    assert [line for line in ignored if line.startswith("!")] == [
        "!requirements.txt",
        "!runtime",
        "!bundle",
    ]


def test_the_image_needs_what_the_extras_name() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    template = Path(package.__file__).parent / "templates/requirements.txt"
    wanted = {*project["dependencies"], *extras["cpu"], *extras["serve"], *extras["remote"]}
    lines = template.read_text(encoding="utf-8").splitlines()
    assert sorted(wanted) == [line for line in lines if not line.startswith("{%")]


def test_requirements_have_the_versions_of_here(packaged: Path) -> None:
    lines = (packaged / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    assert not any(line.startswith("openai") for line in lines), "nobody behind an API"


def test_keys_of_remote_models_come_from_whoever_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "http://127.0.0.1:8123/v1"
    entry = RemoteEntry(model="far", base_url=url, api_key_env="FAR_KEY")
    bundle, out = write_mixed_bundle(tmp_path / "bundle", entry), tmp_path / "out"
    monkeypatch.setenv("FAR_KEY", "sk-verysecret")
    assert main(["package", str(bundle), "-o", str(out)]) == 0
    told = capsys.readouterr().out
    assert "Write the keys of models behind an API there, too: FAR_KEY." in told
    assert f"{url} is this machine" in told
    assert keys_of(out)["FAR_KEY"] == ""
    requirements = (out / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split("==")[0] for line in requirements] == sorted(
        line.split("==")[0] for line in requirements
    )
    assert any(line.startswith("openai==") for line in requirements)
    (compose,) = documents(out / "compose.yaml")
    assert compose["services"]["recmas"]["environment"] == {
        "RECMAS_API_KEY": "${RECMAS_API_KEY:?it is in the file .env}",
        "FAR_KEY": "${FAR_KEY:?write it to the file .env}",
    }
    deployment, *_ = documents(out / "kubernetes.yaml")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["env"][1] == {
        "name": "FAR_KEY",
        "valueFrom": {"secretKeyRef": {"name": "by-hand-models", "key": "FAR_KEY"}},
    }
    secret = 'kubectl create secret generic by-hand-models --from-literal=FAR_KEY="$FAR_KEY"'
    assert secret in (out / "kubernetes.yaml").read_text(encoding="utf-8")
    for path in out.rglob("*"):
        assert not path.is_file() or b"sk-verysecret" not in path.read_bytes(), path


def test_the_dockerfile(packaged: Path) -> None:
    found = instructions(packaged)
    bases = [rest.split()[0] for name, rest in found if name == "FROM"]
    assert bases == ["python:3.11.14-slim-bookworm"] * 2
    ((_, user),) = [each for each in found if each[0] == "USER"]
    assert user == "10001:10001"
    entry = json.loads(dict(found)["ENTRYPOINT"])
    assert entry[:5] == ["python", "-m", "recmas_runtime.cli.main", "serve", "/bundles/by-hand"]
    _, probe = dict(found)["HEALTHCHECK"].split("CMD", 1)
    assert json.loads(probe)[:2] == ["python", "-c"]
    compile(json.loads(probe)[2], "probe", "exec")
    assert "curl" not in str(found)
    assert "RECMAS_API_KEY" not in str(found), "no key in the image"


def test_compose(packaged: Path) -> None:
    (compose,) = documents(packaged / "compose.yaml")
    services = compose["services"]
    assert services.keys() == {"recmas", "prometheus", "grafana"}
    for service in services.values():
        assert re.search(r":[\w.-]*\d[\w.-]*$", service["image"]), "a pinned tag"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        assert service["cap_drop"] == ["ALL"]
        for volume in service.get("volumes", ()):
            source, target = volume.split(":")[:2]
            is_file = source.startswith("./")
            assert (packaged / source).exists() if is_file else source in compose["volumes"]
            assert target.startswith("/")
    recmas = services["recmas"]
    assert recmas["read_only"] is True
    assert recmas["environment"]["RECMAS_API_KEY"].startswith("${RECMAS_API_KEY:?")
    (job,) = documents(packaged / "prometheus.yml")[0]["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["recmas:8000"]}]
    (source,) = documents(packaged / "grafana/provisioning/datasources/prometheus.yaml")
    dashboard = json.loads((packaged / "grafana/dashboards/recmas.json").read_text())
    uids = {panel["datasource"]["uid"] for panel in dashboard["panels"]}
    assert uids == {source["datasources"][0]["uid"]}


def test_kubernetes(packaged: Path, hand_bundle: Path) -> None:
    deployment, service, budget = documents(packaged / "kubernetes.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        budget["spec"]["selector"]["matchLabels"],
    ):
        assert selector == labels
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    paths = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness")]
    assert paths == ["/ready", "/ready"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    bundle = open_bundle(hand_bundle)
    caches = sum(cache.bytes_per_sample for cache in bundle.plan.caches.values())
    weights = bundle.manifest.files[bundle.manifest.backbones["one"].weights].size_bytes
    whole = weights + bundle.plan.limits.max_batch * caches + (256 + 512) * 2**20
    memory = f"{-(-whole // 2**20)}Mi"
    assert container["resources"] == {
        "requests": {"cpu": "2", "memory": memory},
        "limits": {"memory": memory},
    }
    args = container["args"]
    grace_s = int(args[args.index("--grace") + 1])
    assert pod["terminationGracePeriodSeconds"] > grace_s


def test_keys_are_its_own_and_stay(hand_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["package", str(hand_bundle), "-o", str(out)]
    assert main(command) == 0
    assert stat.S_IMODE((out / ".env").stat().st_mode) == 0o600
    keys = keys_of(out)
    assert keys.keys() == {"RECMAS_API_KEY", "GRAFANA_PASSWORD"}
    (out / "bundle/left.over").touch()
    (out / "notes.txt").write_text("mine")
    assert main([*command, "--force", "--image", "registry.example.org:5000/team/it:1"]) == 0
    assert keys_of(out) == keys
    assert not (out / "bundle/left.over").exists()
    assert (out / "notes.txt").read_text() == "mine"
    image = documents(out / "compose.yaml")[0]["services"]["recmas"]["image"]
    assert image == "registry.example.org:5000/team/it:1"
    other = tmp_path / "other"
    assert main(["package", str(hand_bundle), "-o", str(other)]) == 0
    assert set(keys_of(other).values()).isdisjoint(keys.values())


def test_what_is_refused(
    hand_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    file = tmp_path / "file"
    file.touch()
    for options, code, status in (
        (["-o", str(full)], "RM520", 2),
        (["-o", str(file), "--force"], "RM520", 2),
        (["-o", str(hand_bundle / "out")], "RM506", 2),
        (["-o", str(tmp_path / "new"), "--image", "two words"], "RM506", 2),
        (["-o", str(tmp_path / "new"), "--base", "x\nRUN true"], "RM506", 2),
        ([], "RM506", 2),
    ):
        assert main(["package", str(hand_bundle), *options]) == status, options
        assert f"error[{code}]" in capsys.readouterr().err
    assert [p.name for p in full.iterdir()] == ["notes.txt"]
    assert not (tmp_path / "new").exists()


def test_an_altered_bundle_is_not_packaged(
    hand_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(hand_bundle, tmp_path / "bundle"))
    edit_json(bundle / "plan.json", "rounds", 1)
    assert main(["package", str(bundle), "-o", str(tmp_path / "out")]) == 5
    assert "error[RM401]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Two Agents_v2", "two-agents-v2"), ("...", "system"), ("a" * 80, "a" * 50)],
)
def test_names_that_clusters_take(name: str, expected: str, hand_bundle: Path) -> None:
    bundle = open_bundle(hand_bundle)
    named = dataclasses.replace(bundle, plan=structs.replace(bundle.plan, name=name))
    assert package._values(named, package.PackageOptions())["name"] == expected


def commands(folder: Path) -> Iterator[list[str]]:
    """Yield what containers run, by the image, by compose and by Kubernetes."""
    found = dict(instructions(folder))
    entry = json.loads(found["ENTRYPOINT"])[3:]
    yield [*entry, *json.loads(found["CMD"])]
    yield [*entry, *documents(folder / "compose.yaml")[0]["services"]["recmas"]["command"]]
    pod = documents(folder / "kubernetes.yaml")[0]["spec"]["template"]["spec"]
    yield [*entry, *pod["containers"][0]["args"]]


def test_containers_run_commands_that_there_are(packaged: Path) -> None:
    parsed = [_parse(command) for command in commands(packaged)]
    for options in parsed:
        assert (options.bundles, options.host) == (["/bundles/by-hand"], "0.0.0.0")
        assert (options.threads, options.max_batch, options.grace) == (2, 4, 30.0)
    assert [options.open_metrics for options in parsed] == [False, True, True]
    assert [options.allowed_hosts for options in parsed] == [None, "recmas", "*"]


def test_every_metric_of_the_dashboard_is_there(packaged: Path, hand_bundle: Path) -> None:
    async def scrape() -> str:
        service = await LocalService.start({"hand": str(hand_bundle)}, threads=1)
        service.worker_pid = os.getpid()
        metrics = Metrics(service)
        while service.gauges is None or not service.gauges.rows_per_step:
            async for _ in service.ask(Ask(id=0, model="hand", record={"question": "7"})):
                pass
        with pytest.raises(ServiceError):
            async for _ in service.ask(Ask(id=0, model="hand", record={})):
                pass
        metrics.on_response("/v1/models", 200, 0.1)
        await service.close(0.0)
        return metrics.render().decode()

    page = asyncio.run(scrape())
    dashboard = (packaged / "grafana/dashboards/recmas.json").read_text(encoding="utf-8")
    used = set(re.findall(r"recmas_[a-z_]+", dashboard))
    assert len(used) > 20
    assert not {name for name in used if not re.search(rf"^{name}[ {{]", page, re.MULTILINE)}
    labels = set(re.findall(r"by \(([^)]*)\)", dashboard))
    for label in {each.strip() for group in labels for each in group.split(",")}:
        assert re.search(rf"[{{,]{label}=", page), label


def linter(name: str) -> str:
    """Return a program that `make test-containers` installs."""
    path = Path(sys.executable).parent / name
    assert path.exists(), f"{name} is not installed: run `make test-containers`"
    return str(path)


@pytest.mark.containers
def test_the_linter_of_dockerfiles_finds_nothing(packaged: Path) -> None:
    ran = subprocess.run(
        [linter("hadolint"), str(packaged / "Dockerfile")], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (0, "")


@pytest.mark.containers
def test_the_manifest_fits_the_schema_of_kubernetes(packaged: Path) -> None:
    command = [linter("kubernetes-validate"), "--strict", "-k", KUBERNETES]
    ran = subprocess.run(
        [*command, str(packaged / "kubernetes.yaml")], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stderr.count("passed") + ran.stdout.count("passed") == 3


@pytest.mark.containers
def test_what_the_container_runs_on_a_root_that_is_read_only(packaged: Path) -> None:
    """In a sandbox in place of an image, as nobody, with an empty folder for what is temporary."""
    bwrap = shutil.which("bwrap")
    assert bwrap is not None, "bubblewrap is not installed"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    _, command, _ = commands(packaged)
    arguments = [*command, "--port", str(port)]
    arguments[1] = "/mnt/bundle"
    sandbox = [bwrap, "--unshare-user", "--unshare-pid", "--uid", "10001", "--gid", "10001"]
    sandbox += ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--chdir", "/"]
    sandbox += ["--ro-bind", str(packaged), "/mnt", "--tmpfs", "/media"]
    variables = {"PYTHONPATH": "/mnt/runtime", "HOME": "/media", "TMPDIR": "/media"}
    for name, value in {**variables, **keys_of(packaged)}.items():
        sandbox += ["--setenv", name, value]
    base = f"http://127.0.0.1:{port}"
    key = {"Authorization": f"Bearer {keys_of(packaged)['RECMAS_API_KEY']}"}
    body = {"model": "by-hand", "messages": [{"role": "user", "content": "It is 7"}]}
    main_of = [sys.executable, "-m", "recmas_runtime.cli.main"]
    with subprocess.Popen([*sandbox, *main_of, *arguments], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith(b"Serving by-hand on http://0.0.0.0:")
        _, probe = dict(instructions(packaged))["HEALTHCHECK"].split("CMD", 1)
        here = [sys.executable, *json.loads(probe)[1:]]
        here[2] = here[2].replace(":8000", f":{port}")
        assert subprocess.run(here).returncode == 0
        metrics = httpx.get(f"{base}/metrics", headers={"Host": f"recmas:{port}"})
        assert "recmas_ready 1.0" in metrics.text
        assert httpx.get(f"{base}/v1/models").status_code == 401
        answer = httpx.post(f"{base}/v1/chat/completions", json=body, headers=key).json()
        assert answer["choices"][0]["message"]["content"] == "h"
        server.terminate()
        server.wait(timeout=30)
