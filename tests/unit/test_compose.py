"""docker-compose.yml fits the code, as far as can be known without a Docker engine."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from celery import Celery
from celery.bin.celery import celery as celery_command

from celery_batchtrack.vocabulary.settings import PREFIX, Settings
from examples.annotations import cli, tasks

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SERVERS = ("postgres", "rabbitmq", "redis")
OURS = sorted(set(SERVICES) - set(SERVERS))
DOCKERFILE = ROOT / "examples" / "docker" / "Dockerfile"


def commands(service: dict[str, Any]) -> Iterator[list[str]]:
    """The service's command and health check, as words."""
    command = service.get("command")
    if command:
        yield shlex.split(command) if isinstance(command, str) else command
    kind, *check = service.get("healthcheck", {}).get("test", ["NONE"])
    if kind == "CMD-SHELL":
        yield shlex.split(check[0])
    elif kind == "CMD":
        yield check


def default_of(text: str) -> str:
    """What ``${NAME:-default}`` stands for when NAME is not set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_every_part_of_a_deployment_is_there() -> None:
    assert set(SERVERS) <= set(SERVICES)
    assert {"migrate", "worker-1", "worker-2", "beat", "flower"} <= set(OURS)


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_images_are_pinned(name: str) -> None:
    _, _, tag = SERVICES[name]["image"].partition(":")
    assert re.match(r"\d+\.\d+", tag), f"{name}: {SERVICES[name]['image']}"


def test_the_image_of_the_example_is_pinned() -> None:
    base = re.search(r"^FROM (\S+)", DOCKERFILE.read_text(), re.MULTILINE)
    assert base and re.fullmatch(r"python:3\.\d+-slim\S*", base[1])


@pytest.mark.parametrize("name", OURS)
def test_our_services_are_built_from_the_dockerfile(name: str) -> None:
    build = SERVICES[name]["build"]
    assert (ROOT / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE


def test_the_dockerfile_copies_what_there_is_and_what_its_build_needs() -> None:
    copied = {
        source
        for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
        for source in line.split()
    }
    assert all((ROOT / source).exists() for source in copied)
    assert {"pyproject.toml", "README.md", "LICENSE", "celery_batchtrack", "examples"} <= copied
    let_in = set(re.findall(r"^!(\S+)$", (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text(), re.MULTILINE))
    assert copied <= let_in


@pytest.mark.parametrize("name", OURS)
def test_commands_name_an_app_and_a_subcommand_that_exist(name: str) -> None:
    for words in commands(SERVICES[name]):
        if words[0] == "celery":
            assert_celery_command(words)
        else:
            assert words[0] == "python", words
            assert_python_command(words)


def assert_celery_command(words: list[str]) -> None:
    assert words[1] == "-A"
    assert isinstance(importlib.import_module(words[2]).app, Celery)
    rest = words[3:]
    if rest[:2] == ["batchtrack", "flower"]:  # takes Flower's own options; the image has it by the extra `all`
        from flower.options import options

        assert {word.partition("=")[0][2:] for word in rest[2:]} <= {each.replace("_", "-") for each in options}, words
        return
    found: Any = our_commands().get(rest[0]) or celery_command.commands[rest[0]]
    while hasattr(found, "commands"):
        found = found.commands[rest.pop(1)]
    rest.pop(0)
    known = {name for each in found.params for name in (*each.opts, *each.secondary_opts)}
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known, words


def our_commands() -> dict[str, Any]:
    """What the package adds to `celery`, installed or not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {}
    for name, target in project["entry-points"]["celery.commands"].items():
        module, _, attribute = target.partition(":")
        found[name] = getattr(importlib.import_module(module), attribute)
    return found


def assert_python_command(words: list[str]) -> None:
    if words[1] == "-c":
        compile(words[2], "<healthcheck>", "exec")
        return
    assert words[1] == "-m"
    importlib.import_module(f"{words[2]}.__main__")
    options = cli.parse_arguments([default_of(word) for word in words[3:]])
    assert options.broker and options.database


def test_all_install_the_extras_that_the_urls_need() -> None:
    assert re.search(r"pip install '\.\[all\]'", DOCKERFILE.read_text())


@pytest.mark.parametrize("name", OURS)
def test_our_services_set_what_the_code_reads(name: str) -> None:
    environment = SERVICES[name]["environment"]
    read = {tasks.BROKER_VARIABLE, tasks.DATABASE_VARIABLE}
    read |= {(PREFIX + each).upper() for each in Settings.names()}
    assert set(environment) <= read
    assert {tasks.BROKER_VARIABLE, tasks.DATABASE_VARIABLE, "BATCHTRACK_BLACKBOX_DIR"} <= set(environment)


@pytest.mark.parametrize("name", OURS)
def test_urls_name_servers_of_this_file(name: str) -> None:
    environment = SERVICES[name]["environment"]
    database = cli.sa.make_url(environment[tasks.DATABASE_VARIABLE])
    assert (database.host, database.drivername) == ("postgres", "postgresql+psycopg")
    server = SERVICES["postgres"]["environment"]
    assert (database.username, database.password) == (server["POSTGRES_USER"], server["POSTGRES_PASSWORD"])
    assert database.database == server["POSTGRES_DB"]
    broker = default_of(environment[tasks.BROKER_VARIABLE])
    server = SERVICES["rabbitmq"]["environment"]
    user, password = server["RABBITMQ_DEFAULT_USER"], server["RABBITMQ_DEFAULT_PASS"]
    assert broker == f"amqp://{user}:{password}@rabbitmq:5672//"


@pytest.mark.parametrize("name", SERVERS)
def test_servers_say_when_they_are_ready(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"]


@pytest.mark.parametrize("name", [name for name in OURS if name not in ("migrate", "upload")])
def test_what_runs_for_long_has_a_health_check_and_waits_for_the_tables(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"]
    assert service["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}


def test_the_migration_runs_once_and_waits_for_its_database() -> None:
    service = SERVICES["migrate"]
    assert service["restart"] == "no"
    assert service["depends_on"]["postgres"] == {"condition": "service_healthy"}
    assert service["command"][-2:] == ["batchtrack", "migrate"]


@pytest.mark.parametrize("name", ["worker-1", "worker-2", "upload"])
def test_black_boxes_outlive_the_container(name: str) -> None:
    folder = SERVICES[name]["environment"]["BATCHTRACK_BLACKBOX_DIR"]
    mounts = dict(volume.split(":") for volume in SERVICES[name]["volumes"])
    assert folder in mounts.values()
    assert set(mounts) <= set(COMPOSE["volumes"])
    assert folder in DOCKERFILE.read_text()  # made there with the user's rights, which the volume takes over


def test_nothing_is_reachable_from_other_machines() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_health_checks_of_workers_ask_the_worker_by_its_name() -> None:
    for name in ("worker-1", "worker-2"):
        given, check = commands(SERVICES[name])
        node = given[given.index("--hostname") + 1].partition("@")[0]
        assert check[check.index("--destination") + 1] == f"{node}@$$HOSTNAME"
